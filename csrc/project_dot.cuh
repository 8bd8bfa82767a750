// project for rank < 8: the same stream of X with multiply-adds in float32, memory bound. R always
// goes to the workspace.
#pragma once

#include "common.cuh"
#include "draw.cuh"

namespace apollo {

constexpr int kDotThreads = 256;
constexpr int kDotSlab = 1024;  // K per stage

// A lane sums up 8 channels: one after the other, or side by side in vectors of 16 bytes.
// Neighbouring lanes load neighbouring vectors.
template <class T, int R, bool BY_ROW>
struct Dots {
  static constexpr int kLaneChannels = 8, kVector = 16 / int(sizeof(T));
  using Vector = Pack<T, kVector>;
  float sums[kLaneChannels][R + 1] = {};  // R dot products and the squared norm

  // A slab of Z as floats, z[j][k], meets the slab's k of this block's channels. Several loads are
  // under way before the first is used.
  APOLLO_DEVICE void add(const Matrix& p, int64_t c0, int64_t k0, int64_t k_end, const float* z,
                         bool wide) {
    const T* grad = static_cast<const T*>(p.x);
    const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
    const int last = k_end - k0 < kDotSlab ? int(k_end - k0) : kDotSlab;
    if constexpr (BY_ROW) {
      constexpr int kAhead = 32 / kVector;
      for (int slab_k = kVector * lane; slab_k < last; slab_k += 32 * kVector) {
#pragma unroll
        for (int first = 0; first < kLaneChannels; first += kAhead) {
          Vector packs[kAhead];
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
            const int64_t c = c0 + 8 * warp + first + i;
            packs[i].load(grad + c * p.grad_ld + k0 + slab_k, c < p.channels ? last - slab_k : 0,
                          wide);
          }
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
            float x[kVector];
            packs[i].get(x);
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
              add_entry(sums[first + i], x[e], z + slab_k + e);
            }
          }
        }
      }
    } else {
      constexpr int kAhead = 4, kVectors = kLaneChannels / kVector;
      const int64_t c = c0 + lane_channel(lane, 0);
      if (c >= p.channels) return;
      for (int first = warp; first < last; first += 8 * kAhead) {
        Vector packs[kAhead][kVectors];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          const int slab_k = first + 8 * a;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            const int64_t next_c = c + lane_channel(0, kVector * v);
            packs[a][v].load(grad + (k0 + slab_k) * p.grad_ld + next_c,
                             slab_k < last ? p.channels - next_c : 0, wide);
          }
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            float x[kVector];
            packs[a][v].get(x);
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
              add_entry(sums[kVector * v + e], x[e], z + first + 8 * a);
            }
          }
        }
      }
    }
  }

  APOLLO_DEVICE static void add_entry(float (&channel)[R + 1], float x, const float* z) {
    channel[R] = fmaf(x, x, channel[R]);
#pragma unroll
    for (int j = 0; j < R; ++j) channel[j] = fmaf(x, z[j * kDotSlab], channel[j]);
  }

  // Where a lane's i-th channel lies in a tile of columns.
  APOLLO_DEVICE static int lane_channel(int lane, int i) {
    return i / kVector * 32 * kVector + lane * kVector + i % kVector;
  }

  // Adds up what lanes or warps hold, in fixed order; `scratch` holds 256 floats per warp.
  APOLLO_DEVICE void finish(const Matrix& p, const Launch& launch, int64_t c0, int64_t chunk,
                            float* scratch) {
    const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
    const float factor = rsqrtf(float(p.rank)) * sign_and_scale(launch.hyper);
    float *r_workspace = r_of(p, launch, chunk), *q = q_of(p, launch, chunk);
#pragma unroll
    for (int j = 0; j <= R; ++j) {
      if (j < R && j >= p.rank) continue;
      if constexpr (BY_ROW) {
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) {
          float sum = sums[i][j];
          for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, o);
          const int64_t c = c0 + 8 * warp + i;
          if (lane == 0 && c < p.channels) {
            if (j == R) {
              q[c] = sum;
            } else {
              r_workspace[c * p.rank + j] = factor * sum;
            }
          }
        }
      } else {
        for (int i = 0; i < kLaneChannels; ++i) {
          scratch[256 * warp + lane_channel(lane, i)] = sums[i][j];
        }
        __syncthreads();  // every warp's share is there
        float sum = 0.0f;
        for (int w = 0; w < 8; ++w) sum += scratch[256 * w + threadIdx.x];
        const int64_t c = c0 + threadIdx.x;
        if (c < p.channels) {
          if (j == R) {
            q[c] = sum;
          } else {
            r_workspace[c * p.rank + j] = factor * sum;
          }
        }
        __syncthreads();  // and was read before the next row overwrites it
      }
    }
  }
};

template <class T, int R, class DISTRIBUTION, bool BY_ROW>
APOLLO_DEVICE void project_dot(const Matrix& p, const Launch& launch, int64_t block,
                               float* shared) {
  constexpr int kChannels = BY_ROW ? kDotChannels : kDotColumns;
  const int64_t tiles = (p.channels + kChannels - 1) / kChannels;
  const int64_t c0 = block % tiles * kChannels, chunk = block / tiles;
  const int64_t k_begin = p.k_begin + chunk * p.chunk_length;
  const int64_t k_end = k_begin + p.chunk_length < p.k_end ? k_begin + p.chunk_length : p.k_end;
  const uint32_t epoch = epoch_of(p, launch);
  const bool wide = aligned16(static_cast<const T*>(p.x), p.grad_ld);
  Dots<T, R, BY_ROW> dots;
  // Rows beyond the rank are multiplied, too, and dropped.
  for (int i = int(p.rank) * kDotSlab + int(threadIdx.x); i < R * kDotSlab; i += kDotThreads) {
    shared[i] = 0.0f;
  }
  for (int64_t k = k_begin; k < k_end; k += kDotSlab) {
    // Beyond K, too: x is zero there, and z has to be finite.
    for (int i = int(threadIdx.x); i < int(p.rank) * kDotSlab / 4; i += kDotThreads) {
      const int j = i / (kDotSlab / 4), call = i % (kDotSlab / 4), slab_k = call / 4 * 16;
      const Stream stream = Stream::of(p, epoch, uint32_t(j), uint32_t(call % 4));
      draw_call<DISTRIBUTION>(shared + j * kDotSlab + slab_k, stream, uint32_t(k + slab_k));
    }
    __syncthreads();  // the slab of z is there
    dots.add(p, c0, k, k_end, shared, wide);
    __syncthreads();  // and was read by all
  }
  dots.finish(p, launch, c0, chunk, shared);
}

template <class T, int R, class DISTRIBUTION>
__global__ void __launch_bounds__(kDotThreads, R > 1            ? 1
                                               : sizeof(T) == 4 ? 2
                                                                : 3) project_dots(Launch launch) {
  APOLLO_SHARED(shared);
  if (skipped(launch.hyper)) return;
  // By value: behind volatile loads a reference would be read again before each of them.
  const Matrix p = matrix_of(launch);
  const int64_t block = int64_t(blockIdx.x) - p.first_project;
  float* z = reinterpret_cast<float*>(shared);
  if (by_row(p)) {
    project_dot<T, R, DISTRIBUTION, true>(p, launch, block, z);
  } else {
    project_dot<T, R, DISTRIBUTION, false>(p, launch, block, z);
  }
}

template <int R>
constexpr int kDotShared = (R * kDotSlab > 2048 ? R * kDotSlab : 2048) * int(sizeof(float));

}  // namespace apollo
