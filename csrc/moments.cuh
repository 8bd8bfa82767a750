// How the moments of dense parameters are read and stored: M and V of N neighbours at a time,
// computed with in float32. Narrow ones are rounded by chance, element e of a parameter by word
// e mod 4 of the call (e div 4, its low and its high half, step, 5): the low half for M, the high
// one for V. apollo_kernels/moments.py is the specification, to the last bit.
#pragma once

#include "common.cuh"
#include "philox.cuh"

namespace apollo {

constexpr float kLargestMoment = 0x1.ep127f;  // narrow moments saturate here
constexpr float kSmallestUnit = 0x1p-126f;    // of a block of codes
constexpr int kDoublings[] = {14, 30};        // the largest k of m 2^k unit, of M and V
static_assert(kBlock == 32 * kDenseVector);   // so a block is a warp's vectors

APOLLO_DEVICE float saturated(float x) { return fminf(fmaxf(x, -kLargestMoment), kLargestMoment); }

// Code I of four, a float by itself: sign, exponent and 3 bits moved into place are its value by
// 2^-129, subnormal or not. All three products are exact.
template <int I, bool SIGNED>
APOLLO_DEVICE float decode(uint32_t codes, float unit) {
  const uint32_t code = codes >> 8 * I & 0xFFu;
  const uint32_t size = SIGNED ? code & 0x7Fu : code;
  const float value = __uint_as_float(size << 20) * 0x1p126f * (8.0f * unit);
  return SIGNED && (code & 0x80u) != 0 ? -value : value;
}

// The unit where it still suits a block that reaches to `highest`, rounded up too, else a new one:
// so no code has to be cut to the largest.
template <bool SIGNED>
APOLLO_DEVICE float renewed_unit(float unit, float highest) {
  constexpr int kLast = kDoublings[SIGNED ? 0 : 1];
  const int exponent = (int(__float_as_uint(highest) + (1u << 20)) >> 23) - 3 - kLast;
  const float fresh = __uint_as_float(uint32_t(exponent < 1 ? 1 : exponent) << 23);
  unit = fmaxf(unit, kSmallestUnit);
  constexpr float kTop = 15.0f * float(1 << kLast);
  return highest <= kTop * unit && 2.0f * fresh >= unit ? unit : fresh;
}

// The code of x by 16 random bits; `inverse`: 1 / unit. A V above 0 never becomes 0.
template <bool SIGNED>
APOLLO_DEVICE uint32_t encode(float x, float inverse, uint32_t bits) {
  const float y = fabsf(x) * inverse;
  const int above = int(__float_as_uint(y) >> 23) - 130;
  const int k = above < 0 ? 0 : above;
  const float scale = __uint_as_float(uint32_t(127 + 16 - k) << 23);  // 2^16 / 2^k
  const uint32_t code = ((uint32_t(__float2int_rn(y * scale)) + bits) >> 16) + 8 * uint32_t(k);
  if (SIGNED) return x < 0.0f ? code | 0x80u : code;
  return x > 0.0f && code == 0 ? 1u : code;
}

// Where the moments of a block of elements lie, and what decides their rounding.
template <class M>
struct MomentPlaces {
  M *exp_avg, *exp_avg_sq;
  float *exp_avg_unit = nullptr, *exp_avg_sq_unit = nullptr;  // of codes
  uint64_t key, call;                                         // of the first elements
  uint32_t step = 0;

  APOLLO_DEVICE MomentPlaces(const DenseRow& p, int64_t begin)
      : exp_avg(static_cast<M*>(p.exp_avg) + begin),
        exp_avg_sq(static_cast<M*>(p.exp_avg_sq) + begin),
        key(p.key),
        call(uint64_t(begin) / 4) {
    if constexpr (kDtypeOf<M> != kFloat32) step = uint32_t(*p.step + 1);
    if constexpr (kDtypeOf<M> == kInt8) {
      exp_avg_unit = p.exp_avg_unit + begin / kBlock;
      exp_avg_sq_unit = p.exp_avg_sq_unit + begin / kBlock;
    }
  }

  // The words of the four elements from number i of the block on.
  APOLLO_DEVICE Words words(int i) const {
    const uint64_t own = call + uint64_t(i / 4);
    return philox4x32({{uint32_t(own), uint32_t(own >> 32), step, kMoments}}, uint32_t(key),
                      uint32_t(key >> 32));
  }
};

// M and V as they are, or bf16.
template <class M>
struct MomentPacks {
  static constexpr int N = kDenseVector;
  Pack<M, N> m, v;

