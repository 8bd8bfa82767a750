// scale: from R in the workspace, or the sums that `project` left, to s_c and the parts of u^2;
// then limit: one block per matrix decides on the norm-growth limiter and counts the step. Both are
// small: at most 16 r bytes per channel, and a few numbers per matrix.
#pragma once

#include "common.cuh"

namespace apollo {

// |R_c|^2 and |N_c|^2 of one channel by one warp, which sums the chunks of K and updates the
// moments.
APOLLO_DEVICE void sum_chunks(const Matrix& p, const Launch& launch, int64_t c, float clip,
                              float& rr, float& nn) {
  const float* r_workspace = r_of(p, launch, 0);
  float *exp_avg = p.exp_avg, *exp_avg_sq = p.exp_avg_sq;
  rr = nn = 0.0f;
  for (int64_t j = threadIdx.x % 32; j < p.rank; j += 32) {
    const int64_t entry = c * p.rank + j;
    float r = 0.0f;
    for (int64_t i = 0; i < p.chunks; ++i) r += r_workspace[i * p.channels * p.rank + entry];
    r *= clip;
    float m = exp_avg[entry], v = exp_avg_sq[entry];
    if (update_moments(r, m, v, launch.hyper)) {
      exp_avg[entry] = m;
      exp_avg_sq[entry] = v;
    }
    const float n = normalized(m, v, launch.hyper);
    rr = fmaf(r, r, rr);
    nn = fmaf(n, n, nn);
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    rr += __shfl_xor_sync(0xFFFFFFFFu, rr, offset);
    nn += __shfl_xor_sync(0xFFFFFFFFu, nn, offset);
  }
}

APOLLO_DEVICE int64_t scale_blocks(const Matrix& p) {
  return p.channels > 0 ? (p.channels + kScaleChannels - 1) / kScaleChannels : 1;
}

// Of every block of `scale`: |R|^2, |N|^2 and q for one scale per tensor, else u^2.
APOLLO_DEVICE double* parts_of(const Matrix& p, const Launch& launch) {
  return reinterpret_cast<double*>(launch.workspace + p.parts);
}

__global__ void __launch_bounds__(kScaleChannels) scale_channels(Launch launch) {
  __shared__ float norms[2][kScaleChannels];
  __shared__ double scratch[8];
  const Hyper& h = launch.hyper;
  if (skipped(h)) return;
  const int32_t matrix = launch.map[blockIdx.x];
  const Matrix& p = static_cast<const Matrix*>(launch.table)[matrix];
  const int64_t block = int64_t(blockIdx.x) - p.first_scale, c0 = block * kScaleChannels;
  const int thread = int(threadIdx.x);
  const int64_t c = c0 + thread;
  // `limit` cannot read the step: it may be another matrix's too, whose block is writing it.
  if (block == 0 && thread == 0) record_of(launch, matrix).t = *p.step + 1;
  const float clip = clip_factor(h);
  float rr = 0.0f, nn = 0.0f, q = 0.0f;
  if (summed(p)) {
    for (int i = 0; i < 32; ++i) {
      const int channel = thread / 32 * 32 + i;
      if (c0 + channel >= p.channels) break;
      sum_chunks(p, launch, c0 + channel, clip, rr, nn);
      if (thread % 32 == 0) {
        norms[0][channel] = rr;
        norms[1][channel] = nn;
      }
    }
    __syncthreads();  // each thread takes the norms of its channel
    rr = c < p.channels ? norms[0][thread] : 0.0f;
    nn = c < p.channels ? norms[1][thread] : 0.0f;
  } else if (c < p.channels) {
    const int64_t tiles = p.rank_tiles;
    const float* sums = r_of(p, launch, 0) + c;
    for (int64_t i = 0; i < tiles; ++i) {
      rr += sums[i * p.channels];
      nn += sums[(tiles + i) * p.channels];
    }
  }
  if (c < p.channels) {
    const float factor = sign_and_scale(h) * clip;
    for (int64_t i = 0; i < p.q_rows; ++i) q += q_of(p, launch, i)[c];
    q = factor * (factor * q);  // the square alone could underflow
  }
  double* parts = parts_of(p, launch) + block;
  const int64_t blocks = scale_blocks(p);
  if (h.tensor_scale) {
    const double sums[3] = {block_sum(rr, scratch), block_sum(nn, scratch), block_sum(q, scratch)};
    if (thread == 0) {
      for (int i = 0; i < 3; ++i) parts[i * blocks] = sums[i];
    }
  } else {
    const float sc = sqrtf(nn) / (sqrtf(rr) + float(kTiny));
    if (c < p.channels) launch.workspace[p.s + c] = sc;
    const double u2 = block_sum(c < p.channels ? sc * sc * q : 0.0f, scratch);
    if (thread == 0) parts[0] = u2;
  }
}

__global__ void __launch_bounds__(kScaleChannels) limit_update(Launch launch) {
  __shared__ double scratch[8];
  const Hyper& h = launch.hyper;
  if (skipped(h)) return;
  const Matrix& p = static_cast<const Matrix*>(launch.table)[blockIdx.x];
  const int64_t blocks = scale_blocks(p);
  const double* parts = parts_of(p, launch);
  double sums[3] = {};
  for (int i = 0; i < (h.tensor_scale ? 3 : 1); ++i) {
    for (int64_t b = threadIdx.x; b < blocks; b += kScaleChannels) sums[i] += parts[i * blocks + b];
    sums[i] = block_sum(sums[i], scratch);
  }
  if (threadIdx.x != 0) return;
  double s = 1.0, u2 = sums[0];
  if (h.tensor_scale) {
    s = sqrt(sums[1]) / (sqrt(sums[0]) + kTiny);
    u2 = s * s * sums[2];
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
  Record& record = record_of(launch, blockIdx.x);
  const Keep keep = keep_of(h);
  record.f = float(step_size(h, double(record.t)) * double(alpha) * double(factor) *
                   double(sign_and_scale(h)) * double(clip_factor(h)) * s);
  record.keep_high = keep.high;
  record.keep_low = keep.low;
  record.skip = ok ? 0 : 1;
  if (p.flags & kLeads) *p.step = record.t;
  auto* counters = reinterpret_cast<unsigned long long*>(h.counters);
  atomicAdd(counters + (ok ? 0 : 2), 1ull);
  if (factor < 1.0f) atomicAdd(counters + 1, 1ull);
}

}  // namespace apollo
