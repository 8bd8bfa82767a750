// Packs of 8 elements, conversions, sums over a block, and the words that all kernels share.
#pragma once

#include "apollo.h"
#include "device.h"

namespace apollo {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

APOLLO_DEVICE float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
APOLLO_DEVICE float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

APOLLO_DEVICE float to_float(float x) { return x; }
APOLLO_DEVICE float to_float(bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
APOLLO_DEVICE float to_float(float16 x) { return half_to_float(x.bits); }
APOLLO_DEVICE void from_float(float x, float& to) { to = x; }
APOLLO_DEVICE void from_float(float x, bfloat16& to) { to.bits = uint16_t(pack_bf16(x, 0.0f)); }
APOLLO_DEVICE void from_float(float x, float16& to) { to.bits = float_to_half(x); }

// Eight neighbours in 16-byte words: one for two-byte elements, two for float32.
template <class T>
struct Pack8 {
  static constexpr int kWords = int(sizeof(T)) / 2;
  uint4 words[kWords];

  // At most n of them, zeros beyond; `wide`: the address is a multiple of 16.
  APOLLO_DEVICE void load(const T* from, int64_t n, bool wide) {
    if (wide && n >= 8) {
      for (int i = 0; i < kWords; ++i) words[i] = load16(reinterpret_cast<const uint4*>(from) + i);
      return;
    }
    T values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = i < n ? from[i] : T{};
    memcpy(words, values, sizeof words);
  }
  APOLLO_DEVICE void store(T* to, int64_t n, bool wide) const {
    if (wide && n >= 8) {
      for (int i = 0; i < kWords; ++i) store16(reinterpret_cast<uint4*>(to) + i, words[i]);
      return;
    }
    T values[8];
    memcpy(values, words, sizeof words);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < n) to[i] = values[i];
    }
  }
  APOLLO_DEVICE void get(float (&x)[8]) const {
    T values[8];
    memcpy(values, words, sizeof words);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = to_float(values[i]);
  }
  APOLLO_DEVICE void set(const float (&x)[8]) {
    T values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) from_float(x[i], values[i]);
    memcpy(words, values, sizeof words);
  }
};

template <class T>
APOLLO_DEVICE bool aligned16(const T* base, int64_t ld) {
  return ((reinterpret_cast<uintptr_t>(base) | uintptr_t(ld * int64_t(sizeof(T)))) & 15) == 0;
}

// The sum over a block of 256 threads, the same bits in every thread and every run.
APOLLO_DEVICE float block_sum(float x, float* shared8) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
  if (threadIdx.x % 32 == 0) shared8[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < 8; ++i) sum += shared8[i];
  __syncthreads();
  return sum;
}

APOLLO_DEVICE bool finite(float x) { return (__float_as_uint(x) & 0x7FFFFFFFu) < 0x7F800000u; }

APOLLO_DEVICE bool skipped(const Hyper& h) {
  return h.found_inf != nullptr && *h.found_inf != 0.0f;
}

APOLLO_DEVICE float sign_and_scale(const Hyper& h) {
  const float sign = h.maximize ? -1.0f : 1.0f;
  return h.grad_scale == nullptr ? sign : sign / *h.grad_scale;
}

APOLLO_DEVICE double learning_rate(const Hyper& h) {
  return h.lr_tensor == nullptr ? h.lr : double(*h.lr_tensor);
}

// Adam's moments of one entry; it keeps them if its square is not finite. Returns N.
APOLLO_DEVICE float update_moments(float r, float& m, float& v, const Hyper& h) {
  if (finite(r * r)) {
    m = fmaf(h.keep1, r - m, m);
    v = fmaf(h.keep2 * r, r, h.beta2_float * v);
  }
  return m / (sqrtf(v) + h.eps);
}

}  // namespace apollo
