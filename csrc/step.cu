// The launches: from dtypes and rank to a kernel. Read by nvcc, and by g++ for the tests' build.
#include "apply.cuh"
#include "project.cuh"
#include "scale.cuh"

namespace apollo {
namespace {

constexpr int64_t kDotRank = 7;  // up to this rank the tensor cores' tiles would lie mostly idle

int rank_tile(int64_t group_rank) { return group_rank <= 64 ? 64 : 128; }

#if defined(__CUDACC__)
int finish() { return int(cudaGetLastError()); }
// Beyond 48 KB a kernel has to ask, on each device.
template <class Kernel>
int reserve(Kernel kernel, int shared) {
  if (shared <= 48 * 1024) return 0;
  return int(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
}
using Stream = cudaStream_t;
#else
int finish() { return 0; }
template <class Kernel>
int reserve(Kernel, int) {
  return 0;
}
using Stream = void*;
#endif

[[maybe_unused]] Stream stream_of(const Launch& launch) {
  return static_cast<Stream>(launch.stream);
}
dim3 grid_of(const Launch& launch) { return dim3(static_cast<unsigned>(launch.blocks)); }

template <class T, int RANKS, bool SIGNS>
int launch_tiles(const Launch& launch) {
  constexpr int kShared = TileLayout<T, RANKS>::kShared;
  if (const int error = reserve(project_tiles<T, RANKS, SIGNS>, kShared)) return error;
  APOLLO_LAUNCH((project_tiles<T, RANKS, SIGNS>), grid_of(launch), dim3(kTileThreads), kShared,
                stream_of(launch), launch);
  return finish();
}

template <class T, int R, bool SIGNS>
int launch_dots(const Launch& launch) {
  APOLLO_LAUNCH((project_dots<T, R, SIGNS>), grid_of(launch), dim3(kDotThreads), kDotShared<R>,
                stream_of(launch), launch);
  return finish();
}

template <class T, bool SIGNS>
int project_as(const Launch& launch) {
  if (launch.rank == 1) return launch_dots<T, 1, SIGNS>(launch);
  if (launch.rank <= 4) return launch_dots<T, 4, SIGNS>(launch);
  if (launch.rank <= kDotRank) return launch_dots<T, 7, SIGNS>(launch);
  if (rank_tile(launch.rank) == 64) return launch_tiles<T, 64, SIGNS>(launch);
  return launch_tiles<T, 128, SIGNS>(launch);
}

// Calls work with a value of the element type that `dtype` names.
template <class Work>
int with_dtype(int dtype, Work work) {
  switch (dtype) {
    case kFloat32:
      return work(float{});
    case kBfloat16:
      return work(bfloat16{});
    default:
      return work(float16{});
  }
}

}  // namespace

Tiling tiling(int64_t channels, int64_t k, int64_t rank, int64_t group_rank, int grad_dtype,
              bool by_row) {
  const bool dots = group_rank <= kDotRank;
  Tiling t{};
  t.channel_tile = dots ? (by_row ? kDotChannels : kDotColumns)
                        : (grad_dtype == kBfloat16 ? kChannelTile<bfloat16> : kChannelTile<float>);
  t.rank_tile = dots ? kDotRank : rank_tile(group_rank);
  t.channel_tiles = (channels + t.channel_tile - 1) / t.channel_tile;
  t.rank_tiles = (rank + t.rank_tile - 1) / t.rank_tile;
  // Few tiles are split along K, for the sake of a lone tensor; a fixed rule of the shapes, so that
  // the bits depend neither on the device nor on what else is in the launch.
  const int64_t tiles = t.channel_tiles * t.rank_tiles;
  const int64_t wanted = tiles > 0 ? (tiles < 8 ? 8 / tiles : 1) : 1;
  const int64_t longest = 65536, shortest = 1024;
  int64_t chunks = wanted * shortest <= k ? wanted : (k / shortest > 1 ? k / shortest : 1);
  if (chunks * longest < k) chunks = (k + longest - 1) / longest;
  t.chunk_length = (k + chunks - 1) / chunks;
  t.chunk_length = (t.chunk_length + 1023) / 1024 * 1024;  // whole runs of signs, and slabs
  t.chunks = k > 0 ? (k + t.chunk_length - 1) / t.chunk_length : 1;
  t.fused = !dots && t.chunks == 1;
  return t;
}

int project(const Launch& launch) {
  if (launch.blocks == 0) return 0;
  return with_dtype(launch.grad_dtype, [&](auto g) {
    using G = decltype(g);
    return launch.hyper.rademacher ? project_as<G, true>(launch) : project_as<G, false>(launch);
  });
}

int scale(const Launch& launch) {
  if (launch.blocks == 0) return 0;
  const int summed = launch.rank <= kDotRank;
  APOLLO_LAUNCH(scale_channels, grid_of(launch), dim3(kScaleChannels), 0, stream_of(launch), launch,
                summed, rank_tile(launch.rank));
  return finish();
}

int limit(const Launch& launch) {
  if (launch.blocks == 0) return 0;
  APOLLO_LAUNCH(limit_update, grid_of(launch), dim3(kScaleChannels), 0, stream_of(launch), launch);
  return finish();
}

int apply(const Launch& launch) {
  if (launch.blocks == 0) return 0;
  return with_dtype(launch.weight_dtype, [&](auto w) {
    return with_dtype(launch.grad_dtype, [&](auto g) {
      APOLLO_LAUNCH((apply_update<decltype(w), decltype(g)>), grid_of(launch), dim3(256), 0,
                    stream_of(launch), launch);
      return finish();
    });
  });
}

int adamw(const Launch& launch) {
  if (launch.blocks == 0) return 0;
  return with_dtype(launch.weight_dtype, [&](auto w) {
    return with_dtype(launch.grad_dtype, [&](auto g) {
      APOLLO_LAUNCH((adamw_update<decltype(w), decltype(g)>), grid_of(launch), dim3(256), 0,
                    stream_of(launch), launch);
      return finish();
    });
  });
}

int advance(const Launch& launch) {
  if (launch.blocks == 0) return 0;
  const dim3 grid(static_cast<unsigned>((launch.blocks + 255) / 256));
  APOLLO_LAUNCH(advance_steps, grid, dim3(256), 0, stream_of(launch), launch);
  return finish();
}

#if defined(__CUDACC__)
const char* error_name(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
int current_device(int* device) { return int(cudaGetDevice(device)); }
int use_device(int device) { return int(cudaSetDevice(device)); }
int probe() {
  cudaFuncAttributes attributes;
  return int(cudaFuncGetAttributes(&attributes, limit_update));
}
#else
const char* error_name(int) { return "emulated"; }
int current_device(int* device) { return *device = 0; }
int use_device(int) { return 0; }
int probe() { return 0; }
#endif

}  // namespace apollo
