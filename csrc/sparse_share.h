// How a matrix is dealt out in project_sparse.cuh, for the plan and for the kernel.
#pragma once

#include "apollo.h"
#include "device.h"

namespace apollo {

// At rank 1 every entry is a sign, and project_dots draws them.
constexpr bool uses_sparse_kernel(RankClass rank) { return rank != kRankOne; }

// How project_sparse.cuh deals the rank rows of a matrix out: `holders` (lanes, or warps) hold a
// unit of neighbouring rows each. Where all units fit several times, so many slots share the blocks
// of r between them; where they do not fit, rank tiles of `width` units divide them, and each reads
// only the k that belong to its rows.
struct RankShare {
  uint32_t tiles, width, slots;
};
APOLLO_HOST_DEVICE constexpr RankShare share_ranks(uint32_t rank, uint32_t unit, uint32_t holders) {
  const uint32_t units = rank / unit + (rank % unit != 0);
  const uint32_t tiles = units / holders + (units % holders != 0);
  const uint32_t width = tiles > 0 ? units / tiles + (units % tiles != 0) : 1;
  return {tiles, width, holders / width};
}
// A lane or a warp holds a unit of rank rows: by row, of what it loads at once where the rank is a
// multiple of 8, else a single one; by column, of what fits its registers.
APOLLO_HOST_DEVICE constexpr int sparse_load(int dtype) {
  return dtype == kFloat32 ? 4 : 8;  // elements in 16 bytes
}
APOLLO_HOST_DEVICE constexpr int sparse_unit(int dtype, uint32_t rank, bool by_row) {
  return !by_row ? 32 / sparse_load(dtype) : rank % 8 == 0 ? sparse_load(dtype) : 1;
}
// Channels of a warp by row, and of a block.
APOLLO_HOST_DEVICE constexpr int sparse_warp_channels(int unit) { return unit == 8 ? 4 : 8; }
APOLLO_HOST_DEVICE constexpr int sparse_channels(int dtype, uint32_t rank, bool by_row) {
  return by_row ? 8 * sparse_warp_channels(sparse_unit(dtype, rank, true))
                : 32 * sparse_load(dtype);
}

}  // namespace apollo
