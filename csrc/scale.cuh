// scale: from R (or the sums that `project` left) to s_c and the parts of u^2; then
// limit: one block per parameter decides on the norm-growth limiter and counts the step.
// Both are small: at most 16 r bytes per channel, and a few floats per parameter.
#pragma once

#include "common.cuh"

namespace apollo {

// |R_c|^2 and |N_c|^2 of one channel by one warp, which sums the chunks of K and updates the
// moments.
APOLLO_DEVICE void sum_chunks(const Parameter& p, const Launch& launch, int64_t c, float& rr,
                              float& nn) {
  const float* partial = launch.workspace + p.partial;
  rr = nn = 0.0f;
  for (int64_t j = threadIdx.x % 32; j < p.rank; j += 32) {
    const int64_t at = c * p.rank + j;
    float r = 0.0f;
    for (int64_t i = 0; i < p.chunks; ++i) r += partial[i * p.channels * p.rank + at];
    const float n = update_moments(r, p.exp_avg[at], p.exp_avg_sq[at], launch.hyper);
    rr = fmaf(r, r, rr);
    nn = fmaf(n, n, nn);
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    rr += __shfl_xor_sync(0xFFFFFFFFu, rr, offset);
    nn += __shfl_xor_sync(0xFFFFFFFFu, nn, offset);
  }
}

// Where a block's parts lie: [3, blocks] after p.parts, then {f, skip}.
APOLLO_DEVICE int64_t scale_blocks(const Parameter& p) {
  return (p.channels + kScaleChannels - 1) / kScaleChannels;
}

__global__ void __launch_bounds__(kScaleChannels)
    scale_channels(Launch launch, int summed, int rank_tile) {
  __shared__ float norms[2][kScaleChannels];
  __shared__ float scratch[8];
  const Hyper& h = launch.hyper;
  if (skipped(h)) return;
  const Parameter& p = static_cast<const Parameter*>(launch.table)[launch.map[blockIdx.x]];
  const int64_t block = int64_t(blockIdx.x) - p.first_scale, c0 = block * kScaleChannels;
  const int own = int(threadIdx.x);
  const int64_t c = c0 + own;
  float rr = 0.0f, nn = 0.0f, q = 0.0f;
  if (summed || p.chunks > 1) {
    for (int i = 0; i < 32; ++i) {
      const int channel = own / 32 * 32 + i;
      if (c0 + channel >= p.channels) break;
      sum_chunks(p, launch, c0 + channel, rr, nn);
      if (own % 32 == 0) {
        norms[0][channel] = rr;
        norms[1][channel] = nn;
      }
    }
    __syncthreads();
    rr = c < p.channels ? norms[0][own] : 0.0f;
    nn = c < p.channels ? norms[1][own] : 0.0f;
  } else if (c < p.channels) {
    const int64_t tiles = (p.rank + rank_tile - 1) / rank_tile;
    const float* sums = launch.workspace + p.sums + c;
    for (int64_t i = 0; i < tiles; ++i) {
      rr += sums[i * p.channels];
      nn += sums[(tiles + i) * p.channels];
    }
  }
  float* s = launch.workspace + p.channel;
  if (c < p.channels) {
    const float factor = sign_and_scale(h);
    for (int64_t i = 0; i < p.chunks; ++i) q += s[(1 + i) * p.channels + c];
    q *= factor * factor;
  }
  float* parts = launch.workspace + p.parts + block;
  const int64_t blocks = scale_blocks(p);
  if (h.tensor_scale) {
    rr = block_sum(rr, scratch);
    nn = block_sum(nn, scratch);
    q = block_sum(q, scratch);
    if (own == 0) {
      parts[0] = rr;
      parts[blocks] = nn;
      parts[2 * blocks] = q;
    }
  } else {
    const float sc = sqrtf(nn) / (sqrtf(rr) + 1e-8f);
    if (c < p.channels) s[c] = sc;
    const float u2 = block_sum(c < p.channels ? sc * sc * q : 0.0f, scratch);
    if (own == 0) parts[0] = u2;
  }
}

// 1 - beta^t; expm1, since powf in float32 is off by 1e-5.
APOLLO_DEVICE double one_minus_power(double beta, double t) {
  return beta > 0.0 ? -expm1(t * log(beta)) : 1.0;
}

__global__ void __launch_bounds__(kScaleChannels) limit_update(Launch launch) {
  __shared__ float scratch[8];
  const Hyper& h = launch.hyper;
  if (skipped(h)) return;
  const Parameter& p = static_cast<const Parameter*>(launch.table)[blockIdx.x];
  const int64_t blocks = scale_blocks(p);
  const float* parts = launch.workspace + p.parts;
  float sums[3] = {};
  for (int kind = 0; kind < (h.tensor_scale ? 3 : 1); ++kind) {
    for (int64_t i = threadIdx.x; i < blocks; i += kScaleChannels) {
      sums[kind] += parts[kind * blocks + i];
    }
    sums[kind] = block_sum(sums[kind], scratch);
  }
  if (threadIdx.x != 0) return;
  float s = 1.0f, u2 = sums[0];
  if (h.tensor_scale) {
    s = sqrtf(sums[1]) / (sqrtf(sums[0]) + 1e-8f);
    u2 = s * s * sums[2];
  }
  const float alpha = float(sqrt(h.scale));
  const float u = sqrtf(u2) * (h.scale_front ? alpha : 1.0f);
  const bool ok = finite(u);
  float factor = 1.0f;
  if (ok && !h.disable_nl) {
    const float previous = *p.update_norm;
    if (previous >= 1e-8f) factor = 1.0f / fmaxf(u / (previous + 1e-8f) / 1.01f, 1.0f);
    *p.update_norm = u * factor;
  }
  const double t = double(*p.step) + 1.0;
  double step = learning_rate(h);
  if (h.correct_bias) {
    step *= sqrt(one_minus_power(h.beta2, t)) / one_minus_power(h.beta1, t);
  }
  float* control = launch.workspace + p.parts + 3 * blocks;
  control[0] = float(step * double(alpha) * double(factor) * double(sign_and_scale(h)) * double(s));
  control[1] = ok ? 0.0f : 1.0f;
  *p.step = float(t);
  auto* counters = reinterpret_cast<unsigned long long*>(h.counters);
  atomicAdd(counters + (ok ? 0 : 2), 1ull);
  if (factor < 1.0f) atomicAdd(counters + 1, 1ull);
}

}  // namespace apollo
