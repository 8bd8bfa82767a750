// How a weight is read and stored: N neighbours at a time, computed with in float32. A bf16 weight
// may be rounded by chance. A format whose weights are no plain elements (int8 with scales) is
// another specialisation of WeightPack, with its own Dtype.
#pragma once

#include "common.cuh"
#include "philox.cuh"

namespace apollo {

// What becomes of float32 numbers before they are stored: nothing, since the store rounds.
struct ToNearest {
  static constexpr int kBlocks = 3;  // of `apply` on an SM, as registers allow

  APOLLO_DEVICE ToNearest(const Matrix&, const Record&) {}

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

  APOLLO_DEVICE ByChance(const Matrix& p, const Record& record)
      : key0(uint32_t(p.key)),
        key1(uint32_t(p.key >> 32)),
        step(uint32_t(record.t)),
        row_major((p.flags & kRowMajor) != 0) {}

  APOLLO_DEVICE static uint32_t half(const Words& w, uint32_t l) {
    const uint32_t low = l & 2 ? w.w[1] : w.w[0], high = l & 2 ? w.w[3] : w.w[2];
    return (l & 4 ? high : low) >> (l & 1 ? 16 : 0) & 0xFFFFu;
  }

  template <int N>
  APOLLO_DEVICE void round(float (&x)[N], uint32_t outer, uint32_t inner) const {
    Words w{};
    if (row_major) w = philox4x32({{inner / 8, outer, step, kRounding}}, key0, key1);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (!row_major) {  // N rows of the matrix: a call for each
        w = philox4x32({{outer / 8, inner + e, step, kRounding}}, key0, key1);
      }
      const uint32_t bits = __float_as_uint(x[e]);
      if ((bits & 0x7FFFFFFFu) < 0x7F7F0000u) {
        const uint32_t up = bits + half(w, row_major ? inner + e : outer);
        x[e] = __uint_as_float(up & 0xFFFF0000u);  // exact in bf16
      }
    }
  }
};

template <class W, int N>
struct WeightPack {
  Pack<W, N> pack;

  APOLLO_DEVICE void load(const W* from, int n, bool wide) { pack.load(from, n, wide); }
  APOLLO_DEVICE void get(float (&y)[N]) const { pack.get(y); }

  // Stores y, the weights (outer, inner) and those that follow, rounded by `rounding`.
  template <class ROUNDING>
  APOLLO_DEVICE void store(W* to, float (&y)[N], int n, bool wide, const ROUNDING& rounding,
                           uint32_t outer, uint32_t inner) {
    rounding.round(y, outer, inner);
    pack.set(y);
    pack.store(to, n, wide);
  }
};

}  // namespace apollo
