// apply: W <- (1 - lr wd) W - f s_c X_c, streamed in memory order: 16-byte accesses, all rounding
// at the store. A bf16 weight and gradient move 6 bytes per element.
#pragma once

#include "common.cuh"
#include "weights.cuh"

namespace apollo {

template <class W, class G>
__global__ void __launch_bounds__(256, 2) apply_update(Launch launch) {
  const Hyper& h = launch.hyper;
  if (skipped(h)) return;
  const int32_t matrix = launch.map[blockIdx.x];
  // By value: behind the volatile loads and stores a reference would be read again per element.
  const Matrix p = static_cast<const Matrix*>(launch.table)[matrix];
  const Record record = record_of(launch, matrix);
  if (record.skip) return;
  const float f = record.f;
  const Keep keep = {record.keep_high, record.keep_low};
  const float* s = launch.workspace + p.s;
  const bool rows_are_channels = by_row(p);
  const int64_t outer = rows_are_channels ? p.channels : p.k;
  const int64_t inner = rows_are_channels ? p.k : p.channels;
  const int64_t row_vectors = (inner + 7) / 8;
  const int64_t first = (int64_t(blockIdx.x) - p.first_apply) * kApplyVectors + threadIdx.x;
  const int64_t rows_on = 256 / row_vectors, vectors_on = 256 % row_vectors;
  W* weight = static_cast<W*>(p.weight);
  const G* grad = static_cast<const G*>(p.grad);
  const bool wide = aligned16(weight, p.weight_ld) && aligned16(grad, p.grad_ld);

  const StochasticRounding rounding = {uint32_t(p.key), uint32_t(p.key >> 32), uint32_t(record.t),
                                       (p.flags & kRowMajor) != 0};

  constexpr int kAhead = 4;  // loads under way before the first is used
  int64_t row = first / row_vectors, column = first % row_vectors;
  for (int64_t i = 0; i < kApplyVectors / 256; i += kAhead) {
    WeightPack<W> w[kAhead];
    Pack8<G> g[kAhead];
    int64_t rows[kAhead], columns[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      rows[a] = row;
      columns[a] = 8 * column;
      if (row < outer) {
        w[a].load(weight + row * p.weight_ld + columns[a], inner - columns[a], wide);
        g[a].load(grad + row * p.grad_ld + columns[a], inner - columns[a], wide);
      }
      row += rows_on;
      column += vectors_on;
      if (column >= row_vectors) {
        column -= row_vectors;
        ++row;
      }
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (rows[a] >= outer) break;
      float x[8], y[8];
      w[a].get(y);
      g[a].get(x);
      const float row_s = h.tensor_scale || !rows_are_channels ? 1.0f : s[rows[a]];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const bool per_column = !h.tensor_scale && !rows_are_channels && columns[a] + e < inner;
        const float coefficient = f * (per_column ? s[columns[a] + e] : row_s);
        y[e] = fmaf(-coefficient, x[e], keep.times(y[e]));
      }
      w[a].store(weight + rows[a] * p.weight_ld + columns[a], y, inner - columns[a], wide,
                 h.stochastic_rounding != 0, rounding, rows[a], columns[a]);
    }
  }
}

}  // namespace apollo
