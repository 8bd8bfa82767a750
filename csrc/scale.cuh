// scale: from R in the workspace, or the sums that `project` left, to s_c and the parts of u^2; the
// last block of a matrix then decides on the norm-growth limiter. Small: at most 16 r bytes per
// channel where `project` updates the moments.
#pragma once

#include "common.cuh"

namespace apollo {

// |R_c|^2 and |N_c|^2 of a channel, shared by LANES neighbouring lanes: they sum the chunks of K
// and update the moments. WHOLE: entries come in vectors of four, each at a multiple of 16 bytes.
template <int LANES, bool WHOLE>
APOLLO_DEVICE void sum_chunks(const Matrix& p, const Launch& launch, int64_t c, float clip,
                              float& rr, float& nn) {
  constexpr int N = 4, kAhead = 4;  // chunks whose loads are under way together
  const int rank = int(p.rank), chunks = int(p.chunks);
  const int64_t chunk_stride = p.channels * rank;
#pragma unroll 1
  for (int j = N * (int(threadIdx.x) % LANES); j < rank; j += N * LANES) {
    const int64_t entry = c * rank + j;
    const int n = WHOLE ? N : rank - j;
    const float* from = r_of(p, launch, 0) + entry;
    Pack<float, N> m_pack, v_pack;
    m_pack.load(p.exp_avg + entry, n, WHOLE);
    v_pack.load(p.exp_avg_sq + entry, n, WHOLE);
    float r[N] = {}, m[N], v[N];
    for (int first = 0; first < chunks; first += kAhead) {
      Pack<float, N> packs[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i < chunks) packs[i].load(from + (first + i) * chunk_stride, n, WHOLE);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i >= chunks) break;
        float part[N];
        packs[i].get(part);
#pragma unroll
        for (int e = 0; e < N; ++e) r[e] += part[e];
      }
    }
    m_pack.get(m);
    v_pack.get(v);
#pragma unroll
    for (int e = 0; e < N; ++e) {  // beyond the rank all are zero, and stay so
      r[e] *= clip;
      update_moments(r[e], m[e], v[e], launch.hyper);
      const float normal = normalized(m[e], v[e], launch.hyper);
      rr = fmaf(r[e], r[e], rr);
      nn = fmaf(normal, normal, nn);
    }
    m_pack.set(m);
    v_pack.set(v);
    m_pack.store(p.exp_avg + entry, n, WHOLE);
    v_pack.store(p.exp_avg_sq + entry, n, WHOLE);
  }
}

// Of every block of `scale`: |R|^2, |N|^2 and q for one scale per tensor, else u^2.
APOLLO_DEVICE double* parts_of(const Matrix& p, const Launch& launch) {
  return reinterpret_cast<double*>(launch.workspace + p.parts);
}

// Whether this block is the last one of its matrix, and the others' parts are there. The count
// turns over to 0 by itself, for the next step.
APOLLO_DEVICE bool comes_last(Record& record, int64_t blocks) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();  // this block's parts, before it is counted
    last = atomicInc(&record.arrived, unsigned(blocks - 1)) == unsigned(blocks - 1);
    __threadfence();  // and the others' parts after it
  }
  __syncthreads();  // all threads know
  return last;
}

