#include "cpu_bf16.h"

#if defined(__x86_64__) && !defined(_WIN32) && (defined(__clang__) || __GNUC__ >= 10)

#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "cpu_parallel.h"

#define APOLLO_AVX512 __attribute__((target("avx512f,avx512bw,avx512bf16,fma")))

namespace apollo {
namespace {

APOLLO_AVX512 inline __m512bh as_bf16(__m512i bits) { return reinterpret_cast<__m512bh>(bits); }

APOLLO_AVX512 inline uint32_t pair_at(const uint16_t* x, bool second) {
  uint32_t pair = x[0];
  if (second) std::memcpy(&pair, x, sizeof pair);
  return pair;
}

APOLLO_AVX512 inline __mmask32 mask32(int64_t n) {
  return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
}

// A tile of M contiguous channels and 16 N rank rows, held in registers.
template <int M, int N>
APOLLO_AVX512 void row_tile(const CpuBf16& a, int64_t c, int64_t j) {
  __m512 sums[M][N];
  for (auto& row : sums) {
    for (auto& sum : row) sum = _mm512_setzero_ps();
  }
  const uint16_t* x = a.x + c * a.ld;
  for (int64_t k = 0; k < a.k; k += 2) {
    __m512bh z[N];
    for (int n = 0; n < N; ++n) {
      z[n] = as_bf16(_mm512_loadu_si512(a.z + k * a.padded + 2 * (j + 16 * n)));
    }
    for (int m = 0; m < M; ++m) {
      const __m512bh v = as_bf16(_mm512_set1_epi32(pair_at(x + m * a.ld + k, k + 1 < a.k)));
      for (int n = 0; n < N; ++n) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], v, z[n]);
    }
  }
  const __m512 scale = _mm512_set1_ps(a.scale);
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      const int64_t first = j + 16 * n, left = std::min<int64_t>(16, a.rank - first);
      if (left <= 0) break;
      _mm512_mask_storeu_ps(a.r + (c + m) * a.rank + first, __mmask16((1u << left) - 1),
                            _mm512_mul_ps(sums[m][n], scale));
    }
  }
}

template <int M>
APOLLO_AVX512 void row_tiles(const CpuBf16& a, int64_t c) {
  int64_t j = 0;
  for (; j + 64 <= a.padded; j += 64) row_tile<M, 4>(a, c, j);
  for (; j < a.padded; j += 16) row_tile<M, 1>(a, c, j);
}

APOLLO_AVX512 void row_square(const CpuBf16& a, int64_t c) {
  const uint16_t* x = a.x + c * a.ld;
  __m512 square = _mm512_setzero_ps();
  for (int64_t k = 0; k < a.k; k += 32) {
    const __m512bh v = as_bf16(_mm512_maskz_loadu_epi16(mask32(a.k - k), x + k));
    square = _mm512_dpbf16_ps(square, v, v);
  }
  a.q[c] = _mm512_reduce_add_ps(square);
}

APOLLO_AVX512 void project_rows(const CpuBf16& a, int64_t begin, int64_t end) {
  int64_t c = begin;
  for (; c + 6 <= end; c += 6) row_tiles<6>(a, c);
  for (; c < end; ++c) row_tiles<1>(a, c);
  for (c = begin; c < end; ++c) row_square(a, c);
}

