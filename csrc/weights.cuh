// How a weight is read and stored: N neighbours at a time, computed with in float32. A bf16 weight
// may be rounded by chance. A format whose weights are no plain elements is another specialisation
// of WeightPack with its own Dtype, as int8 is here.
#pragma once

#include "common.cuh"
#include "int8.cuh"
#include "philox.cuh"

namespace apollo {

// Where a part's first weight stands in the whole matrix, as both lie in memory.
struct Corner {
  uint32_t outer = 0, inner = 0;
};

// What becomes of float32 numbers before they are stored: nothing, since the store rounds.
struct ToNearest {
  static constexpr int kBlocks = 3;  // of `apply` on an SM, as registers allow

  APOLLO_DEVICE ToNearest(const Matrix&, const Record&) {}
  APOLLO_DEVICE explicit ToNearest(const DenseRow&) {}
  APOLLO_DEVICE static Corner corner(const Matrix&) { return {}; }

  template <int N>
  APOLLO_DEVICE void round(float (&)[N], uint32_t, uint32_t) const {}
};

// Rounds neighbours in memory to bf16, upward with the probability of what is cut off: weight
// (i, l) takes half l mod 2 of word (l mod 8) div 2 of the call (l div 8, i, step, 2). What is not
// finite, or nearly, is rounded to nearest.
struct ByChance {
  static constexpr int kBlocks = 2;
  uint32_t key0, key1, step;
  bool row_major;
  bool by_eights;  // neighbours share a call

  APOLLO_DEVICE ByChance(const Matrix& p, const Record& record)
      : key0(uint32_t(p.key)),
        key1(uint32_t(p.key >> 32)),
        step(uint32_t(record.t)),
        row_major((p.flags & kRowMajor) != 0),
        by_eights(row_major && p.column % 8 == 0) {}
  APOLLO_DEVICE static Corner corner(const Matrix& p) {
    if (p.flags & kRowMajor) return {uint32_t(p.row), uint32_t(p.column)};
    return {uint32_t(p.column), uint32_t(p.row)};
  }

  APOLLO_DEVICE static uint32_t half(const Words& w, uint32_t l) {
    const uint32_t low = l & 2 ? w.w[1] : w.w[0], high = l & 2 ? w.w[3] : w.w[2];
    return (l & 4 ? high : low) >> (l & 1 ? 16 : 0) & 0xFFFFu;
  }

  template <int N>
  APOLLO_DEVICE void round(float (&x)[N], uint32_t outer, uint32_t inner) const {
    Words w{};
    if (by_eights) w = philox4x32({{inner / 8, outer, step, kRounding}}, key0, key1);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (!by_eights) {  // N rows of the matrix, or places anywhere in a row: a call for each
        const uint32_t i = row_major ? outer : inner + e, l = row_major ? inner + e : outer;
        w = philox4x32({{l / 8, i, step, kRounding}}, key0, key1);
      }
      const uint32_t bits = __float_as_uint(x[e]);
      if ((bits & 0x7FFFFFFFu) < 0x7F7F0000u) {
        const uint32_t up = bits + half(w, row_major ? inner + e : outer);
        x[e] = __uint_as_float(up & 0xFFFF0000u);  // exact in bf16
      }
    }
  }
};

// The weight's own elements, of which (outer, inner) is the first: row and column as they lie in
// memory.
template <class W, int N>
struct WeightPack {
  Pack<W, N> pack;

  template <class ROUNDING>
  APOLLO_DEVICE void load(const W* from, int n, bool wide, const ROUNDING&, uint32_t, uint32_t) {
    pack.load(from, n, wide);
  }
  APOLLO_DEVICE void get(float (&y)[N]) const { pack.get(y); }

  // Stores y, rounded by `rounding`.
  template <class ROUNDING>
  APOLLO_DEVICE void store(W* to, float (&y)[N], int n, bool wide, const ROUNDING& rounding,
                           uint32_t outer, uint32_t inner) {
    rounding.round(y, outer, inner);
    pack.set(y);
    pack.store(to, n, wide);
  }
};

// The grids of an int8 weight, and the random bits of its rounding: the halves that a bf16 weight
// takes, of calls (l div 8, i, step, 3). Its rows in memory are the matrix's own, and a part of it
// is some of them: they go by their numbers in the whole, for grids too.
struct OntoGrid {
  static constexpr int kBlocks = 2;
  int32_t* grid;
  uint32_t groups;  // of a row
  uint32_t key0, key1, step;