// u^2 from all parts, in fixed order; the limiter, update_norm and counters; what `apply` takes.
// The step is stored by `apply`: here other matrices may still read one that they share.
APOLLO_DEVICE void limit_update(const Matrix& p, const Launch& launch, Record& record,
                                int64_t blocks, double* scratch) {
  const Hyper& h = launch.hyper;
  const double* parts = parts_of(p, launch);
  double sums[3] = {};
  for (int i = 0; i < (h.tensor_scale ? 3 : 1); ++i) {
    for (int64_t b = threadIdx.x; b < blocks; b += kScaleThreads) {
      sums[i] += __ldcg(parts + i * blocks + b);  // other SMs wrote them: not from L1
    }
    sums[i] = block_sum(sums[i], scratch);
  }
  if (threadIdx.x != 0) return;
  double s = 1.0, u2 = sums[0];
  if (h.tensor_scale) {
    s = sqrt(sums[1]) / (sqrt(sums[0]) + kTiny);
    u2 = s * s * sums[2];
    if (p.channels > 0) launch.workspace[p.s] = float(s);  // for whoever wants to know
  }
  const float alpha = float(sqrt(h.scale));
  const float u = float(sqrt(u2)) * (h.scale_front ? alpha : 1.0f);
  const bool ok = finite(float(u2)) && finite(u);
  float factor = 1.0f;
  if (ok && !h.disable_nl) {
    const float previous = *p.update_norm;
    constexpr float kLeast = float(kTiny), kGrowth = float(kNormGrowth);
    if (previous >= kLeast) factor = 1.0f / fmaxf(u / (previous + kLeast) / kGrowth, 1.0f);
    *p.update_norm = u * factor;
  }
  const Keep keep = keep_of(h);
  record.t = *p.step + 1;
  record.f = float(step_size(h, double(record.t)) * double(alpha) * double(factor) *
                   double(sign_and_scale(h)) * double(clip_factor(h)) * s);
  record.keep_high = keep.high;
  record.keep_low = keep.low;
  record.skip = ok ? 0 : 1;
  auto* counters = reinterpret_cast<unsigned long long*>(h.counters);
  atomicAdd(counters + (ok ? 0 : 2), 1ull);
  if (factor < 1.0f) atomicAdd(counters + 1, 1ull);
}

__global__ void __launch_bounds__(kScaleThreads, 3) scale_channels(Launch launch) {
  __shared__ double scratch[8];
  const Hyper& h = launch.hyper;
  if (skipped(h)) return;
  const int32_t matrix = launch.map[blockIdx.x];
  // By value: behind volatile loads a reference would be read again before each of them.
  const Matrix p = static_cast<const Matrix*>(launch.table)[matrix];
  const int64_t block = int64_t(blockIdx.x) - p.first_scale;
  const int shift = scale_shift(p.rank, summed(p)), lanes = 1 << shift;  // of a channel
  const int thread = int(threadIdx.x);
  const int64_t c = (block * kScaleThreads + thread) >> shift;
  const float clip = clip_factor(h);
  float rr = 0.0f, nn = 0.0f, q = 0.0f;
  if (c >= p.channels) {
    // Nothing: but all lanes take part in the sums below.
  } else if (!summed(p)) {
    const int64_t tiles = p.rank_tiles;
    const float* sums = r_of(p, launch, 0) + c;
    for (int64_t i = 0; i < tiles; ++i) {
      rr += sums[i * p.channels];
      nn += sums[(tiles + i) * p.channels];
    }
  } else if (lanes == 1) {
    sum_chunks<1, false>(p, launch, c, clip, rr, nn);
  } else if (aligned<4>(p.exp_avg, p.rank) && aligned<4>(p.exp_avg_sq, p.rank)) {
    sum_chunks<8, true>(p, launch, c, clip, rr, nn);
  } else {
    sum_chunks<8, false>(p, launch, c, clip, rr, nn);
  }
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    rr += __shfl_xor_sync(0xFFFFFFFFu, rr, offset);
    nn += __shfl_xor_sync(0xFFFFFFFFu, nn, offset);
  }
  const bool own =
      c < p.channels && (thread & (lanes - 1)) == 0;  // the lane that goes on with a channel
  if (own) {
    const float factor = sign_and_scale(h) * clip;
    for (int64_t i = 0; i < p.q_rows; ++i) q += q_of(p, launch, i)[c];
    q = factor * (factor * q);  // the square alone could underflow
  }
  double* parts = parts_of(p, launch) + block;
  const int64_t blocks = scale_blocks(p.channels, shift);
  if (h.tensor_scale) {
    const double sums[3] = {block_sum(own ? rr : 0.0f, scratch),
                            block_sum(own ? nn : 0.0f, scratch), block_sum(q, scratch)};
    if (thread == 0) {
      for (int i = 0; i < 3; ++i) parts[i * blocks] = sums[i];
    }
  } else {
    const float sc = sqrtf(nn) / (sqrtf(rr) + float(kTiny));
    if (own) launch.workspace[p.s + c] = sc;
    const double u2 = block_sum(own ? sc * sc * q : 0.0f, scratch);
    if (thread == 0) parts[0] = u2;
  }
  Record& record = record_of(launch, matrix);
  if (comes_last(record, blocks)) limit_update(p, launch, record, blocks, scratch);
}

}  // namespace apollo
