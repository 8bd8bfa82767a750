// Parts of matrices, between whose verbs other ranks' sums come: what goes to the owners of
// channels where the contracted side is cut, and the limiter by itself, once norms are sums over
// all ranks.
#pragma once

#include "common.cuh"
#include "scale.cuh"

namespace apollo {

// After `project`: for each owner R and q of its channels, with the chunks of this part's K added
// up in order, and zeros where the last owners have less than their share. Blocks are those that
// `scale` has for all channels.
__global__ void __launch_bounds__(kScaleThreads) send_sums(Launch launch) {
  const Matrix p = matrix_of(launch);
  const bool nothing = skipped(launch.hyper);
  const int rank = int(p.rank), shift = scale_shift(rank, true), lanes = 1 << shift;
  const int64_t thread = (int64_t(blockIdx.x) - p.first_scale) * kScaleThreads + threadIdx.x;
  const int64_t together = scale_blocks(p.channels, shift) * (kScaleThreads >> shift);
  for (int64_t c = thread >> shift; c < launch.owners * p.share; c += together) {
    float* to = launch.sent + c / p.share * launch.sent_floats;
    const int64_t row = c % p.share;
    const bool here = c < p.channels && !nothing;
    for (int j = int(thread) & (lanes - 1); j < rank; j += lanes) {
      float r = 0.0f;
      for (int64_t i = 0; here && i < p.chunks; ++i) r += r_of(p, launch, i)[c * rank + j];
      to[p.sent_r + row * rank + j] = r;
    }
    if ((thread & (lanes - 1)) != 0) continue;
    float q = 0.0f;
    for (int64_t i = 0; here && i < p.q_rows; ++i) q += q_of(p, launch, i)[c];
    to[p.sent_q + row] = q;
  }
}

// After scale_parts: a thread per matrix.
__global__ void __launch_bounds__(kScaleThreads) limit_parts(Launch launch) {
  const int64_t i = int64_t(blockIdx.x) * kScaleThreads + threadIdx.x;
  if (skipped(launch.hyper) || i >= launch.blocks) return;
  const int count = norms_of(launch.hyper);
  Norms norms;
  for (int n = 0; n < 3; ++n) norms.sums[n] = n < count ? launch.norms[count * i + n] : 0.0;
  limit_update(static_cast<const Matrix*>(launch.table)[i], launch, record_of(launch, i), norms);
}

}  // namespace apollo
