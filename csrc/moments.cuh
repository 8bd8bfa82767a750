// How the moments of dense parameters are read and stored: M and V of N neighbours at a time,
// computed with in float32. Narrow ones are rounded by chance, element e of a parameter by word
// e mod 4 of the call (e div 4, its low and its high half, step, 5): the low half for M, the high
// one for V. apollo_kernels/moments.py is the specification, to the last bit.
#pragma once

#include "common.cuh"
#include "philox.cuh"

namespace apollo {

constexpr float kLargestMoment = 0x1.ep127f;  // narrow moments saturate here
constexpr uint32_t kExponents = 0x7F800000u;  // of a float32
constexpr uint32_t kSmallestUnit = 1u << 23;  // the bits of 2^-126
template <bool SIGNED>
constexpr int kDoublings = SIGNED ? 14 : 30;  // the largest k of m 2^k unit
static_assert(kBlock == 32 * kDenseVector, "a block is a warp's vectors");

// Code I of four, a float by itself: sign, exponent and 3 bits, moved to where a float32 has them,
// are the value by 2^-129, subnormal or not. All products are exact.
template <int I, bool SIGNED>
APOLLO_DEVICE float decode(uint32_t codes, float unit) {
  const uint32_t top = __byte_perm(codes, 0u, I << 12 | 0x444);  // the code as the highest byte
  const uint32_t bits = SIGNED ? uint32_t(int32_t(top) >> 4) & 0x87FFFFFFu : top >> 4;
  return __uint_as_float(bits) * 0x1p126f * (8.0f * unit);
}

// The unit where it still suits a block that reaches to `highest`, rounded up too, else a new one;
// both as their bits, which for numbers from 0 on are in the numbers' order. So no code has to be
// cut to the largest.
template <bool SIGNED>
APOLLO_DEVICE uint32_t renewed_unit(uint32_t unit, uint32_t highest) {
  constexpr int kLast = kDoublings<SIGNED>;
  const int exponent = int((highest + (1u << 20)) >> 23) - 3 - kLast;
  const uint32_t fresh = uint32_t(exponent < 1 ? 1 : exponent) << 23;
  unit = unit < kSmallestUnit ? kSmallestUnit : unit;
  const uint32_t largest = unit + ((3u + kLast) << 23 | 7u << 20);  // 15 2^k of it
  return highest <= largest && fresh + (1u << 23) >= unit ? unit : fresh;
}

// The code of x; `inverse`: 1 / unit, `random`: 16 bits, less `kPlace`. A sum of two floats rounds
// y / 2^k to nearest at 2^-16, whole numbers do the rest. A V above 0 never becomes 0.
constexpr uint32_t kPlace = (130u << 3) << 16;  // what the exponent of 8 adds to a code
template <bool SIGNED>
APOLLO_DEVICE uint32_t encode(float x, float inverse, uint32_t random) {
  const float y = fabsf(x) * inverse;
  const uint32_t own = __float_as_uint(y) & kExponents;
  const uint32_t doubled = own < 130u << 23 ? 130u << 23 : own;  // the bits of 8 2^k
  const uint32_t large = doubled + (4u << 23 | 1u << 22);        // of 192 2^k
  const uint32_t sum = __float_as_uint(y + __uint_as_float(large)) - large + random;
  const uint32_t code = uint32_t(int32_t(sum) >> 16) + (doubled >> 20);
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
        call(uint64_t(p.first + begin) / 4) {
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

// M and V as they are, or in bf16.
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
      uint32_t m_bits[N], v_bits[N];
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float within = fminf(fmaxf(mm[e], -kLargestMoment), kLargestMoment);
        m_bits[e] = __float_as_uint(within) + (drawn.w[e] & 0xFFFFu);
        v_bits[e] = __float_as_uint(fminf(vv[e], kLargestMoment)) + (drawn.w[e] >> 16);
      }
      keep_upper(m, m_bits);
      keep_upper(v, v_bits);
    } else {
      m.set(mm);
      v.set(vv);
    }
  }
  APOLLO_DEVICE void store(const MomentPlaces<M>& at, int i, int n, bool wide) {
    m.store(at.exp_avg + i, n, wide);
    v.store(at.exp_avg_sq + i, n, wide);
  }

 private:
  APOLLO_DEVICE static void keep_upper(Pack<M, N>& pack, const uint32_t (&bits)[N]) {
    uint32_t pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) pairs[i] = __byte_perm(bits[2 * i], bits[2 * i + 1], 0x7632);
    memcpy(pack.words, pairs, sizeof pairs);
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
    decode_all<true>(mm, m.words[0], m_unit);
    decode_all<false>(vv, v.words[0], v_unit);
  }
  APOLLO_DEVICE void set(const MomentPlaces<int8_code>& at, int i, int n, float (&mm)[N],
                         float (&vv)[N]) {
    const Words drawn = at.words(i);
    const bool first = i % kBlock == 0 && n > 0;  // the lane that stores a new unit
    m.words[0] = encode_all<true>(mm, m_unit, drawn, first, at.exp_avg_unit + i / kBlock);
    v.words[0] = encode_all<false>(vv, v_unit, drawn, first, at.exp_avg_sq_unit + i / kBlock);
  }
  APOLLO_DEVICE void store(const MomentPlaces<int8_code>& at, int i, int n, bool wide) {
    m.store(at.exp_avg + i, n, wide);
    v.store(at.exp_avg_sq + i, n, wide);
  }

 private:
  template <bool SIGNED>
  APOLLO_DEVICE static void decode_all(float (&x)[N], uint32_t codes, float unit) {
    x[0] = decode<0, SIGNED>(codes, unit);
    x[1] = decode<1, SIGNED>(codes, unit);
    x[2] = decode<2, SIGNED>(codes, unit);
    x[3] = decode<3, SIGNED>(codes, unit);
  }
  template <bool SIGNED>
  APOLLO_DEVICE static uint32_t encode_all(float (&x)[N], float unit, const Words& drawn,
                                           bool first, float* unit_gmem) {
    float own = 0.0f;
#pragma unroll
    for (int e = 0; e < N; ++e) own = fmaxf(own, fabsf(x[e]));
    uint32_t highest = __reduce_max_sync(0xFFFFFFFFu, __float_as_uint(own));
    if (highest > __float_as_uint(kLargestMoment)) {
      highest = __float_as_uint(kLargestMoment);
#pragma unroll
      for (int e = 0; e < N; ++e) x[e] = fminf(fmaxf(x[e], -kLargestMoment), kLargestMoment);
    }
    const uint32_t next = renewed_unit<SIGNED>(__float_as_uint(unit), highest);
    if (first && next != __float_as_uint(unit)) *global(unit_gmem) = __uint_as_float(next);
    const float inverse = __uint_as_float((254u << 23) - next);  // of a power of two
    uint32_t codes[N];
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const uint32_t random = SIGNED ? drawn.w[e] & 0xFFFFu : drawn.w[e] >> 16;
      codes[e] = encode<SIGNED>(x[e], inverse, random - kPlace);
    }
    return __byte_perm(__byte_perm(codes[0], codes[1], 0x0040),
                       __byte_perm(codes[2], codes[3], 0x0040), 0x5410);
  }
};

}  // namespace apollo
