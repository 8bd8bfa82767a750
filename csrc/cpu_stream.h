// The CPU's passes that memory bounds: projections of low rank, and the update of the weights. Each
// reads a matrix once where PyTorch reads or writes it several times. Processors without AVX512
// take PyTorch's way.
#pragma once

#include "cpu_element.h"

namespace apollo {

constexpr int64_t kThinRank = 7;  // up to here a projection is bound by reading X

// A matrix X [channels, k], channels as rows (ld apart) or as columns of k rows (ld apart).
struct CpuThin {
  const void* x;
  CpuElement element;
  int64_t channels, k, ld;
  bool rows;
  const uint16_t* z;  // [rank, k] bf16
  int64_t rank;       // 0 (only q is wanted) to kThinRank
  float scale;        // rank^-1/2, applied to the sums
  float* r;           // [channels, rank]
  float* q;           // [channels], squared norms
};

struct CpuApply {
  void* w;  // [outer, inner], rows w_ld apart
  const void* x;
  CpuElement element;
  int64_t outer, inner, w_ld, x_ld;
  const float* coefficient;  // [outer] if by_row, `apart` from each other; else [inner]
  int64_t apart;             // 1; 0 if by_row and one serves all
  bool by_row;
  double decay;  // lr wd
};

bool cpu_supported();
void cpu_project_thin(const CpuThin& args, int threads);
void cpu_apply(const CpuApply& args, int threads);

}  // namespace apollo
