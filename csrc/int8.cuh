// int8 weights in numbers: w = (code - zero) scale, with a grid {scale, zero} in 4 bytes for each
// group of neighbours in a row. apollo_kernels/int8.py is the specification, to the last bit.
#pragma once

#include <cmath>

#include "common.cuh"

namespace apollo {

constexpr float kOneStep = float(1.0 / 238);    // of a new grid's range: 254 codes less two margins
constexpr int32_t kMargin = 8;                  // codes that a new grid leaves free on either side
constexpr float kLargest = 0x1p126f;            // updated weights saturate here
constexpr int32_t kSmallestScale = 0x00800000;  // the bits of 2^-126

APOLLO_DEVICE float scale_of(int32_t grid) { return __uint_as_float(uint32_t(grid) & ~0xFFu); }
APOLLO_DEVICE float zero_of(int32_t grid) { return float(grid & 0xFF); }

// Code I of four: the byte becomes the last one of 2^23, which a difference takes away again.
template <int I>
APOLLO_DEVICE float dequantize(uint32_t codes, float scale, float zero) {
  const float shifted = __uint_as_float(__byte_perm(codes, 0x4B000000u, 0x7540 | I));
  return (shifted - (0x1p23f + zero)) * scale;
}

// Where weights lie on a grid: w / scale + zero in 65536ths of a code, the IEEE quotient and sum.
// The quotient takes three instructions. A scale has 16 significant bits, so the quotient is never
// nearer than 2^-17 of its last place to the middle between two floats, the remainder is exact, and
// an approximate reciprocal leaves 2^-21. Scales near 0, where the remainder would be subnormal,
// are lifted beside their weights; a range that becomes infinite by that has left the grid by far.
struct Ruler {
  float lift, scale, reciprocal, zero;

  APOLLO_DEVICE explicit Ruler(int32_t grid) {
    lift = scale_of(grid) < 0x1p-64f ? 0x1p64f : 1.0f;
    scale = scale_of(grid) * lift * 0x1p-16f;
    reciprocal = approx_reciprocal(scale);
    zero = 65536.0f * zero_of(grid);
  }
  APOLLO_DEVICE float place(float w) const {
    w *= lift;
    const float quotient = w * reciprocal;
    return fmaf(fmaf(-quotient, scale, w), reciprocal, quotient) + zero;
  }
};

// The grid where it still suits a group that reaches from low <= 0 to high >= 0, else a new one. It
// covers the group in either case: no code has to be cut to [0, 255].
APOLLO_DEVICE int32_t renewed(int32_t grid, float low, float high) {
  const auto step = int32_t(__float_as_uint((high - low) * kOneStep));
  const int32_t rounded = (step + 255) & -256;
  const int32_t fresh = rounded < kSmallestScale ? kSmallestScale : rounded;
  const Ruler ruler(grid);
  const bool inside = ruler.place(low) >= 0.0f && ruler.place(high) <= 255 * 65536.0f;
  if (inside && 2.0f * scale_of(fresh) >= scale_of(grid)) return grid;
  return fresh | (int32_t(ceilf(__fdiv_rn(-low, scale_of(fresh)))) + kMargin);
}

// Four codes from their places and 16 random bits each.
APOLLO_DEVICE uint32_t codes_of(const float* places, const uint32_t* bits) {
  uint32_t sums[4];  // a code is byte 2
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] = uint32_t(__float2int_rn(places[i])) + bits[i];
  return __byte_perm(__byte_perm(sums[0], sums[1], 0x0062), __byte_perm(sums[2], sums[3], 0x0062),
                     0x5410);
}

}  // namespace apollo
