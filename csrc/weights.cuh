// How a weight is read and stored: eight neighbours at a time, computed with in float32. A bf16
// weight may be rounded by chance. A format whose weights are no plain elements (int8 with scales)
// is another specialisation of WeightPack, with its own Dtype.
#pragma once

#include "common.cuh"
#include "philox.cuh"

namespace apollo {

// Rounds eight neighbours in memory to bf16, upward with the probability of what is cut off: weight
// (i, l) takes half l mod 2 of word (l mod 8) div 2 of the call (l div 8, i, step, 2). What is not
// finite, or nearly, is rounded to nearest.
struct StochasticRounding {
  uint32_t key0, key1, step;
  bool row_major;

  APOLLO_DEVICE uint32_t half(const Words& w, int64_t l) const {
    const uint32_t low = l & 2 ? w.w[1] : w.w[0], high = l & 2 ? w.w[3] : w.w[2];
    return (l & 4 ? high : low) >> (l & 1 ? 16 : 0) & 0xFFFFu;
  }

  APOLLO_DEVICE void round(float (&x)[8], int64_t outer, int64_t inner) const {
    Words w{};
    if (row_major) {
      w = philox4x32({{uint32_t(inner / 8), uint32_t(outer), step, kRounding}}, key0, key1);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (!row_major) {  // eight rows of the matrix: a call for each
        const Words one = {{uint32_t(outer / 8), uint32_t(inner + e), step, kRounding}};
        w = philox4x32(one, key0, key1);
      }
      const uint32_t bits = __float_as_uint(x[e]);
      if ((bits & 0x7FFFFFFFu) < 0x7F7F0000u) {
        const uint32_t up = bits + half(w, row_major ? e : outer);
        x[e] = __uint_as_float(up & 0xFFFF0000u);  // exact in bf16
      }
    }
  }
};

template <class W>
struct WeightPack {
  Pack8<W> pack;

  APOLLO_DEVICE void load(const W* from, int64_t n, bool wide) { pack.load(from, n, wide); }
  APOLLO_DEVICE void get(float (&y)[8]) const { pack.get(y); }

  // y rounded and stored; `by_chance` says whether a bf16 weight (outer, inner..) takes `rounding`.
  APOLLO_DEVICE void store(W* to, float (&y)[8], int64_t n, bool wide, bool by_chance,
                           const StochasticRounding& rounding, int64_t outer, int64_t inner) {
    if constexpr (kDtypeOf<W> == kBfloat16) {
      if (by_chance) rounding.round(y, outer, inner);
    }
    pack.set(y);
    pack.store(to, n, wide);
  }
};

}  // namespace apollo
