// project for the head of a part: the few k before the first one where a block of numbers begins in
// the whole matrix, less than kStep or, in the sparse distribution, than the rank. Its R and q are
// one more chunk of K, the last. Small and general: any dtype, order, rank and distribution.
#pragma once

#include "common.cuh"
#include "draw.cuh"
#include "project_sparse.cuh"

namespace apollo {

constexpr int kHeadThreads = 256;
constexpr int kHeadRanks = 64;  // rows of R at a time

struct Head {
  const Matrix& p;
  const Launch& launch;
  int64_t c0;
  int channels;      // of this block
  uint32_t k0;       // where the block of numbers begins that holds the head
  int first, count;  // the head: k0 + first to k0 + count
  uint32_t epoch;
  float factor;
  float *r, *q;  // of channel c0

  APOLLO_DEVICE float x(int c, int k) const {
    const int64_t ld = p.grad_ld, at = int64_t{k0} + k;
    const int64_t place = by_row(p) ? (c0 + c) * ld + at : at * ld + c0 + c;
    if (launch.grad_dtype == kFloat32) return static_cast<const float*>(p.x)[place];
    if (launch.grad_dtype == kBfloat16) return to_float(static_cast<const bfloat16*>(p.x)[place]);
    return to_float(static_cast<const float16*>(p.x)[place]);
  }
  APOLLO_DEVICE float& entry(int c, uint32_t j) const { return r[c * p.rank + j]; }

  // A thread per channel.
  APOLLO_DEVICE void square() const {
    const int c = int(threadIdx.x);
    if (c >= channels) return;
    float sum = 0.0f;
    for (int k = first; k < count; ++k) sum = fmaf(x(c, k), x(c, k), sum);
    q[c] = sum;
  }

  // Neighbouring threads take neighbouring rows of R.
  template <class DISTRIBUTION>
  APOLLO_DEVICE void multiply(float* z_smem) const {
    constexpr int kPitch = kStep + 1;
    const int rank = int(p.rank);
    for (int j0 = 0; j0 < rank; j0 += kHeadRanks) {
      for (int i = int(threadIdx.x); i < kHeadRanks * 8; i += kHeadThreads) {
        const int row = i / 8, block = i / 4 % 2 * 16;
        const Stream stream = Stream::of(p, epoch, uint32_t(j0 + row), uint32_t(i % 4));
        draw_call<DISTRIBUTION>(z_smem + row * kPitch + block, stream, k0 + uint32_t(block));
      }
      __syncthreads();  // the rows of z are there
      const int row = int(threadIdx.x) % kHeadRanks;
      for (int c = int(threadIdx.x) / kHeadRanks; c < channels; c += kHeadThreads / kHeadRanks) {
        float sum = 0.0f;
        for (int k = first; k < count; ++k) sum = fmaf(x(c, k), z_smem[row * kPitch + k], sum);
        if (j0 + row < rank) entry(c, uint32_t(j0 + row)) = factor * sum;
      }
      __syncthreads();  // and were read by all
    }
  }

  // Each row of R has one k of a block.
  APOLLO_DEVICE void place() const {
    const auto rank = uint32_t(p.rank);
    const bool eighths = rank % 8 == 0;
    const SparseWords numbers = {uint32_t(p.key), uint32_t(p.key >> 32), epoch};
    Places places = {numbers, eighths ? rank / 8 : rank};
    places.move_to(k0 / rank);
    for (uint32_t j = threadIdx.x; j < rank; j += kHeadThreads) {
      const auto k =
          int(eighths ? 8 * places.source(j / 8) + (j % 8 ^ places.turn) : places.source(j));
      float sign[1];
      RowSigns<1>{numbers, j}.get(sign, k0 / rank);
      const bool here = first <= k && k < count;
      for (int c = 0; c < channels; ++c) entry(c, j) = here ? factor * sign[0] * x(c, k) : 0.0f;
    }
  }
};

__global__ void __launch_bounds__(kHeadThreads) project_head(Launch launch) {
  __shared__ float z_smem[kHeadRanks * (kStep + 1)];
  if (skipped(launch.hyper)) return;
  const Matrix& p = matrix_of(launch);
  const int64_t c0 = (int64_t(blockIdx.x) - p.first_head) * kHeadChannels, left = p.channels - c0;
  const int distribution = launch.hyper.distribution;
  const bool places = distribution == kSparse && launch.rank != kRankOne;
  const uint32_t first = uint32_t(p.k_first), block = places ? uint32_t(p.rank) : kStep;
  const uint32_t k0 = first / block * block;
  const float norm = distribution == kSparse ? 1.0f : rsqrtf(float(p.rank));
  const Head head = {p,
                     launch,
                     c0,
                     int(left < kHeadChannels ? left : kHeadChannels),
                     k0,
                     int(first - k0),
                     int(uint32_t(p.k_begin) - k0),
                     epoch_of(p, launch),
                     norm * sign_and_scale(launch.hyper),
                     r_of(p, launch, p.chunks - 1) + c0 * p.rank,
                     q_of(p, launch, p.q_rows - 1) + c0};
  head.square();
  if (places) {
    head.place();
  } else if (distribution == kSparse) {
    head.multiply<SparseSigns>(z_smem);
  } else if (distribution == kRademacher) {
    head.multiply<Signs>(z_smem);
  } else if (distribution == kExactGaussian) {
    head.multiply<ExactGaussian>(z_smem);
  } else {
    head.multiply<Gaussian>(z_smem);
  }
}

}  // namespace apollo
