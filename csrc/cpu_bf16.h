// The CPU's passes over bf16 gradients, which PyTorch cannot express: a bf16 matmul with a float32
// result, and an update without float32 copies. Processors without AVX512-BF16 take PyTorch's way.
#pragma once

#include <cstdint>

namespace apollo {

// A matrix X [channels, k] of bf16, channels as rows (ld apart) or as columns of k rows (ld apart).
struct CpuProject {
  const uint16_t* x;
  int64_t channels, k, ld;
  bool rows;
  const uint16_t* z;  // rows and rank <= kDotRank: [rank, k]; else pairs [(k + 1) / 2, padded, 2]
  int64_t rank, padded;
  float scale;  // rank^-1/2, applied to the sums
  float* r;     // [channels, rank]
  float* q;     // [channels], squared norms
};

constexpr int64_t kDotRank = 4;

struct CpuApply {
  uint16_t* w;  // [outer, inner], rows w_ld apart
  const uint16_t* x;
  int64_t outer, inner, w_ld, x_ld;
  const float* coefficient;  // [outer] or [inner]
  bool by_row;
  double decay;  // lr wd
};

bool cpu_bf16_supported();
void cpu_project(const CpuProject& args, int threads);
void cpu_apply(const CpuApply& args, int threads);

}  // namespace apollo
