// What a block of project_mma.cuh does with its accumulators. Where it holds all of K it updates
// the moments at once and R never reaches memory; else R goes to the workspace, for `scale`.
#pragma once

#include "common.cuh"

namespace apollo {

// Moments of every entry of R, and the sums of squares of R and N per channel of this rank tile;
// or, where `scale` sums, R itself. scratch_smem holds two floats per channel and 32 rank rows.
template <class PRODUCT>
APOLLO_DEVICE void finish_tile(const PRODUCT& product, const Matrix& p, const Launch& launch,
                               int c0, int j0, int chunk, float* scratch_smem) {
  constexpr int kRanks = PRODUCT::kRanks, kChannels = PRODUCT::kChannels;
  const Hyper& h = launch.hyper;
  const float factor = rsqrtf(float(p.rank)) * sign_and_scale(h);
  const int lane = int(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  const int channels = int(p.channels), rank = int(p.rank), j = j0 + PRODUCT::warp_rank() + 2 * t;
  const bool summed_later = summed(p);
  float* r_workspace = r_of(p, launch, chunk);
  float *exp_avg = p.exp_avg, *exp_avg_sq = p.exp_avg_sq;
#pragma unroll
  for (int m = 0; m < PRODUCT::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = PRODUCT::warp_channel() + 16 * m + g + 8 * half, c = c0 + row;
      const int64_t entry = int64_t(c) * rank + j;
      const int left = c < channels ? rank - j : 0;
      float rr = 0.0f, nn = 0.0f, m_entries[4][2], v_entries[4][2];
      if (!summed_later) {  // all loads before the first store
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int k = 8 * (i / 2) + i % 2;
          if (k >= left) continue;
          m_entries[i / 2][i % 2] = exp_avg[entry + k];
          v_entries[i / 2][i % 2] = exp_avg_sq[entry + k];
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int n = i / 2, e = i % 2, k = 8 * n + e;
        if (k >= left) continue;
        const float r = factor * product.sum(m, n, half, e);
        if (summed_later) {
          r_workspace[entry + k] = r;
          continue;
        }
        update_moments(r, m_entries[n][e], v_entries[n][e], h);
        const float normal = normalized(m_entries[n][e], v_entries[n][e], h);
        exp_avg[entry + k] = m_entries[n][e];
        exp_avg_sq[entry + k] = v_entries[n][e];
        rr = fmaf(r, r, rr);
        nn = fmaf(normal, normal, nn);
      }
      for (int offset = 1; offset < 4; offset *= 2) {
        rr += __shfl_xor_sync(0xFFFFFFFFu, rr, offset);
        nn += __shfl_xor_sync(0xFFFFFFFFu, nn, offset);
      }
      if (t == 0) {
        const int slot = (PRODUCT::warp_rank() / 32 * kChannels + row) * 2;
        scratch_smem[slot] = rr;
        scratch_smem[slot + 1] = nn;
      }
    }
  }
  __syncthreads();  // all warps' sums are there
  const int row = int(threadIdx.x);
  if (!summed_later && row < kChannels && c0 + row < p.channels) {
    float rr = 0.0f, nn = 0.0f;
    for (int i = 0; i < PRODUCT::kWarpsRank; ++i) {
      rr += scratch_smem[(i * kChannels + row) * 2];
      nn += scratch_smem[(i * kChannels + row) * 2 + 1];
    }
    float* sums = r_of(p, launch, 0) + int64_t(j0 / kRanks) * p.channels + c0 + row;
    sums[0] = rr;
    sums[p.rank_tiles * p.channels] = nn;
  }
}

}  // namespace apollo
