// adamw: the low-rank rule without a projection, for dense parameters: M and V of the gradient,
// then W <- (1 - lr wd) W - lr sqrt(1 - b2^t) / (1 - b1^t) M / (sqrt(V) + eps). It streams weight,
// gradient and moments in memory order: 22 bytes per bf16 weight and 20 per int8 one, of which
// float32 moments are 16, bf16 ones 8 and int8 ones 4.
// advance: counts the step of every dense parameter.
#pragma once

#include "common.cuh"
#include "moments.cuh"
#include "weights.cuh"

namespace apollo {

// Row and column of the elements of a block, which an int8 weight asks for. Its groups are those of
// a warp's vectors, since rows are whole groups: the lanes of a warp have an element all, or none.
template <class W>
struct DensePlaces {
  using Rounding = ToNearest;
  APOLLO_DEVICE DensePlaces(const DenseRow&, int64_t) {}
  APOLLO_DEVICE uint32_t outer(int) const { return 0; }
  APOLLO_DEVICE uint32_t inner(int) const { return 0; }
};
template <>
struct DensePlaces<int8_code> {
  using Rounding = OntoGrid;
  static_assert(kDenseVector * 32 == kGroup);
  uint32_t columns, row, column;  // of the block's first element, its row in the whole parameter

  APOLLO_DEVICE DensePlaces(const DenseRow& p, int64_t begin)
      : columns(uint32_t(p.columns)),
        row(uint32_t((p.first + begin) / p.columns)),
        column(uint32_t(begin % p.columns)) {}
  APOLLO_DEVICE uint32_t outer(int i) const { return row + (column + i) / columns; }
  APOLLO_DEVICE uint32_t inner(int i) const { return (column + i) % columns; }
};

// The elements of one block. WHOLE: all are there, each vector at a multiple of its size; else both
// are asked at each access. False if an element was left as it is: its square is not finite.
template <bool WHOLE, class W, class G, class M>
APOLLO_DEVICE bool update_elements(const DenseRow& p, const Hyper& h, int64_t begin, float rate,
                                   Keep keep, bool wide) {
  constexpr int N = kDenseVector, kApart = N * kStreamThreads;  // of a thread's vectors
  constexpr int kAhead = WHOLE ? 2 : 1;  // loads under way before the first is used
  W* weight = static_cast<W*>(p.weight) + begin;
  const G* grad = static_cast<const G*>(p.grad) + begin;
  const MomentPlaces<M> moments(p, begin);
  const int count = p.count - begin < kDenseElements ? int(p.count - begin) : kDenseElements;
  const float factor = sign_and_scale(h) * clip_factor(h);
  const DensePlaces<W> places(p, begin);
  const typename DensePlaces<W>::Rounding rounding(p);
  bool good = true;
  // The lanes of a warp that share a block of codes stay until the last of them is done.
  const int lane = kInGroups<M> ? N * int(threadIdx.x % 32) : 0;
#pragma unroll 1
  for (int first = N * int(threadIdx.x); first - lane < count; first += kAhead * kApart) {
    WeightPack<W, N> w[kAhead];
    Pack<G, N> g[kAhead];
    MomentPacks<M> mv[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int i = first + a * kApart, n = WHOLE ? N : count - i;
      w[a].load(weight + i, n, WHOLE || wide, rounding, places.outer(i), places.inner(i));
      g[a].load(grad + i, n, WHOLE || wide);
      mv[a].load(moments, i, n, WHOLE || wide);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int i = first + a * kApart, n = WHOLE ? N : count - i;
      float x[N], y[N], mm[N], vv[N];
      w[a].get(y);
      g[a].get(x);
      mv[a].get(mm, vv);
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
      mv[a].set(moments, i, n, mm, vv);
      w[a].store(weight + i, y, n, WHOLE || wide, rounding, places.outer(i), places.inner(i));
      mv[a].store(moments, i, n, WHOLE || wide);
    }
  }
  return good;
}

template <class W, class G, class M>
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
                    aligned<kDenseVector>(static_cast<const M*>(p.exp_avg), 0) &&
                    aligned<kDenseVector>(static_cast<const M*>(p.exp_avg_sq), 0);
  const bool whole = wide && p.count - begin >= kDenseElements;
  const bool good = whole ? update_elements<true, W, G, M>(p, h, begin, rate, keep, wide)
                          : update_elements<false, W, G, M>(p, h, begin, rate, keep, wide);
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
