// adamw: the low-rank rule without a projection, for dense parameters: M and V of the gradient,
// then W <- (1 - lr wd) W - lr sqrt(1 - b2^t) / (1 - b1^t) M / (sqrt(V) + eps). It streams weight,
// gradient and float32 moments in memory order, 22 bytes per bf16 weight.
// advance: counts the step of every dense parameter.
#pragma once

#include "common.cuh"

namespace apollo {

template <class W, class G>
__global__ void __launch_bounds__(256) adamw_update(Launch launch) {
  __shared__ float shared_rate;
  __shared__ Keep shared_keep;
  const Hyper& h = launch.hyper;
  if (skipped(h)) return;
  const int32_t parameter = launch.map[blockIdx.x];
  const DenseRow p = static_cast<const DenseRow*>(launch.table)[parameter];
  if (threadIdx.x == 0) {  // float64 is slow on most cards
    shared_rate = float(step_size(h, double(*p.step + 1)));
    shared_keep = keep_of(h);
  }
  __syncthreads();  // the rates are there
  const float rate = shared_rate, factor = sign_and_scale(h) * clip_factor(h);
  const Keep keep = shared_keep;
  W* weight = static_cast<W*>(p.weight);
  const G* grad = static_cast<const G*>(p.grad);
  const bool wide = aligned16(weight, 0) && aligned16(grad, 0) && aligned16(p.exp_avg, 0) &&
                    aligned16(p.exp_avg_sq, 0);
  bool bad = false;
  int64_t element = ((int64_t(blockIdx.x) - p.first_block) * kApplyVectors + threadIdx.x) * 8;
  for (int64_t i = 0; i < kApplyVectors / 256 && element < p.count; ++i, element += 8 * 256) {
    Pack8<W> w;
    Pack8<G> g;
    Pack8<float> m, v;
    const int64_t left = p.count - element;
    w.load(weight + element, left, wide);
    g.load(grad + element, left, wide);
    m.load(p.exp_avg + element, left, wide);
    v.load(p.exp_avg_sq + element, left, wide);
    float x[8], y[8], mm[8], vv[8];
    w.get(y);
    g.get(x);
    m.get(mm);
    v.get(vv);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (!update_moments(x[e] * factor, mm[e], vv[e], h)) {
        bad = true;
        continue;
      }
      y[e] = fmaf(-rate, normalized(mm[e], vv[e], h), keep.times(y[e]));
    }
    w.set(y);
    m.set(mm);
    v.set(vv);
    w.store(weight + element, left, wide);
    m.store(p.exp_avg + element, left, wide);
    v.store(p.exp_avg_sq + element, left, wide);
  }
  if (bad) atomicExch(launch.bad + parameter, 1);  // any order gives the same
}

// After adamw: one thread per parameter counts its step and clears its flag.
__global__ void __launch_bounds__(256) advance_steps(Launch launch) {
  if (skipped(launch.hyper)) return;
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= launch.blocks) return;
  *static_cast<const DenseRow*>(launch.table)[i].step += 1;
  auto* counters = reinterpret_cast<unsigned long long*>(launch.hyper.counters);
  atomicAdd(counters + (launch.bad[i] ? 2 : 0), 1ull);
  launch.bad[i] = 0;
}

}  // namespace apollo
