// What a block of project_mma.cuh does with its accumulators. Where it holds all of K it updates
// the moments at once and R never reaches memory; else R goes to the workspace, for `scale`.
#pragma once

#include "common.cuh"

namespace apollo {

// A warp's share of the tile, in rows of 8 channels, of which 4 lanes hold one, and in kN columns
// of 8 rank rows.
template <class PRODUCT>
struct Epilogue {
  static constexpr int kRows = 2 * PRODUCT::kM;
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
      for (int k = 0; k < 2 * PRODUCT::kN; ++k) {
        const int j = k / 2 * 8 + k % 2;
        if (j < left(row)) r_workspace[j] = factor * product.sum(row, k / 2, k % 2);
      }
      r_workspace += stride;
    }
  }

  // A lane's moments of 32 rank rows of a channel, 4 pairs of neighbours each, which are there or
  // not together, since the rank is even.
  struct Moments {
    float2 m[4], v[4];
  };
  static constexpr int kGroups = PRODUCT::kN / 4, kSteps = kRows * kGroups;
  template <bool WHOLE>
  APOLLO_DEVICE void load(Moments& to, const float* exp_avg, const float* exp_avg_sq,
                          int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = 8 * (step % kGroups * 4 + i);
      to.m[i] = to.v[i] = {};
      if (!WHOLE && j >= left(step / kGroups)) continue;
      to.m[i] = *reinterpret_cast<const float2*>(exp_avg + j);
      to.v[i] = *reinterpret_cast<const float2*>(exp_avg_sq + j);
    }
  }

  // Moments, and the sums of squares of R and N per channel of the warp's rank rows. The loads of
  // the next step are under way while one is updated, but for a tile that is not WHOLE within the
  // matrix.
  template <bool WHOLE>
  APOLLO_DEVICE void update(float* exp_avg, float* exp_avg_sq, const Hyper& h,
                            float* sums_smem) const {
    Moments held[2];
    const float *next_m = exp_avg, *next_v = exp_avg_sq;
    const auto load_next = [&](int step) {
      load<WHOLE>(held[step % 2], next_m, next_v, step);
      if (step % kGroups != kGroups - 1) return;
      const int next = made_again(stride);
      next_m += next;
      next_v += next;
    };
    if (WHOLE) load_next(0);
    float rr = 0.0f, nn = 0.0f;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int row = step / kGroups, group = step % kGroups;
      if (!WHOLE) load_next(step);
      if (WHOLE && step + 1 < kSteps) load_next(step + 1);
      Moments& at = held[step % 2];
      const auto update_one = [&](float r, float& m, float& v) {
        update_moments(r, m, v, h);
        const float n = normalized(m, v, h);
        rr = fmaf(r, r, rr);
        nn = fmaf(n, n, nn);
      };
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = 4 * group + i;
        if (!WHOLE && 8 * n >= left(row)) continue;
        update_one(factor * product.sum(row, n, 0), at.m[i].x, at.v[i].x);
        update_one(factor * product.sum(row, n, 1), at.m[i].y, at.v[i].y);
        *reinterpret_cast<float2*>(exp_avg + 8 * n) = at.m[i];
        *reinterpret_cast<float2*>(exp_avg_sq + 8 * n) = at.v[i];
      }
      if (group != kGroups - 1) continue;
      const int next = made_again(stride);
      exp_avg += next;
      exp_avg_sq += next;
      for (int offset = 1; offset < 4; offset *= 2) {
        rr += __shfl_xor_sync(0xFFFFFFFFu, rr, offset);
        nn += __shfl_xor_sync(0xFFFFFFFFu, nn, offset);
      }
      if (first_lane) *reinterpret_cast<float2*>(sums_smem + 16 * row) = {rr, nn};
      rr = nn = 0.0f;
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
  float *exp_avg = global(p.exp_avg) + entry, *exp_avg_sq = global(p.exp_avg_sq) + entry;
  if (channels - c0 >= kChannels && rank - j0 >= PRODUCT::kRanks) {
    epilogue.template update<true>(exp_avg, exp_avg_sq, launch.hyper, sums_smem);
  } else {
    epilogue.template update<false>(exp_avg, exp_avg_sq, launch.hyper, sums_smem);
  }
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