// 32 neighbouring columns (the channels), pairs of k interleaved: [(k + 1) / 2][2] vectors of 16
// pairs. Packed once, since every rank row reads them again and rows of x are pages apart.
APOLLO_AVX512 void pack_columns(const CpuBf16& a, int64_t c, const __m512i order[2],
                                __m512i* panel) {
  const __mmask32 mask = mask32(a.channels - c);
  __m512 square[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t k = 0; k < a.k; k += 2) {
    const uint16_t* x = a.x + k * a.ld + c;
    const __m512i even = _mm512_maskz_loadu_epi16(mask, x);
    const __m512i odd =
        k + 1 < a.k ? _mm512_maskz_loadu_epi16(mask, x + a.ld) : _mm512_setzero_si512();
    for (int i = 0; i < 2; ++i) {
      panel[k + i] = _mm512_permutex2var_epi16(even, order[i], odd);
      square[i] = _mm512_dpbf16_ps(square[i], as_bf16(panel[k + i]), as_bf16(panel[k + i]));
    }
  }
  float lanes[32];
  for (int i = 0; i < 2; ++i) _mm512_storeu_ps(lanes + 16 * i, square[i]);
  std::copy(lanes, lanes + std::min<int64_t>(32, a.channels - c), a.q + c);
}

// A tile of one panel and J rank rows, held in registers.
template <int J>
APOLLO_AVX512 void column_tile(const CpuBf16& a, int64_t c, int64_t j, const __m512i* panel) {
  __m512 sums[J][2];
  for (auto& pair : sums) pair[0] = pair[1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < a.k; k += 2) {
    const __m512bh v[2] = {as_bf16(panel[k]), as_bf16(panel[k + 1])};
    for (int n = 0; n < J; ++n) {
      uint32_t pair;
      std::memcpy(&pair, a.z + k * a.padded + 2 * (j + n), sizeof pair);
      const __m512bh z = as_bf16(_mm512_set1_epi32(int32_t(pair)));
      for (int i = 0; i < 2; ++i) sums[n][i] = _mm512_dpbf16_ps(sums[n][i], v[i], z);
    }
  }
  const int64_t count = std::min<int64_t>(32, a.channels - c);
  float lanes[J][32];
  for (int n = 0; n < J; ++n) {
    for (int i = 0; i < 2; ++i) _mm512_storeu_ps(lanes[n] + 16 * i, sums[n][i]);
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int n = 0; n < J; ++n) a.r[(c + i) * a.rank + j + n] = a.scale * lanes[n][i];
  }
}

APOLLO_AVX512 void project_columns(const CpuBf16& a, int64_t begin, int64_t end) {
  uint16_t interleave[2][32];  // two rows of x: even k below, odd k above
  for (int i = 0; i < 32; ++i) {
    for (int half = 0; half < 2; ++half) {
      interleave[half][i] = uint16_t(32 * (i % 2) + 16 * half + i / 2);
    }
  }
  const __m512i order[2] = {_mm512_loadu_si512(interleave[0]), _mm512_loadu_si512(interleave[1])};
  const size_t size = size_t(a.k + 1) / 2 * 2;
  const std::unique_ptr<void, decltype(&std::free)> memory(
      std::aligned_alloc(64, size * sizeof(__m512i)), &std::free);
  if (memory == nullptr) throw std::bad_alloc();
  auto* panel = static_cast<__m512i*>(memory.get());
  for (int64_t c = begin; c < end; c += 32) {
    pack_columns(a, c, order, panel);
    int64_t j = 0;
    for (; j + 12 <= a.rank; j += 12) column_tile<12>(a, c, j, panel);
    for (; j + 4 <= a.rank; j += 4) column_tile<4>(a, c, j, panel);
    for (; j < a.rank; ++j) column_tile<1>(a, c, j, panel);
  }
}

}  // namespace

bool cpu_bf16_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512bf16");
}

void cpu_project_bf16(const CpuBf16& a, int threads) {
  if (a.channels * a.k * (a.rank + 8) < (1 << 20)) threads = 1;  // a thread costs microseconds
  parallel(a.channels, a.rows ? 6 : 32, threads, [&a](int64_t begin, int64_t end) {
    a.rows ? project_rows(a, begin, end) : project_columns(a, begin, end);
  });
}

}  // namespace apollo

#else  // another processor, or a compiler too old for the intrinsics: PyTorch runs instead

namespace apollo {
bool cpu_bf16_supported() { return false; }
void cpu_project_bf16(const CpuBf16&, int) {}
}  // namespace apollo

#endif
