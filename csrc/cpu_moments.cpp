#include "cpu_moments.h"

#include "cpu_element.h"

#if APOLLO_CPU_PASSES

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu_parallel.h"

namespace apollo {
namespace {

constexpr float kTiny = 1e-8f;  // batch.py's TINY

// Squared norms of R and N, over one channel or one stretch of the matrix. float64, so that they
// pass the range of float32 where their roots do not.
struct Squares {
  double r, n;
};

// 16 float32 squares, summed in eight lanes of float64.
APOLLO_AVX512 inline __m512d add_squares(__m512d sum, __m512 x) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  const __m512d high =
      _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
  return _mm512_fmadd_pd(high, high, _mm512_fmadd_pd(low, low, sum));
}

// M = b1 M + (1 - b1) R and V = b2 V + (1 - b2) R^2 for entries [begin, end) of the matrix. An
// entry whose R^2 is not finite keeps both. N = M / (sqrt(V) + eps), 0 where that divides by 0.
APOLLO_AVX512 Squares update(const CpuMoments& a, int64_t begin, int64_t end) {
  const __m512 beta1 = _mm512_set1_ps(float(a.beta1)), beta2 = _mm512_set1_ps(float(a.beta2));
  const __m512 new1 = _mm512_set1_ps(float(1 - a.beta1));
  const __m512 new2 = _mm512_set1_ps(float(1 - a.beta2));
  const __m512 eps = _mm512_set1_ps(float(a.eps)), factor = _mm512_set1_ps(a.factor);
  const __m512 infinity = _mm512_set1_ps(std::numeric_limits<float>::infinity());
  __m512d r_sum = _mm512_setzero_pd(), n_sum = _mm512_setzero_pd();
  for (int64_t i = begin; i < end; i += kLanes) {
    const __mmask16 mask = mask16(end - i);
    prefetch(a.m + i);
    prefetch(a.v + i);
    const __m512 r = _mm512_mul_ps(Float32::load(a.r + i, mask), factor);
    const __m512 square = _mm512_mul_ps(r, r);
    const __mmask16 finite = _mm512_cmp_ps_mask(square, infinity, _CMP_LT_OQ);
    __m512 m = Float32::load(a.m + i, mask), v = Float32::load(a.v + i, mask);
    m = _mm512_mask_mov_ps(m, finite, _mm512_fmadd_ps(beta1, m, _mm512_mul_ps(new1, r)));
    v = _mm512_mask_mov_ps(v, finite, _mm512_fmadd_ps(beta2, v, _mm512_mul_ps(new2, square)));
    Float32::store(a.m + i, mask, m);
    Float32::store(a.v + i, mask, v);
    const __m512 divisor = _mm512_add_ps(_mm512_sqrt_ps(v), eps);
    const __mmask16 divides =
        _mm512_mask_cmp_ps_mask(mask, divisor, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    r_sum = add_squares(r_sum, r);
    n_sum = add_squares(n_sum, _mm512_maskz_div_ps(divides, m, divisor));
  }
  return {_mm512_reduce_add_pd(r_sum), _mm512_reduce_add_pd(n_sum)};
}

float ratio(const Squares& squares) {
  return float(std::sqrt(squares.n)) / (float(std::sqrt(squares.r)) + kTiny);
}

}  // namespace

void cpu_scale_channels(const CpuMoments& a) {
  for (int64_t c = 0; c < a.channels; ++c) {
    a.s[c] = ratio(update(a, c * a.rank, (c + 1) * a.rank));
  }
}

float cpu_square_norm(const CpuMoments& a) {
  double norm = 0;
  for (int64_t c = 0; c < a.channels; ++c) {
    const float s = a.s[a.per_channel ? c : 0];
    const float q = a.q[c] * a.factor * a.factor;  // a float32 factor^2 may be 0
    norm += double(s * s * q);
  }
  return float(norm);
}

float cpu_scale(const CpuMoments& a, int threads) {
  const int64_t size = a.channels * a.rank;
  if (size < (1 << 15)) threads = 1;  // a thread costs microseconds
  if (a.per_channel) {
    parallel(a.channels, std::max<int64_t>(1, 4096 / a.rank), threads,
             [&a](int64_t begin, int64_t end) {
               CpuMoments some = a;
               some.r += begin * a.rank, some.m += begin * a.rank, some.v += begin * a.rank;
               some.s += begin, some.channels = end - begin;
               cpu_scale_channels(some);
             });
    return cpu_square_norm(a);
  }
  // Stretches do not depend on the number of threads, and are added up in their order.
  constexpr int64_t kStretch = 4096;
  const int64_t count = (size + kStretch - 1) / kStretch;
  std::vector<Squares> squares(static_cast<size_t>(count));
  parallel(count, 1, threads, [&a, &squares, size](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      squares[size_t(i)] = update(a, i * kStretch, std::min(size, (i + 1) * kStretch));
    }
  });
  Squares all{0, 0};
  for (const Squares& part : squares) all.r += part.r, all.n += part.n;
  a.s[0] = ratio(all);
  return cpu_square_norm(a);
}

}  // namespace apollo

#else

namespace apollo {
float cpu_scale(const CpuMoments&, int) { return 0; }
void cpu_scale_channels(const CpuMoments&) {}
float cpu_square_norm(const CpuMoments&) { return 0; }
}  // namespace apollo

#endif