  APOLLO_DEVICE void load(const MomentPlaces<M>& at, int i, int n, bool wide) {
    m.load(at.exp_avg + i, n, wide);
    v.load(at.exp_avg_sq + i, n, wide);
  }
  APOLLO_DEVICE void get(float (&mm)[N], float (&vv)[N]) const {
    m.get(mm);
    v.get(vv);
  }
  APOLLO_DEVICE void set(const MomentPlaces<M>& at, int i, int, float (&mm)[N], float (&vv)[N]) {
    if constexpr (kDtypeOf<M> == kBfloat16) {
      const Words drawn = at.words(i);
#pragma unroll
      for (int e = 0; e < N; ++e) {  // what is cut off is not rounded by the store
        const uint32_t m_bits = __float_as_uint(saturated(mm[e])) + (drawn.w[e] & 0xFFFFu);
        const uint32_t v_bits = __float_as_uint(saturated(vv[e])) + (drawn.w[e] >> 16);
        mm[e] = __uint_as_float(m_bits & 0xFFFF0000u);
        vv[e] = __uint_as_float(v_bits & 0xFFFF0000u);
      }
    }
    m.set(mm);
    v.set(vv);
  }
  APOLLO_DEVICE void store(const MomentPlaces<M>& at, int i, int n, bool wide) {
    m.store(at.exp_avg + i, n, wide);
    v.store(at.exp_avg_sq + i, n, wide);
  }
};

// Codes. A warp holds a block and finds its largest together; lanes beyond the parameter's end take
// part with zeros.
template <>
struct MomentPacks<int8_code> {
  static constexpr int N = kDenseVector;
  Pack<int8_code, N> m, v;
  float m_unit, v_unit;

  APOLLO_DEVICE void load(const MomentPlaces<int8_code>& at, int i, int n, bool wide) {
    m.load(at.exp_avg + i, n, wide);
    v.load(at.exp_avg_sq + i, n, wide);
    m_unit = n > 0 ? *global(at.exp_avg_unit + i / kBlock) : 0.0f;
    v_unit = n > 0 ? *global(at.exp_avg_sq_unit + i / kBlock) : 0.0f;
  }
  APOLLO_DEVICE void get(float (&mm)[N], float (&vv)[N]) const {
    decode_all<true>(m, m_unit, mm);
    decode_all<false>(v, v_unit, vv);
  }
  APOLLO_DEVICE void set(const MomentPlaces<int8_code>& at, int i, int n, float (&mm)[N],
                         float (&vv)[N]) {
    const Words drawn = at.words(i);
    const bool first = i % kBlock == 0 && n > 0;
    encode_all<true>(m, m_unit, mm, drawn, first ? at.exp_avg_unit + i / kBlock : nullptr);
    encode_all<false>(v, v_unit, vv, drawn, first ? at.exp_avg_sq_unit + i / kBlock : nullptr);
  }
  APOLLO_DEVICE void store(const MomentPlaces<int8_code>& at, int i, int n, bool wide) {
    m.store(at.exp_avg + i, n, wide);
    v.store(at.exp_avg_sq + i, n, wide);
  }

 private:
  template <bool SIGNED>
  APOLLO_DEVICE static void decode_all(const Pack<int8_code, N>& from, float unit, float (&x)[N]) {
    const uint32_t codes = from.words[0];
    x[0] = decode<0, SIGNED>(codes, unit);
    x[1] = decode<1, SIGNED>(codes, unit);
    x[2] = decode<2, SIGNED>(codes, unit);
    x[3] = decode<3, SIGNED>(codes, unit);
  }
  // `to`: where a new unit goes, of the lane that stores it.
  template <bool SIGNED>
  APOLLO_DEVICE static void encode_all(Pack<int8_code, N>& to_codes, float unit, float (&x)[N],
                                       const Words& drawn, float* to) {
    float highest = 0.0f;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      x[e] = saturated(x[e]);
      highest = fmaxf(highest, fabsf(x[e]));
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(0xFFFFFFFFu, highest, lanes));
    }
    const float next = renewed_unit<SIGNED>(unit, highest);
    if (next != unit && to != nullptr) *global(to) = next;
    const float inverse = __uint_as_float((254u << 23) - __float_as_uint(next));  // of a power of 2
    uint32_t codes = 0;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const uint32_t bits = SIGNED ? drawn.w[e] & 0xFFFFu : drawn.w[e] >> 16;
      codes |= encode<SIGNED>(x[e], inverse, bits) << 8 * e;
    }
    to_codes.words[0] = codes;
  }
};

}  // namespace apollo
