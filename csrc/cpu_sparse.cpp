#include "cpu_sparse.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)

#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "cpu_parallel.h"

#define APOLLO_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,fma")))

namespace apollo {
namespace {

constexpr uint32_t kMinus = 0x80000000u;
constexpr int64_t kLanes = 16;

struct Float32 {
  using Stored = float;
  APOLLO_AVX512 static __m512 load(const float* x, __mmask16 mask) {
    return _mm512_maskz_loadu_ps(mask, x);
  }
};

struct Bfloat16 {
  using Stored = uint16_t;
  APOLLO_AVX512 static __m512 load(const uint16_t* x, __mmask16 mask) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
};

struct Float16 {
  using Stored = uint16_t;
  APOLLO_AVX512 static __m512 load(const uint16_t* x, __mmask16 mask) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x));
  }
};

APOLLO_AVX512 inline __mmask16 mask16(int64_t n) {
  return n >= kLanes ? __mmask16(0xFFFF) : __mmask16((1u << n) - 1);
}

APOLLO_AVX512 inline __m512 with_sign(__m512 x, __m512i sign) {
  return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), sign));
}

// Adds x, or minus x, to 16 sums in memory.
APOLLO_AVX512 inline void add(float* sums, __m512 x) {
  _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), x));
}

// M contiguous channels. A block of `rank` columns is at most two stretches of R, and inside of
// each 8 places are swapped alike (DESIGN.md, "Random numbers"), so its first column says
// everything. Lanes beyond a stretch hold zeros, and may be added to whatever is there.
template <class Element, int M>
APOLLO_AVX512 void project_rows(const CpuSparse& a, int64_t c, float* sums, int64_t width) {
  const auto* x = static_cast<const typename Element::Stored*>(a.x) + c * a.ld;
  std::fill(sums, sums + M * width, 0.0f);
  __m512 square[M];
  for (auto& lanes : square) lanes = _mm512_setzero_ps();
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i minus = _mm512_set1_epi32(int32_t(kMinus));
  for (int64_t block = 0; block < a.k; block += a.rank) {
    const int64_t size = std::min(a.rank, a.k - block);
    const int64_t first = a.places[block] & ~kMinus;
    const int64_t turn = a.rank % 8 == 0 ? first % 8 : 0, start = first - turn;
    const __m512i swapped = _mm512_xor_si512(lane, _mm512_set1_epi32(int32_t(turn)));
    const int64_t wrap = std::min(size, a.rank - start);
    const int64_t stretches[2][3] = {{0, wrap, start}, {wrap, size, 0}};
    for (const auto& [begin, end, start_row] : stretches) {
      for (int64_t i = begin, row = start_row; i < end; i += kLanes, row += kLanes) {
        const __mmask16 mask = mask16(end - i);
        const __m512i places = _mm512_maskz_loadu_epi32(mask, a.places + block + i);
        const __m512i sign = _mm512_and_si512(places, minus);
        for (int m = 0; m < M; ++m) {
          const __m512 v = Element::load(x + m * a.ld + block + i, mask);
          square[m] = _mm512_fmadd_ps(v, v, square[m]);
          add(sums + m * width + row, _mm512_permutexvar_ps(swapped, with_sign(v, sign)));
        }
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    std::copy(sums + m * width, sums + m * width + a.rank, a.r + (c + m) * a.rank);
    a.q[c + m] = _mm512_reduce_add_ps(square[m]);
  }
}

template <class Element>
APOLLO_AVX512 void all_rows(const CpuSparse& a, int64_t begin, int64_t end) {
  const int64_t width = a.rank + kLanes;
  std::vector<float> sums(static_cast<size_t>(4 * width));
  int64_t c = begin;
  for (; c + 4 <= end; c += 4) project_rows<Element, 4>(a, c, sums.data(), width);
  for (; c < end; ++c) project_rows<Element, 1>(a, c, sums.data(), width);
}

// COUNT rows of x from k on, for `size` neighbouring channels: each is added to its row of sums.
template <class Element, int COUNT>
APOLLO_AVX512 void add_columns(const CpuSparse& a, int64_t c, int64_t size, int64_t k, float* sums,
                               int64_t width, float* squares) {
  const auto* x = static_cast<const typename Element::Stored*>(a.x) + k * a.ld + c;
  float* row[COUNT];
  __m512i sign[COUNT];
  for (int n = 0; n < COUNT; ++n) {
    row[n] = sums + int64_t(a.places[k + n] & ~kMinus) * width;
    sign[n] = _mm512_set1_epi32(int32_t(a.places[k + n] & kMinus));
  }
  for (int64_t i = 0; i < size; i += kLanes) {
    const __mmask16 mask = mask16(size - i);
    __m512 square = _mm512_loadu_ps(squares + i);
    for (int n = 0; n < COUNT; ++n) {
      const __m512 v = Element::load(x + n * a.ld + i, mask);
      square = _mm512_fmadd_ps(v, v, square);
      add(row[n] + i, with_sign(v, sign[n]));
    }
    _mm512_storeu_ps(squares + i, square);
  }
}

// Neighbouring columns are channels: as many at a time as keep their sums, [rank, width], in the
// second cache, for rows of x are pages apart and should be read in long runs.
template <class Element>
APOLLO_AVX512 void all_columns(const CpuSparse& a, int64_t begin, int64_t end) {
  const int64_t most = std::max<int64_t>(64, std::min<int64_t>(1024, 65536 / a.rank) / 16 * 16);
  const int64_t span = std::min(most, (end - begin + kLanes - 1) / kLanes * kLanes);
  const int64_t width = span + kLanes;  // no power of two, so that rows spread over the cache
  std::vector<float> sums(static_cast<size_t>(a.rank * width));
  std::vector<float> squares(static_cast<size_t>(span));
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i down = _mm512_mullo_epi32(lane, _mm512_set1_epi32(int32_t(width)));
  for (int64_t c = begin; c < end; c += span) {
    const int64_t size = std::min(span, end - c);
    std::fill(sums.begin(), sums.end(), 0.0f);
    std::fill(squares.begin(), squares.end(), 0.0f);
    int64_t k = 0;
    for (; k + 4 <= a.k; k += 4) {
      add_columns<Element, 4>(a, c, size, k, sums.data(), width, squares.data());
    }
    for (; k < a.k; ++k) {
      add_columns<Element, 1>(a, c, size, k, sums.data(), width, squares.data());
    }
    std::copy(squares.begin(), squares.begin() + size, a.q + c);
    for (int64_t j = 0; j < a.rank; j += kLanes) {
      const __mmask16 mask = mask16(a.rank - j);
      for (int64_t i = 0; i < size; ++i) {
        const __m512 rows = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, down,
                                                     sums.data() + j * width + i, sizeof(float));
        _mm512_mask_storeu_ps(a.r + (c + i) * a.rank + j, mask, rows);
      }
    }
  }
}

template <class Element>
void project(const CpuSparse& a, int threads) {
  parallel(a.channels, a.rows ? 4 : 64, threads, [&a](int64_t begin, int64_t end) {
    a.rows ? all_rows<Element>(a, begin, end) : all_columns<Element>(a, begin, end);
  });
}

}  // namespace

bool cpu_sparse_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl");
}

void cpu_project_sparse(const CpuSparse& a, int threads) {
  if (a.channels * a.k < (1 << 17)) threads = 1;  // a thread costs microseconds
  switch (a.element) {
    case CpuElement::kFloat32:
      return project<Float32>(a, threads);
    case CpuElement::kBfloat16:
      return project<Bfloat16>(a, threads);
    case CpuElement::kFloat16:
      return project<Float16>(a, threads);
  }
}

}  // namespace apollo

#else  // another processor, or a compiler too old for the intrinsics: PyTorch runs instead

namespace apollo {
bool cpu_sparse_supported() { return false; }
void cpu_project_sparse(const CpuSparse&, int) {}
}  // namespace apollo

#endif
