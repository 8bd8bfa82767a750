// The CPU's pass over R and the moments: Adam's update, and the norms that the scales are made of.
#pragma once

#include <cstdint>

namespace apollo {

struct CpuMoments {
  const float* r;  // [channels, rank], R
  const float* q;  // [channels], squared channel norms
  float* m;        // [channels, rank], M and V, in place
  float* v;
  int64_t channels, rank;
  double beta1, beta2, eps;
  float factor;      // what R and, twice, q are multiplied with
  bool per_channel;  // scale_type "channel"; else "tensor"
  float* s;          // [channels], or [1]
};

// Returns u^2, the squared norm of the scaled gradient, as float32 has it.
float cpu_scale(const CpuMoments& args, int threads);

// The two halves of it for "channel": moments and s on this thread, without q; and u^2 of all.
void cpu_scale_channels(const CpuMoments& args);
float cpu_square_norm(const CpuMoments& args);

}  // namespace apollo
