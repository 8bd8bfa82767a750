// What a block of project_mma.cuh does with its accumulators. Where it holds all of K it updates
// the moments at once and R never reaches memory; else R goes to the workspace, for `scale`.
#pragma once

#include "common.cuh"

namespace apollo {

// Two neighbours of which `left` are there, 0 beyond. PAIRS: they are there or not together, at a
// multiple of 8 bytes.
template <bool PAIRS>
APOLLO_DEVICE float2 load_two(const float* from, int left) {
  if constexpr (PAIRS) {
    return left > 0 ? *reinterpret_cast<const float2*>(from) : float2{0.0f, 0.0f};
  } else {
    return {left > 0 ? from[0] : 0.0f, left > 1 ? from[1] : 0.0f};
  }
}
template <bool PAIRS>
APOLLO_DEVICE void store_two(float* to, float2 x, int left) {
  if constexpr (PAIRS) {
    if (left > 0) *reinterpret_cast<float2*>(to) = x;
  } else {
    if (left > 0) to[0] = x.x;
    if (left > 1) to[1] = x.y;
  }
}

APOLLO_DEVICE bool in_pairs(const Matrix& p) {
  const auto addresses =
      reinterpret_cast<uintptr_t>(p.exp_avg) | reinterpret_cast<uintptr_t>(p.exp_avg_sq);
  return p.rank % 2 == 0 && addresses % 8 == 0 && p.r % 2 == 0;
}

// A warp's share of the tile, in rows of 8 channels: 4 lanes hold a channel.
template <bool PAIRS, class PRODUCT>
struct Epilogue {
  static constexpr int kRows = 2 * PRODUCT::kM;
  const PRODUCT& product;
  float factor;
  int channels, ranks;  // that are left from the lane's first on
  int stride;           // of a row of channels, in entries

  APOLLO_DEVICE int left(int row) const { return 8 * row < channels ? ranks : 0; }
  APOLLO_DEVICE float2 r(int row, int n) const {
    const int there = left(row) - 8 * n;
    return {there > 0 ? factor * product.sum(row, n, 0) : 0.0f,
            there > 1 ? factor * product.sum(row, n, 1) : 0.0f};
  }

  APOLLO_DEVICE void store(float* r_workspace) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        store_two<PAIRS>(r_workspace + 8 * n, r(row, n), left(row) - 8 * n);
      }
      r_workspace += stride;
    }
  }

  // Moments, and the sums of squares of R and N per channel of the warp's rank rows.
  APOLLO_DEVICE void update(float* exp_avg, float* exp_avg_sq, const Hyper& h,
                            float* sums_smem) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float2 m[4], v[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {  // all loads before the first store
        m[n] = load_two<PAIRS>(exp_avg + 8 * n, left(row) - 8 * n);
        v[n] = load_two<PAIRS>(exp_avg_sq + 8 * n, left(row) - 8 * n);
      }
      float rr = 0.0f, nn = 0.0f;
      const auto update_one = [&](float r, float& m, float& v) {
        update_moments(r, m, v, h);
        const float n = normalized(m, v, h);
        rr = fmaf(r, r, rr);
        nn = fmaf(n, n, nn);
      };
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float2 both = r(row, n);
        update_one(both.x, m[n].x, v[n].x);
        update_one(both.y, m[n].y, v[n].y);
        store_two<PAIRS>(exp_avg + 8 * n, m[n], left(row) - 8 * n);
        store_two<PAIRS>(exp_avg_sq + 8 * n, v[n], left(row) - 8 * n);
      }
      exp_avg += stride;
      exp_avg_sq += stride;
      for (int offset = 1; offset < 4; offset *= 2) {
        rr += __shfl_xor_sync(0xFFFFFFFFu, rr, offset);
        nn += __shfl_xor_sync(0xFFFFFFFFu, nn, offset);
      }
      if (threadIdx.x % 4 == 0) *reinterpret_cast<float2*>(sums_smem + 16 * row) = {rr, nn};
    }
  }
};

// scratch_smem holds two floats per channel and 32 rank rows.
template <bool PAIRS, class PRODUCT>
APOLLO_DEVICE void finish_tile(const PRODUCT& product, const Matrix& p, const Launch& launch,
                               int c0, int j0, int chunk, float* scratch_smem) {
  constexpr int kChannels = PRODUCT::kChannels;
  const int rank = int(p.rank), channels = int(p.channels);
  const int channel = PRODUCT::warp_channel() + int(threadIdx.x % 32) / 4;
  const int c = c0 + channel, j = j0 + PRODUCT::warp_rank() + 2 * int(threadIdx.x % 4);
  const float factor = rsqrtf(float(rank)) * sign_and_scale(launch.hyper);
  const Epilogue<PAIRS, PRODUCT> epilogue = {product, factor, channels - c, rank - j, 8 * rank};
  const int64_t entry = int64_t(c) * rank + j;
  if (summed(p)) {
    epilogue.store(global(r_of(p, launch, chunk)) + entry);
    return;
  }
  float* sums_smem = scratch_smem + (PRODUCT::warp_rank() / 32 * kChannels + channel) * 2;
  epilogue.update(global(p.exp_avg) + entry, global(p.exp_avg_sq) + entry, launch.hyper, sums_smem);
  __syncthreads();  // all warps' sums are there
  const int row = int(threadIdx.x);
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
