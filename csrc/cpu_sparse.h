// The CPU's pass of the sparse projection: one addition per element, whatever the rank. Processors
// without AVX512 take PyTorch's way (reference.py).
#pragma once

#include "cpu_element.h"

namespace apollo {

// A matrix X [channels, k], channels as rows (ld apart) or as columns of k rows (ld apart).
struct CpuSparse {
  const void* x;
  CpuElement element;
  int64_t channels, k, ld;
  bool rows;
  const uint32_t* places;  // [k]: the row of R, and in the highest bit whether the sign is minus
  int64_t rank;            // at least 1
  float* r;                // [channels, rank]
  float* q;                // [channels], squared norms
};

void cpu_project_sparse(const CpuSparse& args, int threads);

}  // namespace apollo
