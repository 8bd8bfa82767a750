#include "cpu_sparse.h"

#if APOLLO_CPU_PASSES

#include <algorithm>
#include <vector>

#include "cpu_parallel.h"

namespace apollo {
namespace {

constexpr uint32_t kMinus = 0x80000000u;

APOLLO_AVX512 inline __m512 with_sign(__m512 x, __m512i sign) {
  return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), sign));
}

// What 16 rows of R, from j on, take from one block of `rank` columns: a block is at most two
// stretches of R, and inside of each 8 places are swapped alike (DESIGN.md, "Random numbers"), so
// its first column says everything.
struct Share {
  float signs[kLanes];       // +-1 for each row
  int64_t k;                 // column of the first lane
  int32_t turn;              // lane l belongs to row j + (l xor turn)
  __mmask16 ahead, wrapped;  // lanes that lie from k on, and those that lie `rank` columns before
};

APOLLO_AVX512 inline __m512i swapped(int32_t turn) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_xor_si512(lane, _mm512_set1_epi32(turn));
}

APOLLO_AVX512 inline Share share_of(const CpuSparse& a, int64_t j, int64_t block) {
  const int64_t size = std::min(a.rank, a.k - block), first = a.places[block] & ~kMinus;
  const int64_t turn = a.rank % 8 == 0 ? first % 8 : 0, start = first - turn;
  const int64_t i = j >= start ? j - start : j - start + a.rank;  // in the block
  const __mmask16 own = mask16(a.rank - j), before_wrap = mask16(a.rank - i);
  const __mmask16 ahead = i < size ? __mmask16(mask16(size - i) & own) : __mmask16(0);
  const __mmask16 wrapped = __mmask16(mask16(a.rank - i + size) & ~before_wrap & own);
  const uint32_t* place = a.places + block + i;
  __m512i sign = _mm512_maskz_loadu_epi32(ahead, place);
  if (wrapped) sign = _mm512_mask_loadu_epi32(sign, wrapped, place - a.rank);
  sign = _mm512_and_si512(sign, _mm512_set1_epi32(int32_t(kMinus)));
  const __m512 signs = with_sign(_mm512_set1_ps(1), sign);
  Share share{{}, block + i, int32_t(turn), ahead, wrapped};
  _mm512_storeu_ps(share.signs, _mm512_permutexvar_ps(swapped(share.turn), signs));
  return share;
}

// Of all windows of 16 rows, and in each of all blocks.
std::vector<Share> all_shares(const CpuSparse& a) {
  std::vector<Share> shares;
  shares.reserve(size_t((a.rank + kLanes - 1) / kLanes * ((a.k + a.rank - 1) / a.rank)));
  for (int64_t j = 0; j < a.rank; j += kLanes) {
    for (int64_t block = 0; block < a.k; block += a.rank) shares.push_back(share_of(a, j, block));
  }
  return shares;
}

template <class Element, int M, bool WRAPS>
APOLLO_AVX512 inline void add_share(const CpuSparse& a, const Share& from,
                                    const typename Element::Stored* x, __m512* sums,
                                    __m512* squares) {
  const __m512i lanes = swapped(from.turn);
  const __m512 signs = _mm512_loadu_ps(from.signs);
  x += from.k;
  for (int m = 0; m < M; ++m, x += a.ld) {
    prefetch(x, M * a.ld * int64_t(sizeof *x));
    __m512 v = Element::load(x, from.ahead);
    if (WRAPS) v = _mm512_mask_mov_ps(v, from.wrapped, Element::load(x - a.rank, from.wrapped));
    squares[m] = _mm512_fmadd_ps(v, v, squares[m]);
    sums[m] = _mm512_fmadd_ps(_mm512_permutexvar_ps(lanes, v), signs, sums[m]);
  }
}

// M contiguous channels, 16 rows of R at a time, which gather what is theirs from every block.
template <class Element, int M>
APOLLO_AVX512 void project_rows(const CpuSparse& a, const Share* share, int64_t c) {
  const auto* x = static_cast<const typename Element::Stored*>(a.x) + c * a.ld;
  __m512 squares[M];
  for (auto& lanes : squares) lanes = _mm512_setzero_ps();
  for (int64_t j = 0; j < a.rank; j += kLanes) {
    __m512 sums[M], own[M];  // in registers
    for (int m = 0; m < M; ++m) sums[m] = _mm512_setzero_ps(), own[m] = squares[m];
    for (int64_t block = 0; block < a.k; block += a.rank, ++share) {
      share->wrapped ? add_share<Element, M, true>(a, *share, x, sums, own)
                     : add_share<Element, M, false>(a, *share, x, sums, own);
    }
    for (int m = 0; m < M; ++m) {
      Float32::store(a.r + (c + m) * a.rank + j, mask16(a.rank - j), sums[m]);
      squares[m] = own[m];
    }
  }
  for (int m = 0; m < M; ++m) a.q[c + m] = _mm512_reduce_add_ps(squares[m]);
}

