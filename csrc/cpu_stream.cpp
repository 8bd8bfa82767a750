#include "cpu_stream.h"

#if APOLLO_CPU_PASSES

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu_parallel.h"
#include "keep.h"

namespace apollo {
namespace {

// M contiguous channels: their RANK dot products with z and their squared norms.
template <class Element, int RANK, int M>
APOLLO_AVX512 void project_rows(const CpuThin& a, int64_t c) {
  const auto* x = static_cast<const typename Element::Stored*>(a.x) + c * a.ld;
  __m512 sums[M][RANK + 1];  // the last one is the square
  for (auto& row : sums) {
    for (auto& sum : row) sum = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < a.k; k += kLanes) {
    const __mmask16 mask = mask16(a.k - k);
    __m512 z[RANK + 1];
    for (int j = 0; j < RANK; ++j) z[j] = Bfloat16::load(a.z + j * a.k + k, mask);
    for (int m = 0; m < M; ++m) {
      prefetch(x + m * a.ld + k);
      const __m512 v = Element::load(x + m * a.ld + k, mask);
      for (int j = 0; j < RANK; ++j) sums[m][j] = _mm512_fmadd_ps(v, z[j], sums[m][j]);
      sums[m][RANK] = _mm512_fmadd_ps(v, v, sums[m][RANK]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int j = 0; j < RANK; ++j) {
      a.r[(c + m) * RANK + j] = a.scale * _mm512_reduce_add_ps(sums[m][j]);
    }
    a.q[c + m] = _mm512_reduce_add_ps(sums[m][RANK]);
  }
}

template <class Element, int RANK>
void all_rows(const CpuThin& a, int64_t begin, int64_t end) {
  constexpr int M = RANK < 6 ? 4 : 3;  // what the registers hold
  int64_t c = begin;
  for (; c + M <= end; c += M) project_rows<Element, RANK, M>(a, c);
  for (; c < end; ++c) project_rows<Element, RANK, 1>(a, c);
}

// COUNT rows of x from k on, for `size` neighbouring channels. sums [RANK + 1, width]: the last row
// holds the squares.
template <class Element, int RANK, int COUNT>
APOLLO_AVX512 void add_columns(const CpuThin& a, int64_t c, int64_t size, int64_t k, float* sums,
                               int64_t width) {
  const auto* x = static_cast<const typename Element::Stored*>(a.x) + k * a.ld + c;
  float z[RANK + 1][COUNT];
  for (int j = 0; j < RANK; ++j) {
    const __mmask16 mask = mask16(COUNT);
    _mm512_mask_storeu_ps(z[j], mask, Bfloat16::load(a.z + j * a.k + k, mask));
  }
  for (int64_t i = 0; i < size; i += kLanes) {
    const __mmask16 mask = mask16(size - i);
    __m512 lanes[RANK + 1];
    for (int j = 0; j <= RANK; ++j) lanes[j] = _mm512_loadu_ps(sums + j * width + i);
    for (int n = 0; n < COUNT; ++n) {
      prefetch(x + n * a.ld + i, COUNT * a.ld * int64_t(sizeof *x));
      const __m512 v = Element::load(x + n * a.ld + i, mask);
      for (int j = 0; j < RANK; ++j) {
        lanes[j] = _mm512_fmadd_ps(v, _mm512_set1_ps(z[j][n]), lanes[j]);
      }
      lanes[RANK] = _mm512_fmadd_ps(v, v, lanes[RANK]);
    }
    for (int j = 0; j <= RANK; ++j) _mm512_storeu_ps(sums + j * width + i, lanes[j]);
  }
}

// Neighbouring columns are channels: rows of x are pages apart, so they are read in long runs, and
// the sums wait in the first cache.
template <class Element, int RANK>
void all_columns(const CpuThin& a, int64_t begin, int64_t end) {
  constexpr int64_t kSpan = 1024, kCount = 8;
  std::vector<float> sums(size_t((RANK + 1) * kSpan));
  for (int64_t c = begin; c < end; c += kSpan) {
    const int64_t size = std::min(kSpan, end - c);
    std::fill(sums.begin(), sums.end(), 0.0f);
    int64_t k = 0;
    for (; k + kCount <= a.k; k += kCount) {
      add_columns<Element, RANK, kCount>(a, c, size, k, sums.data(), kSpan);
    }
    for (; k < a.k; ++k) add_columns<Element, RANK, 1>(a, c, size, k, sums.data(), kSpan);
    for (int64_t i = 0; i < size; ++i) {
      for (int j = 0; j < RANK; ++j) {
        a.r[(c + i) * RANK + j] = a.scale * sums[size_t(j * kSpan + i)];
      }
    }
    std::copy_n(sums.begin() + RANK * kSpan, size, a.q + c);
  }
}

using Pass = void (*)(const CpuThin&, int64_t, int64_t);

template <class Element, int... RANKS>
Pass pass_for(const CpuThin& a, std::integer_sequence<int, RANKS...>) {
  constexpr Pass rows[] = {all_rows<Element, RANKS>...};
  constexpr Pass columns[] = {all_columns<Element, RANKS>...};
  return (a.rows ? rows : columns)[a.rank];
}

// One row of W <- (1 - decay) W - coefficient X, all rounding at the store. Without decay the kept
// weight is the old one.
template <class Element, bool BY_ROW, bool DECAYS>
struct ApplyRow {
  typename Element::Stored* __restrict__ w;
  const typename Element::Stored* __restrict__ x;
  const float* __restrict__ coefficient;
  Keep keep;

  APOLLO_AVX512 inline void vector(int64_t k, __mmask16 mask) const {
    const __m512 high = _mm512_set1_ps(keep.high), low = _mm512_set1_ps(keep.low);
    prefetch(w + k);
    prefetch(x + k);
    const __m512 old = Element::load(w + k, mask);
    const __m512 kept = DECAYS ? _mm512_fmadd_ps(old, high, _mm512_mul_ps(old, low)) : old;
    const __m512 c = BY_ROW ? _mm512_set1_ps(*coefficient) : Float32::load(coefficient + k, mask);
    Element::store(w + k, mask, _mm512_fnmadd_ps(c, Element::load(x + k, mask), kept));
  }

  APOLLO_AVX512 void all(int64_t size) const {
    int64_t k = 0;
    for (; k + kLanes <= size; k += kLanes) vector(k, kAll);
    if (k < size) vector(k, mask16(size - k));
  }
};

template <class Element, bool BY_ROW, bool DECAYS>
void apply_rows(const CpuApply& a, Keep keep, int threads) {
  parallel(a.outer, 1, threads, [&a, keep](int64_t begin, int64_t end) {
    using Stored = typename Element::Stored;
    for (int64_t i = begin; i < end; ++i) {
      ApplyRow<Element, BY_ROW, DECAYS>{static_cast<Stored*>(a.w) + i * a.w_ld,
                                        static_cast<const Stored*>(a.x) + i * a.x_ld,
                                        a.coefficient + (BY_ROW ? i * a.apart : 0), keep}
          .all(a.inner);
    }
  });
}

template <class Element>
void apply(const CpuApply& a, int threads) {
  const Keep keep = Keep::after(a.decay);
  if (a.by_row) {
    a.decay != 0 ? apply_rows<Element, true, true>(a, keep, threads)
                 : apply_rows<Element, true, false>(a, keep, threads);
  } else {
    a.decay != 0 ? apply_rows<Element, false, true>(a, keep, threads)
                 : apply_rows<Element, false, false>(a, keep, threads);
  }
}

}  // namespace

bool cpu_supported() { return has_avx512(); }

void cpu_project_thin(const CpuThin& a, int threads) {
  if (a.channels * a.k < (1 << 17)) threads = 1;  // a thread costs microseconds
  with_element(a.element, [&a, threads](auto element) {
    const auto ranks = std::make_integer_sequence<int, kThinRank + 1>();
    const Pass pass = pass_for<decltype(element)>(a, ranks);
    parallel(a.channels, a.rows ? 4 : 64, threads,
             [&a, pass](int64_t begin, int64_t end) { pass(a, begin, end); });
  });
}

void cpu_apply(const CpuApply& a, int threads) {
  if (a.outer * a.inner < (1 << 17)) threads = 1;
  with_element(a.element, [&a, threads](auto element) { apply<decltype(element)>(a, threads); });
}

}  // namespace apollo

#else

namespace apollo {
bool cpu_supported() { return false; }
void cpu_project_thin(const CpuThin&, int) {}
void cpu_apply(const CpuApply&, int) {}
}  // namespace apollo

#endif
