// The CPU's dense projection of bf16 gradients with AVX512-BF16: a bf16 matmul with a float32
// result, which PyTorch cannot express. Processors with a matrix unit take cpu_tiles.h instead.
#pragma once

#include <cstdint>

namespace apollo {

// A matrix X [channels, k] of bf16, channels as rows (ld apart) or as columns of k rows (ld apart).
struct CpuBf16 {
  const uint16_t* x;
  int64_t channels, k, ld;
  bool rows;
  const uint16_t* z;  // pairs of k, [(k + 1) / 2, padded, 2]
  int64_t rank, padded;
  float scale;  // rank^-1/2, applied to the sums
  float* r;     // [channels, rank]
  float* q;     // [channels], squared norms
};

bool cpu_bf16_supported();
void cpu_project_bf16(const CpuBf16& args, int threads);

}  // namespace apollo