// The same for few rows of R, each of which has 16 partial sums in a register: what belongs to
// other rows is masked out, so that it cannot bring in a NaN.
template <class Element, int RANK, int M>
APOLLO_AVX512 void project_few_rows(const CpuSparse& a, int64_t c) {
  const auto* x = static_cast<const typename Element::Stored*>(a.x) + c * a.ld;
  const __m512i minus = _mm512_set1_epi32(int32_t(kMinus));
  __m512 sums[M][RANK], square[M];
  for (int m = 0; m < M; ++m) {
    square[m] = _mm512_setzero_ps();
    for (auto& sum : sums[m]) sum = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < a.k; k += kLanes) {
    const __mmask16 mask = mask16(a.k - k);
    const __m512i places = _mm512_maskz_loadu_epi32(mask, a.places + k);
    const __m512i sign = _mm512_and_si512(places, minus);
    const __m512i row = _mm512_andnot_si512(minus, places);
    __mmask16 own[RANK];
    for (int j = 0; j < RANK; ++j) {
      own[j] = _mm512_mask_cmpeq_epi32_mask(mask, row, _mm512_set1_epi32(j));
    }
    for (int m = 0; m < M; ++m) {
      prefetch(x + m * a.ld + k);
      const __m512 v = Element::load(x + m * a.ld + k, mask), turned = with_sign(v, sign);
      square[m] = _mm512_fmadd_ps(v, v, square[m]);
      for (int j = 0; j < RANK; ++j) {
        sums[m][j] = _mm512_mask_add_ps(sums[m][j], own[j], sums[m][j], turned);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int j = 0; j < RANK; ++j) {
      a.r[(c + m) * RANK + j] = _mm512_reduce_add_ps(sums[m][j]);
    }
    a.q[c + m] = _mm512_reduce_add_ps(square[m]);
  }
}

template <class Element, int RANK>
void all_few_rows(const CpuSparse& a, int64_t begin, int64_t end) {
  constexpr int M = RANK < 6 ? 4 : 3;  // what the registers hold
  int64_t c = begin;
  for (; c + M <= end; c += M) project_few_rows<Element, RANK, M>(a, c);
  for (; c < end; ++c) project_few_rows<Element, RANK, 1>(a, c);
}

template <class Element>
void all_rows(const CpuSparse& a, int64_t begin, int64_t end) {
  const std::vector<Share> shares = all_shares(a);
  int64_t c = begin;
  for (; c + 8 <= end; c += 8) project_rows<Element, 8>(a, shares.data(), c);
  for (; c < end; ++c) project_rows<Element, 1>(a, shares.data(), c);
}

constexpr int64_t kWindow = 64;  // neighbouring columns of X, that are channels
constexpr int kVectors = kWindow / kLanes;

// The column of X that each block adds to each row of R, [blocks, rank], with the sign in the top
// bit; kNone where the last block has none.
constexpr uint32_t kNone = 0xFFFFFFFFu;

std::vector<uint32_t> columns_of_rows(const CpuSparse& a) {
  std::vector<uint32_t> found(size_t((a.k + a.rank - 1) / a.rank * a.rank), kNone);
  for (int64_t k = 0; k < a.k; ++k) {
    const uint32_t place = a.places[k];
    found[size_t(k / a.rank * a.rank + (place & ~kMinus))] = uint32_t(k) | (place & kMinus);
  }
  return found;
}

// Row j of R for one window, from all blocks.
template <class Element>
APOLLO_AVX512 inline void add_columns(const CpuSparse& a, const typename Element::Stored* x,
                                      const uint32_t* column, const __mmask16* masks,
                                      __m512* squares, float* row) {
  __m512 sums[kVectors];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t block = 0; block < a.k; block += a.rank, column += a.rank) {
    if (*column == kNone) break;
    const auto* from = x + int64_t(*column & ~kMinus) * a.ld;
    const __m512 sign = _mm512_set1_ps(*column & kMinus ? -1.0f : 1.0f);
    for (int i = 0; i < kVectors; ++i, from += kLanes) {
      prefetch(from, kWindow * int64_t(sizeof *from));
      const __m512 v = Element::load(from, masks[i]);
      squares[i] = _mm512_fmadd_ps(v, v, squares[i]);
      sums[i] = _mm512_fmadd_ps(v, sign, sums[i]);
    }
  }
  for (int i = 0; i < kVectors; ++i) _mm512_storeu_ps(row + kLanes * i, sums[i]);
}

