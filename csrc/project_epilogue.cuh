// What a block of project_mma.cuh does with its accumulators. Where it holds all of K it updates
// the moments at once and R never reaches memory; else R goes to the workspace, for `scale`.
#pragma once

#include "common.cuh"

namespace apollo {

// A warp's share of the tile, in rows of 8 channels: 4 lanes hold a channel.
template <class PRODUCT>
struct Epilogue {
  static constexpr int kRows = 2 * PRODUCT::kM, kTogether = 2;  // loads before the first store
  const PRODUCT& product;
  float factor;
  int channels, ranks;  // that are left from the lane's first on
  int stride;           // of a row of channels, in entries
  bool first_lane;      // of a channel

  APOLLO_DEVICE int left(int row) const { return 8 * row < channels ? ranks : 0; }
  APOLLO_DEVICE void store(float* r_workspace) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const int j = k / 2 * 8 + k % 2;
        if (j < left(row)) r_workspace[j] = factor * product.sum(row, k / 2, k % 2);
      }
      r_workspace += stride;
    }
  }

  // Moments, and the sums of squares of R and N per channel of the warp's rank rows. Neighbours are
  // there or not together, since the rank is even.
  APOLLO_DEVICE void update(float* exp_avg, float* exp_avg_sq, const Hyper& h,
                            float* sums_smem) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float rr = 0.0f, nn = 0.0f;
      const auto update_one = [&](float r, float& m, float& v) {
        update_moments(r, m, v, h);
        const float n = normalized(m, v, h);
        rr = fmaf(r, r, rr);
        nn = fmaf(n, n, nn);
      };
#pragma unroll
      for (int first = 0; first < 4; first += kTogether) {
        float2 m[kTogether] = {}, v[kTogether] = {};
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const int j = 8 * (first + i);
          if (j >= left(row)) continue;
          m[i] = *reinterpret_cast<const float2*>(exp_avg + j);
          v[i] = *reinterpret_cast<const float2*>(exp_avg_sq + j);
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const int n = first + i, j = 8 * n;
          if (j >= left(row)) continue;
          update_one(factor * product.sum(row, n, 0), m[i].x, v[i].x);
          update_one(factor * product.sum(row, n, 1), m[i].y, v[i].y);
          *reinterpret_cast<float2*>(exp_avg + j) = m[i];
          *reinterpret_cast<float2*>(exp_avg_sq + j) = v[i];
        }
      }
      const int next = made_again(stride);
      exp_avg += next;
      exp_avg_sq += next;
      for (int offset = 1; offset < 4; offset *= 2) {
        rr += __shfl_xor_sync(0xFFFFFFFFu, rr, offset);
        nn += __shfl_xor_sync(0xFFFFFFFFu, nn, offset);
      }
      if (first_lane) *reinterpret_cast<float2*>(sums_smem + 16 * row) = {rr, nn};
    }
  }
};

// scratch_smem holds two floats per channel and 32 rank rows.
template <class PRODUCT>
APOLLO_DEVICE void finish_tile(const PRODUCT& product, const Matrix& p, const Launch& launch,
                               int c0, int j0, int chunk, float* scratch_smem, int thread) {
  constexpr int kChannels = PRODUCT::kChannels;
  const int rank = int(p.rank), channels = int(p.channels);
  const int channel = PRODUCT::warp_channel(thread) + thread % 32 / 4;
  const int c = c0 + channel, j = j0 + PRODUCT::warp_rank(thread) + 2 * (thread % 4);
  const float factor = rsqrtf(float(rank)) * sign_and_scale(launch.hyper);
  const Epilogue<PRODUCT> epilogue = {product,  factor,   channels - c,
                                      rank - j, 8 * rank, thread % 4 == 0};
  const int64_t entry = int64_t(c) * rank + j;
  if (summed(p)) {
    epilogue.store(global(r_of(p, launch, chunk)) + entry);
    return;
  }
  float* sums_smem = scratch_smem + (PRODUCT::warp_rank(thread) / 32 * kChannels + channel) * 2;
  epilogue.update(global(p.exp_avg) + entry, global(p.exp_avg_sq) + entry, launch.hyper, sums_smem);
  __syncthreads();  // all warps' sums are there
  const int row = thread;
  if (row < kChannels && c0 + row < channels) {
    float rr = 0.0f, nn = 0.0f;
    for (int i = 0; i < PRODUCT::kWarpsRank; ++i) {
      rr += scratch_smem[(i * kChannels + row) * 2];
      nn += scratch_smem[(i * kChannels + row) * 2 + 1];
    }
    float* sums = r_of(p, launch, 0) + int64_t(j0 / PRODUCT::kRanks) * channels + c0 + row;
    sums[0] = rr;
    sums[p.rank_tiles * channels] = nn;
  }
}

}  // namespace apollo
