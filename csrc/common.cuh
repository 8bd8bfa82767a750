// Packs of 8 elements, conversions, sums over a block, and the formulas that kernels share.
#pragma once

#include <type_traits>

#include "apollo.h"
#include "device.h"
#include "keep.h"

namespace apollo {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
struct int8_code {  // nothing without the grid of a weight, or the unit of moments
  uint8_t bits;
};

template <class T>
constexpr Dtype kDtypeOf = kFloat32;
template <>
constexpr Dtype kDtypeOf<bfloat16> = kBfloat16;
template <>
constexpr Dtype kDtypeOf<float16> = kFloat16;
template <>
constexpr Dtype kDtypeOf<int8_code> = kInt8;

APOLLO_DEVICE float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
APOLLO_DEVICE float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

APOLLO_DEVICE float to_float(float x) { return x; }
APOLLO_DEVICE float to_float(bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
APOLLO_DEVICE float to_float(float16 x) { return half_to_float(x.bits); }
APOLLO_DEVICE void from_float(float x, float& to) { to = x; }
APOLLO_DEVICE void from_float(float x, bfloat16& to) { to.bits = uint16_t(pack_bf16(x, 0.0f)); }
APOLLO_DEVICE void from_float(float x, float16& to) { to.bits = float_to_half(x); }

// N neighbours, in accesses of 16 bytes each or, where they fill no more, in one of 8 or 4.
template <class T, int N>
struct Pack {
  static constexpr int kBytes = N * int(sizeof(T));
  using Word =
      std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 8, uint2, uint4>>;
  static constexpr int kWords = kBytes / int(sizeof(Word));
  Word words[kWords];

  // All of them; the address is a multiple of a word.
  APOLLO_DEVICE void load(const T* from) {
    for (int i = 0; i < kWords; ++i) load_word(words[i], reinterpret_cast<const Word*>(from) + i);
  }
  APOLLO_DEVICE void store(T* to) const {
    for (int i = 0; i < kWords; ++i) store_word(reinterpret_cast<Word*>(to) + i, words[i]);
  }
  // At most n of them, zeros beyond; `wide`: the address is a multiple of a word.
  APOLLO_DEVICE void load(const T* from, int64_t n, bool wide) {
    if (wide && n >= N) {
      load(from);
      return;
    }
    T values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = i < n ? from[i] : T{};
    memcpy(words, values, sizeof words);
  }
  APOLLO_DEVICE void store(T* to, int64_t n, bool wide) const {
    if (wide && n >= N) {
      store(to);
      return;
    }
    T values[N];
    memcpy(values, words, sizeof words);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < n) to[i] = values[i];
    }
  }
  APOLLO_DEVICE void get(float (&x)[N]) const {
    if constexpr (kDtypeOf<T> == kBfloat16) {  // one instruction each
      uint32_t pairs[N / 2];
      memcpy(pairs, words, sizeof words);
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = i % 2 ? high_bf16(pairs[i / 2]) : low_bf16(pairs[i / 2]);
    } else {
      T values[N];
      memcpy(values, words, sizeof words);
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = to_float(values[i]);
    }
  }
  APOLLO_DEVICE void set(const float (&x)[N]) {
    if constexpr (kDtypeOf<T> == kBfloat16) {  // one for two
      uint32_t pairs[N / 2];
#pragma unroll
      for (int i = 0; i < N / 2; ++i) pairs[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
      memcpy(words, pairs, sizeof words);
    } else {
      T values[N];
#pragma unroll
      for (int i = 0; i < N; ++i) from_float(x[i], values[i]);
      memcpy(words, values, sizeof words);
    }
  }
};
template <class T>
using Pack8 = Pack<T, 8>;

template <class T>
APOLLO_DEVICE bool aligned16(const T* base, int64_t ld) {
  return ((reinterpret_cast<uintptr_t>(base) | uintptr_t(ld * int64_t(sizeof(T)))) & 15) == 0;
}

// Whether rows `ld` apart all begin at a multiple of N elements.
template <int N, class T>
APOLLO_DEVICE bool aligned(const T* base, int64_t ld) {
  constexpr uintptr_t kBytes = N * sizeof(T);
  return ((reinterpret_cast<uintptr_t>(base) | uintptr_t(ld * int64_t(sizeof(T)))) % kBytes) == 0;
}

// The sum over a block of 256 threads, the same bits in every thread and every run. In float64,
// since squares of tensors beyond float32's range have finite quotients.
APOLLO_DEVICE double block_sum(double x, double* shared8) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
  if (threadIdx.x % 32 == 0) shared8[threadIdx.x / 32] = x;
  __syncthreads();  // the warps' sums are there
  double sum = 0.0;
  for (int i = 0; i < 8; ++i) sum += shared8[i];
  __syncthreads();  // and were read before the next sum overwrites them
  return sum;
}

