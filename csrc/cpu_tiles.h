// The CPU's dense projection by the processor's matrix unit (AMX): products of bf16 with float32
// sums. z is bf16 anyway; wider gradients are cut into pieces of bf16, exactly.
#pragma once

#include "cpu_element.h"

namespace apollo {

// A matrix X [channels, k], channels as rows (ld apart) or as columns of k rows (ld apart).
struct CpuTiles {
  const void* x;
  CpuElement element;
  int64_t channels, k, ld;
  bool rows;
  // Tiles of 16 rank rows and 32 k, [k tiles, padded / 16][512]: in each the 16 pairs of k are the
  // rows, [16][16][2], where channels are rows; else the rank rows are, [16][32]. 0 beyond rank and
  // k.
  const uint16_t* z;
  int64_t rank, padded;  // padded to a multiple of 32
  float scale;           // rank^-1/2, applied to the sums
  float* r;              // [channels, rank]
  float* q;              // [channels], squared norms
};

bool cpu_tiles_supported();
void cpu_project_tiles(const CpuTiles& args, int threads);

}  // namespace apollo
