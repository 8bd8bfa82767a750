// adamw: the low-rank rule without a projection, for dense parameters: M and V of the gradient,
// then W <- (1 - lr wd) W - lr sqrt(1 - b2^t) / (1 - b1^t) M / (sqrt(V) + eps). It streams weight,
// gradient and float32 moments in memory order, 22 bytes per bf16 weight.
// advance: counts the step of every dense parameter.
#pragma once

#include "common.cuh"

namespace apollo {

// The elements of one block. WHOLE: all are there, each vector at a multiple of its size; else both
// are asked at each access. False if an element was left as it is: its square is not finite.
template <bool WHOLE, class W, class G>
APOLLO_DEVICE bool update_elements(const DenseRow& p, const Hyper& h, int64_t begin, float rate,
                                   Keep keep, bool wide) {
  constexpr int N = kDenseVector, kApart = N * kStreamThreads;  // of a thread's vectors
  constexpr int kAhead = WHOLE ? 2 : 1;  // loads under way before the first is used
  W* weight = static_cast<W*>(p.weight) + begin;
  const G* grad = static_cast<const G*>(p.grad) + begin;
  float *exp_avg = p.exp_avg + begin, *exp_avg_sq = p.exp_avg_sq + begin;
  const int count = p.count - begin < kDenseElements ? int(p.count - begin) : kDenseElements;
  const float factor = sign_and_scale(h) * clip_factor(h);
  bool good = true;
#pragma unroll 1
  for (int first = N * int(threadIdx.x); first < count; first += kAhead * kApart) {
    Pack<W, N> w[kAhead];
    Pack<G, N> g[kAhead];
    Pack<float, N> m[kAhead], v[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int i = first + a * kApart, n = WHOLE ? N : count - i;
      w[a].load(weight + i, n, WHOLE || wide);
      g[a].load(grad + i, n, WHOLE || wide);
      m[a].load(exp_avg + i, n, WHOLE || wide);
      v[a].load(exp_avg_sq + i, n, WHOLE || wide);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int i = first + a * kApart, n = WHOLE ? N : count - i;
      float x[N], y[N], mm[N], vv[N];
      w[a].get(y);
      g[a].get(x);
      m[a].get(mm);
      v[a].get(vv);
      const auto step = [&](int e) {
        mix_moments(x[e], mm[e], vv[e], h);
        y[e] = fmaf(-rate, normalized(mm[e], vv[e], h), keep.times(y[e]));
      };
      bool usual = true;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        x[e] *= factor;
        usual = usual && finite(x[e] * x[e]);
      }
      if (usual) {  // one question for all
#pragma unroll
        for (int e = 0; e < N; ++e) step(e);
      } else {
        good = false;
#pragma unroll
        for (int e = 0; e < N; ++e) {
          if (finite(x[e] * x[e])) step(e);
        }
      }
      w[a].set(y);
      m[a].set(mm);
      v[a].set(vv);
      w[a].store(weight + i, n, WHOLE || wide);
      m[a].store(exp_avg + i, n, WHOLE || wide);
      v[a].store(exp_avg_sq + i, n, WHOLE || wide);
    }
  }
  return good;
}

template <class W, class G>
__global__ void __launch_bounds__(kStreamThreads, 3) adamw_update(Launch launch) {
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
  const float rate = shared_rate;
  const Keep keep = shared_keep;
  const int64_t begin = (int64_t(blockIdx.x) - p.first_block) * kDenseElements;
  const bool wide = aligned<kDenseVector>(static_cast<const W*>(p.weight), 0) &&
                    aligned<kDenseVector>(static_cast<const G*>(p.grad), 0) &&
                    aligned16(p.exp_avg, 0) && aligned16(p.exp_avg_sq, 0);
  const bool whole = wide && p.count - begin >= kDenseElements;
  const bool good = whole ? update_elements<true, W, G>(p, h, begin, rate, keep, wide)
                          : update_elements<false, W, G>(p, h, begin, rate, keep, wide);
  if (!good) atomicExch(launch.bad + parameter, 1);  // any order gives the same
}

// After adamw: one thread per parameter counts its step and clears its flag.
__global__ void __launch_bounds__(kStreamThreads) advance_steps(Launch launch) {
  if (skipped(launch.hyper)) return;
  const int64_t i = int64_t(blockIdx.x) * kStreamThreads + threadIdx.x;
  if (i >= launch.blocks) return;
  *static_cast<const DenseRow*>(launch.table)[i].step += 1;
  auto* counters = reinterpret_cast<unsigned long long*>(launch.hyper.counters);
  atomicAdd(counters + (launch.bad[i] ? 2 : 0), 1ull);
  launch.bad[i] = 0;
}

}  // namespace apollo
