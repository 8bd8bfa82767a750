// apply: W <- W - decay W - f s_c X_c, streamed in memory order: 16-byte accesses, all rounding at
// the store. A bf16 weight and gradient move 6 bytes an element. adamw: the same stream for dense
// parameters, with their float32 moments (22 bytes for bf16).
#pragma once

#include "common.cuh"

namespace apollo {

template <class W, class G>
__global__ void __launch_bounds__(256) apply_update(Launch launch) {
  const Hyper& h = launch.hyper;
  if (skipped(h)) return;
  const Parameter& p = static_cast<const Parameter*>(launch.table)[launch.map[blockIdx.x]];
  const float* control =
      launch.workspace + p.parts + 3 * ((p.channels + kScaleChannels - 1) / kScaleChannels);
  if (control[1] != 0.0f) return;
  const float f = control[0], decay = -float(learning_rate(h) * h.weight_decay);
  const float* s = launch.workspace + p.channel;
  const int64_t outer = p.by_row ? p.channels : p.k, inner = p.by_row ? p.k : p.channels;
  const int64_t row_vectors = (inner + 7) / 8;
  const int64_t first = (int64_t(blockIdx.x) - p.first_apply) * kApplyVectors + threadIdx.x;
  const int64_t rows_on = 256 / row_vectors, vectors_on = 256 % row_vectors;
  W* weight = static_cast<W*>(p.weight);
  const G* grad = static_cast<const G*>(p.grad);
  const bool wide = aligned16(weight, p.weight_ld) && aligned16(grad, p.grad_ld);

  constexpr int kAhead = 4;  // loads under way before the first is used
  int64_t row = first / row_vectors, column = first % row_vectors;
  for (int64_t i = 0; i < kApplyVectors / 256; i += kAhead) {
    Pack8<W> w[kAhead];
    Pack8<G> g[kAhead];
    int64_t rows[kAhead], at[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      rows[a] = row;
      at[a] = 8 * column;
      if (row < outer) {
        w[a].load(weight + row * p.weight_ld + at[a], inner - at[a], wide);
        g[a].load(grad + row * p.grad_ld + at[a], inner - at[a], wide);
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
      const float row_s = h.tensor_scale || !p.by_row ? 1.0f : s[rows[a]];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const bool own = !h.tensor_scale && !p.by_row && at[a] + e < inner;
        const float coefficient = f * (own ? s[at[a] + e] : row_s);
        const float kept = decay == 0.0f ? y[e] : fmaf(y[e], decay, y[e]);  // 0 * Inf is NaN
        y[e] = fmaf(-coefficient, x[e], kept);
      }
      w[a].set(y);
      w[a].store(weight + rows[a] * p.weight_ld + at[a], inner - at[a], wide);
    }
  }
}

template <class W, class G>
__global__ void __launch_bounds__(256) adamw_update(Launch launch) {
  const Hyper& h = launch.hyper;
  if (skipped(h)) return;
  const DenseParameter p = static_cast<const DenseParameter*>(launch.table)[launch.map[blockIdx.x]];
  const double t = double(*p.step) + 1.0, lr = learning_rate(h);
  const double c1 = h.correct_bias ? (h.beta1 > 0.0 ? -expm1(t * log(h.beta1)) : 1.0) : 1.0;
  const double c2 = h.correct_bias ? (h.beta2 > 0.0 ? -expm1(t * log(h.beta2)) : 1.0) : 1.0;
  const float rate = float(lr / c1), root = float(1.0 / sqrt(c2));
  const float decay = -float(lr * h.weight_decay), factor = sign_and_scale(h);
  W* weight = static_cast<W*>(p.weight);
  const G* grad = static_cast<const G*>(p.grad);
  const bool wide = aligned16(weight, 0) && aligned16(grad, 0) && aligned16(p.exp_avg, 0) &&
                    aligned16(p.exp_avg_sq, 0);
  bool bad = false;
  int64_t at = ((int64_t(blockIdx.x) - p.first_block) * kApplyVectors + threadIdx.x) * 8;
  for (int64_t i = 0; i < kApplyVectors / 256 && at < p.count; ++i, at += 8 * 256) {
    Pack8<W> w;
    Pack8<G> g;
    Pack8<float> m, v;
    const int64_t left = p.count - at;
    w.load(weight + at, left, wide);
    g.load(grad + at, left, wide);
    m.load(p.exp_avg + at, left, wide);
    v.load(p.exp_avg_sq + at, left, wide);
    float x[8], y[8], mm[8], vv[8];
    w.get(y);
    g.get(x);
    m.get(mm);
    v.get(vv);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float r = x[e] * factor;
      if (!finite(r * r)) {
        bad = true;
        continue;
      }
      mm[e] = fmaf(h.keep1, r - mm[e], mm[e]);
      vv[e] = fmaf(h.keep2 * r, r, h.beta2_float * vv[e]);
      const float kept = decay == 0.0f ? y[e] : fmaf(y[e], decay, y[e]);
      y[e] = fmaf(-rate, mm[e] / fmaf(sqrtf(vv[e]), root, h.eps), kept);
    }
    w.set(y);
    m.set(mm);
    v.set(vv);
    w.store(weight + at, left, wide);
    m.store(p.exp_avg + at, left, wide);
    v.store(p.exp_avg_sq + at, left, wide);
  }
  if (bad) atomicExch(launch.flags + p.bad, 1);  // any order gives the same
}

// After adamw: one thread per parameter counts its step and clears its flag.
__global__ void __launch_bounds__(256) advance_steps(Launch launch) {
  if (skipped(launch.hyper)) return;
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= launch.blocks) return;
  const DenseParameter p = static_cast<const DenseParameter*>(launch.table)[i];
  *p.step += 1.0f;
  auto* counters = reinterpret_cast<unsigned long long*>(launch.hyper.counters);
  atomicAdd(counters + (launch.flags[p.bad] ? 2 : 0), 1ull);
  launch.flags[p.bad] = 0;
}

}  // namespace apollo