// The matrix that this block works on.
APOLLO_DEVICE const Matrix& matrix_of(const Launch& launch) {
  return static_cast<const Matrix*>(launch.table)[launch.map[blockIdx.x]];
}

APOLLO_DEVICE bool by_row(const Matrix& p) { return (p.flags & kByRow) != 0; }
APOLLO_DEVICE bool summed(const Matrix& p) { return (p.flags & kSummed) != 0; }

APOLLO_DEVICE Record& record_of(const Launch& launch, int64_t matrix) {
  return reinterpret_cast<Record*>(launch.workspace)[matrix];
}

// Where a block of `project` puts its q [channels] and, if summed, a chunk's R [channels, rank].
APOLLO_DEVICE float* q_of(const Matrix& p, const Launch& launch, int64_t row) {
  return launch.workspace + p.q + row * p.channels;
}
APOLLO_DEVICE float* r_of(const Matrix& p, const Launch& launch, int64_t chunk) {
  return launch.workspace + p.r + chunk * p.channels * p.rank;
}

constexpr float kLeastNormal = 0x1p-126f;  // of float32

APOLLO_DEVICE bool finite(float x) { return fabsf(x) < INFINITY; }

APOLLO_DEVICE bool skipped(const Hyper& h) {
  return h.found_inf != nullptr && *h.found_inf != 0.0f;
}

// What gradients are multiplied by: in `project`, and from `scale` on, where clip is known too.
APOLLO_DEVICE float sign_and_scale(const Hyper& h) {
  const float sign = h.maximize ? -1.0f : 1.0f;
  return h.grad_scale == nullptr ? sign : sign / *h.grad_scale;
}
APOLLO_DEVICE float clip_factor(const Hyper& h) { return h.clip == nullptr ? 1.0f : *h.clip; }

APOLLO_DEVICE double learning_rate(const Hyper& h) {
  return h.lr_tensor == nullptr ? h.lr : double(*h.lr_tensor);
}

// 1 - beta^t; expm1, since powf in float32 is off by 1e-5.
APOLLO_DEVICE double one_minus_power(double beta, double t) {
  return beta > 0.0 ? -expm1(t * log(beta)) : 1.0;
}

// lr times Adam's bias correction at step t.
APOLLO_DEVICE double step_size(const Hyper& h, double t) {
  const double lr = learning_rate(h);
  if (!h.correct_bias) return lr;
  return lr * (sqrt(one_minus_power(h.beta2, t)) / one_minus_power(h.beta1, t));
}

APOLLO_DEVICE Keep keep_of(const Hyper& h) {
  return Keep::after(learning_rate(h) * h.weight_decay);
}

// Adam's moments of one entry whose square is finite.
APOLLO_DEVICE void mix_moments(float r, float& m, float& v, const Hyper& h) {
  m = fmaf(h.beta1_float, m, h.keep1 * r);  // never m + (1 - b1) (r - m): m may be far larger
  v = fmaf(h.beta2_float, v, h.keep2 * (r * r));
}
// It keeps them if its square is not.
APOLLO_DEVICE bool update_moments(float r, float& m, float& v, const Hyper& h) {
  const bool ok = finite(r * r);
  float next_m = m, next_v = v;
  mix_moments(r, next_m, next_v, h);
  m = ok ? next_m : m;  // no branch in the epilogue of `project`
  v = ok ? next_v : v;
  return ok;
}

// N = M / (sqrt(V) + eps), and 0 where nothing has come yet and eps is 0. The approximations err by
// 2^-23 each, as much as one rounding, where float32 is normal: sqrt takes subnormals, too, and its
// smallest root but 0 is 4e-23, so the sum is normal, or 0, for any eps that is.
APOLLO_DEVICE float normalized(float m, float v, const Hyper& h) {
  const float denominator = approx_root(v) + h.eps;
  return denominator < kLeastNormal ? 0.0f : m * approx_reciprocal(denominator);
}

}  // namespace apollo
