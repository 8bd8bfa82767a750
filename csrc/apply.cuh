// apply: W <- (1 - lr wd) W - f s_c X_c, streamed as it lies in memory; all rounding at the store.
// A bf16 weight and gradient move 6 bytes per element. The leading matrix stores the step.
#pragma once

#include "common.cuh"
#include "weights.cuh"

namespace apollo {

template <class W, class G>
constexpr int kApplyVector = apply_vector(kDtypeOf<W>, kDtypeOf<G>);

// What a block updates: a tile of vectors, of which each thread walks down a column, so that
// strides, and s of channels by column, stay in registers. Each side is below 2^31, products are
// not.
template <class W, class G>
struct ApplyTile {
  static constexpr int N = kApplyVector<W, G>;
  uint32_t outer, inner;  // rows in memory, and their length
  uint32_t row, column;   // of this thread's first vector
  uint32_t rows_apart;    // of its vectors
  bool wide;              // every row begins at a multiple of a vector
  bool whole;             // so it does, ends at one, and all rows of the tile are there
  bool beyond;            // the end of the rows: nothing to do

  APOLLO_DEVICE static ApplyTile of(const Matrix& p, uint32_t tile) {
    ApplyTile at;
    at.outer = uint32_t(by_row(p) ? p.channels : p.k);
    at.inner = uint32_t(by_row(p) ? p.k : p.channels);
    const uint32_t shift = uint32_t(p.apply_shift), across = uint32_t(p.apply_across);
    at.rows_apart = uint32_t(kStreamThreads) >> shift;
    const uint32_t rows = kStreamVectors * at.rows_apart, row = tile / across * rows;
    const uint32_t vector = tile % across << shift;
    at.row = row + (threadIdx.x >> shift);
    at.column = N * (vector + (threadIdx.x & ((1u << shift) - 1)));
    at.wide = aligned<N>(static_cast<const W*>(p.weight), p.weight_ld) &&
              aligned<N>(static_cast<const G*>(p.grad), p.grad_ld);
    at.whole = at.wide && at.inner % N == 0 && row + rows <= at.outer;
    at.beyond = at.column >= at.inner;
    if constexpr (kInGroups<W>) {  // a warp is whole, or leaves, with all of its lanes
      const uint32_t lanes = shift < 5 ? 1u << shift : 32u;
      const uint32_t first = at.column - N * (threadIdx.x & (lanes - 1));
      at.whole = at.whole && first + N * lanes <= at.inner;
      at.beyond = first >= at.inner;
    }
    return at;
  }
};

// WHOLE: of a whole tile, without a question per access. PER_ROW: rows in memory have a coefficient
// each, else columns have, or all the same.
template <bool WHOLE, bool PER_ROW, class W, class G, class ROUNDING>
APOLLO_DEVICE void update_tile(const Matrix& p, const Launch& launch, const Record& record,
                               const ApplyTile<W, G>& at) {
  constexpr int N = kApplyVector<W, G>;
  constexpr int kAhead = WHOLE ? 4 : 1;  // loads under way before the first is used
  if (at.beyond) return;
  const bool wide = WHOLE || at.wide;
  int n = WHOLE ? N : int(at.inner - at.column);
  W* weight = static_cast<W*>(p.weight) + at.row * p.weight_ld + at.column;
  const G* grad = static_cast<const G*>(p.grad) + at.row * p.grad_ld + at.column;
  const float* s = launch.workspace + p.s + (PER_ROW ? at.row : at.column);
  const int64_t weight_stride = at.rows_apart * p.weight_ld;
  const int64_t grad_stride = at.rows_apart * p.grad_ld;
  const Keep keep = {record.keep_high, record.keep_low};
  const ROUNDING rounding(p, record);
  float coefficients[N];  // of the columns
  if constexpr (!PER_ROW) {
    Pack<float, N> of_columns = {};
    if (!launch.hyper.tensor_scale) of_columns.load(s, n, true);  // the plan has aligned it
    of_columns.get(coefficients);
#pragma unroll
    for (float& c : coefficients) c = -record.f * (launch.hyper.tensor_scale ? 1.0f : c);
  }
  const Corner corner = ROUNDING::corner(p);
  uint32_t row = corner.outer + at.row;
  const uint32_t end = corner.outer + at.outer, column = corner.inner + at.column;
#pragma unroll 1
  for (int i = 0; i < kStreamVectors; i += kAhead) {
    if (!WHOLE && row >= end) {
      if (!kInGroups<W>) return;
      n = 0;  // other lanes of the warp may have a row
    }
    WeightPack<W, N> w[kAhead];
    Pack<G, N> g[kAhead];
    float of_row[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      w[a].load(weight + a * weight_stride, n, wide, rounding, row + a * at.rows_apart, column);
      g[a].load(grad + a * grad_stride, n, wide);
      if (PER_ROW) of_row[a] = !kInGroups<W> || n > 0 ? s[a * at.rows_apart] : 0.0f;
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      float x[N], y[N];
      w[a].get(y);
      g[a].get(x);
      const float of_all = PER_ROW ? -record.f * of_row[a] : 0.0f;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        y[e] = fmaf(PER_ROW ? of_all : coefficients[e], x[e], keep.times(y[e]));
      }
      w[a].store(weight, y, n, wide, rounding, row, column);
      weight += weight_stride;
      row += at.rows_apart;
    }
    grad += kAhead * grad_stride;
    s += PER_ROW ? kAhead * at.rows_apart : 0;
  }
}

template <class W, class G, class ROUNDING>
__global__ void __launch_bounds__(kStreamThreads, ROUNDING::kBlocks) apply_update(Launch launch) {
  if (skipped(launch.hyper)) return;
  // Backwards: what `project` has read last may still lie in L2.
  const int64_t block = launch.blocks - 1 - blockIdx.x;
  const int32_t matrix = launch.map[block];
  // By value: behind the volatile loads and stores a reference would be read again per element.
  const Matrix p = static_cast<const Matrix*>(launch.table)[matrix];
  const Record record = record_of(launch, matrix);
  const uint32_t tile = uint32_t(block - p.first_apply);
  // Here, since `scale` of other matrices may still read a step that they share.
  if (tile == 0 && threadIdx.x == 0 && (p.flags & kLeads)) *p.step = record.t;
  if (record.skip) return;
  const auto at = ApplyTile<W, G>::of(p, tile);
  const bool per_row = by_row(p) && !launch.hyper.tensor_scale;
  if (at.whole && per_row) {
    update_tile<true, true, W, G, ROUNDING>(p, launch, record, at);
  } else if (at.whole) {
    update_tile<true, false, W, G, ROUNDING>(p, launch, record, at);
  } else if (per_row) {
    update_tile<false, true, W, G, ROUNDING>(p, launch, record, at);
  } else {
    update_tile<false, false, W, G, ROUNDING>(p, launch, record, at);
  }
}

}  // namespace apollo