// 16 rows that lie kWindow apart become 16 columns: `to` has rows of `width`, of which `count` are
// written, and of each as many elements as the mask says.
APOLLO_AVX512 inline void transpose(const float* from, float* to, int64_t width, int64_t count,
                                    __mmask16 mask) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + kWindow * i);
  for (int i = 0; i < 16; i += 2) {  // pairs of rows
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // fours: column 4 q + n of rows i to i + 3 in quarter q
    for (int n = 0; n < 4; ++n) {
      const __m512d low = _mm512_castps_pd(b[i + n / 2]), high = _mm512_castps_pd(b[i + 2 + n / 2]);
      a[i + n] =
          _mm512_castpd_ps(n % 2 ? _mm512_unpackhi_pd(low, high) : _mm512_unpacklo_pd(low, high));
    }
  }
  for (int n = 0; n < 4; ++n) {  // quarters of four vectors
    const __m512 even01 = _mm512_shuffle_f32x4(a[n], a[4 + n], 0x88);
    const __m512 odd01 = _mm512_shuffle_f32x4(a[n], a[4 + n], 0xDD);
    const __m512 even23 = _mm512_shuffle_f32x4(a[8 + n], a[12 + n], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(a[8 + n], a[12 + n], 0xDD);
    b[n] = _mm512_shuffle_f32x4(even01, even23, 0x88);
    b[8 + n] = _mm512_shuffle_f32x4(even01, even23, 0xDD);
    b[4 + n] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    b[12 + n] = _mm512_shuffle_f32x4(odd01, odd23, 0xDD);
  }
  for (int i = 0; i < 16; ++i) {
    if (i < count) _mm512_mask_storeu_ps(to + i * width, mask, b[i]);
  }
}

// Each row of R gathers what is its own: one column of X, a row in memory, from every block.
template <class Element>
APOLLO_AVX512 void all_columns(const CpuSparse& a, int64_t begin, int64_t end) {
  const std::vector<uint32_t> columns = columns_of_rows(a);
  alignas(64) float rows[kLanes * kWindow];
  std::fill(rows, rows + kLanes * kWindow, 0.0f);
  for (int64_t c = begin; c < end; c += kWindow) {
    const auto* x = static_cast<const typename Element::Stored*>(a.x) + c;
    __mmask16 masks[kVectors];
    __m512 squares[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      masks[i] = end - c > kLanes * i ? mask16(end - c - kLanes * i) : __mmask16(0);
      squares[i] = _mm512_setzero_ps();
    }
    for (int64_t j = 0; j < a.rank; j += kLanes) {
      const int64_t own = std::min(kLanes, a.rank - j);
      for (int64_t n = 0; n < own; ++n) {
        add_columns<Element>(a, x, &columns[size_t(j + n)], masks, squares, rows + kWindow * n);
      }
      for (int i = 0; i < kVectors; ++i) {
        const int64_t first = c + kLanes * i;
        transpose(rows + kLanes * i, a.r + first * a.rank + j, a.rank, end - first, mask16(own));
      }
    }
    for (int i = 0; i < kVectors; ++i) {
      _mm512_mask_storeu_ps(a.q + c + kLanes * i, masks[i], squares[i]);
    }
  }
}

using Pass = void (*)(const CpuSparse&, int64_t, int64_t);

template <class Element>
Pass pass_for(const CpuSparse& a) {
  if (!a.rows) return all_columns<Element>;
  constexpr Pass few[] = {all_few_rows<Element, 1>, all_few_rows<Element, 2>,
                          all_few_rows<Element, 3>, all_few_rows<Element, 4>,
                          all_few_rows<Element, 5>, all_few_rows<Element, 6>,
                          all_few_rows<Element, 7>};
  return a.rank <= 7 ? few[a.rank - 1] : all_rows<Element>;
}

}  // namespace

void cpu_project_sparse(const CpuSparse& a, int threads) {
  if (a.channels * a.k < (1 << 17)) threads = 1;  // a thread costs microseconds
  with_element(a.element, [&a, threads](auto element) {
    const Pass pass = pass_for<decltype(element)>(a);
    parallel(a.channels, a.rows ? 8 : 64, threads,
             [&a, pass](int64_t begin, int64_t end) { pass(a, begin, end); });
  });
}

}  // namespace apollo

#else

namespace apollo {
void cpu_project_sparse(const CpuSparse&, int) {}
}  // namespace apollo

#endif