  APOLLO_DEVICE OntoGrid(const Matrix& p, const Record& record)
      : OntoGrid(p.grid, by_row(p) ? p.k : p.channels, p.key, record.t) {}
  APOLLO_DEVICE explicit OntoGrid(const DenseRow& p)
      : OntoGrid(p.grid, p.columns, p.key, *p.step + 1) {}
  APOLLO_DEVICE static Corner corner(const Matrix& p) { return {uint32_t(p.row), 0}; }
  APOLLO_DEVICE OntoGrid(int32_t* grid, int64_t columns, uint64_t key, int64_t t)
      : grid(grid),
        groups(uint32_t((columns + kGroup - 1) / kGroup)),
        key0(uint32_t(key)),
        key1(uint32_t(key >> 32)),
        step(uint32_t(t)) {}

  APOLLO_DEVICE int32_t* of(uint32_t outer, uint32_t inner) const {
    return global(grid + (int64_t{outer} * groups + inner / kGroup));
  }
  template <int N>
  APOLLO_DEVICE void bits(uint32_t (&h)[N], uint32_t outer, uint32_t inner) const {
    const Words w = philox4x32({{inner / 8, outer, step, kRoundingInt8}}, key0, key1);
    const uint32_t first = N < 8 ? inner % 8 : 0;  // N neighbours lie within one call
#pragma unroll
    for (int e = 0; e < N; ++e) h[e] = ByChance::half(w, first + e);
  }
};

// Whether lanes share what they update, so that all of a warp have to stay until the last is done.
template <class W>
constexpr bool kInGroups = kDtypeOf<W> == kInt8;

// Codes. kGroup / N neighbouring lanes hold a group and find its range together; those beyond the
// end of a row take part with zeros, which every range has.
template <int N>
struct WeightPack<int8_code, N> {
  static_assert(N % 4 == 0 && 8 % N == 0);
  Pack<int8_code, N> codes;
  int32_t grid;

  APOLLO_DEVICE void load(const int8_code* from, int n, bool wide, const OntoGrid& onto,
                          uint32_t outer, uint32_t inner) {
    codes.load(from, n, wide);
    grid = n > 0 ? *onto.of(outer, inner) : 0;
  }
  APOLLO_DEVICE void get(float (&y)[N]) const {
    const float scale = scale_of(grid), zero = zero_of(grid);
    uint32_t words[N / 4];
    memcpy(words, codes.words, sizeof words);
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      y[4 * i] = dequantize<0>(words[i], scale, zero);
      y[4 * i + 1] = dequantize<1>(words[i], scale, zero);
      y[4 * i + 2] = dequantize<2>(words[i], scale, zero);
      y[4 * i + 3] = dequantize<3>(words[i], scale, zero);
    }
  }
  APOLLO_DEVICE void store(int8_code* to, float (&y)[N], int n, bool wide, const OntoGrid& onto,
                           uint32_t outer, uint32_t inner) {
    saturate(y);
    float low = 0.0f, high = 0.0f;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (e >= n) y[e] = 0.0f;
      low = fminf(low, y[e]);
      high = fmaxf(high, y[e]);
    }
#pragma unroll
    for (int lanes = kGroup / N / 2; lanes > 0; lanes /= 2) {
      low = fminf(low, __shfl_xor_sync(0xFFFFFFFFu, low, lanes));
      high = fmaxf(high, __shfl_xor_sync(0xFFFFFFFFu, high, lanes));
    }
    const int32_t next = renewed(grid, low, high);
    if (next != grid && inner % kGroup == 0 && n > 0) *onto.of(outer, inner) = next;
    const Ruler ruler(next);
    uint32_t h[N], words[N / 4];
    onto.bits(h, outer, inner);
#pragma unroll
    for (int e = 0; e < N; ++e) y[e] = ruler.place(y[e]);
#pragma unroll
    for (int i = 0; i < N / 4; ++i) words[i] = codes_of(y + 4 * i, h + 4 * i);
    memcpy(codes.words, words, sizeof words);
    codes.store(to, n, wide);
  }

 private:
  // A NaN keeps the weight, and an infinity has no code. One question for all.
  APOLLO_DEVICE void saturate(float (&y)[N]) const {
    bool usual = true;
#pragma unroll
    for (int e = 0; e < N; ++e) usual = usual & (fabsf(y[e]) <= kLargest);  // no branch for each
    if (usual) return;
    float old[N];
    get(old);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      y[e] = y[e] == y[e] ? fminf(fmaxf(y[e], -kLargest), kLargest) : old[e];
    }
  }
};

}  // namespace apollo
