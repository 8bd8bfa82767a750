// The launches: from dtypes and rank to a kernel. Read by nvcc, and by g++ for the tests' build.
#include "adamw.cuh"
#include "apply.cuh"
#include "parts.cuh"
#include "project_dot.cuh"
#include "project_head.cuh"
#include "project_mma.cuh"
#include "project_sparse.cuh"
#include "scale.cuh"

namespace apollo {
namespace {

#if defined(__CUDACC__)
int finish() { return int(cudaGetLastError()); }
// Brings a kernel onto the current device; beyond 48 KB of shared memory it has to ask.
template <class Kernel>
int load(Kernel kernel, int shared = 0) {
  cudaFuncAttributes attributes;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel)) return int(error);
  if (shared <= 48 * 1024) return 0;
  return int(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
}
using Stream = cudaStream_t;
#else
int finish() { return 0; }
template <class Kernel>
int load(Kernel, int = 0) {
  return 0;
}
using Stream = void*;
#endif

using Kernel = void (*)(Launch);

int run(Kernel kernel, int64_t blocks, int threads, int shared, const Launch& launch) {
  if (blocks == 0) return 0;
  [[maybe_unused]] const auto stream = static_cast<Stream>(launch.stream);
  APOLLO_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(unsigned(threads)), shared,
                stream, launch);
  return finish();
}

// Calls use(x) with a value of the element type that `dtype` names, which only of a weight is int8.
template <class Use>
int with_dtype(int dtype, Use use) {
  switch (dtype) {
    case kFloat32:
      return use(float{});
    case kBfloat16:
      return use(bfloat16{});
    default:
      return use(float16{});
  }
}
template <class Use>
int with_dtypes(const Launch& launch, Use use) {
  const auto with_grad = [&](auto w) {
    return with_dtype(launch.grad_dtype, [&](auto g) { return use(w, g); });
  };
  if (launch.weight_dtype == kInt8) return with_grad(int8_code{});
  return with_dtype(launch.weight_dtype, with_grad);
}
template <class Use>
int with_distribution(int distribution, Use use) {
  switch (distribution) {
    case kRademacher:
      return use(Signs{});
    case kExactGaussian:
      return use(ExactGaussian{});
    default:
      return use(Gaussian{});
  }
}

// Calls use(kernel, threads, shared) with the kernel of `project` for these dtypes and rank.
template <class T, class DISTRIBUTION, class Use>
int with_project(RankClass rank, Use use) {
  switch (rank) {
    case kRankOne:
      return use(project_dots<T, 1, DISTRIBUTION>, kDotThreads, kDotShared<1>);
    case kRankTo4:
      return use(project_dots<T, 4, DISTRIBUTION>, kDotThreads, kDotShared<4>);
    case kRankTo7:
      return use(project_dots<T, 7, DISTRIBUTION>, kDotThreads, kDotShared<7>);
    case kRankTo64:
      return use(project_tiles<T, 64, DISTRIBUTION>, kTileThreads, TileLayout<T, 64>::kShared);
    default:
      return use(project_tiles<T, 128, DISTRIBUTION>, kTileThreads, TileLayout<T, 128>::kShared);
  }
}
template <class T, class Use>
int with_sparse(RankClass rank, Use use) {
  if (!uses_sparse_kernel(rank)) {
    return use(project_dots<T, 1, SparseSigns>, kDotThreads, kDotShared<1>);
  }
  return use(project_sparse<T>, kSparseThreads, SparseColumns<T>::kShared);
}
template <class Use>
int with_project(const Launch& launch, int distribution, Use use) {
  return with_dtype(launch.grad_dtype, [&](auto g) {
    if (distribution == kSparse) return with_sparse<decltype(g)>(launch.rank, use);
    return with_distribution(distribution, [&](auto d) {
      return with_project<decltype(g), decltype(d)>(launch.rank, use);
    });
  });
}

// Calls use(kernel) with the kernel of `apply` for these dtypes; only bf16 is rounded by chance.
template <class Use>
int with_apply(const Launch& launch, bool by_chance, Use use) {
  return with_dtypes(launch, [&](auto w, auto g) {
    using W = decltype(w);
    using G = decltype(g);
    if constexpr (kDtypeOf<W> == kInt8) return use(apply_update<W, G, OntoGrid>);
    if constexpr (kDtypeOf<W> == kBfloat16) {
      if (by_chance) return use(apply_update<W, G, ByChance>);
    }
    if constexpr (kDtypeOf<W> != kInt8) return use(apply_update<W, G, ToNearest>);
  });
}

// Calls use(kernel) with the kernel of `adamw` for these dtypes.
template <class Use>
int with_adamw(const Launch& launch, Use use) {
  return with_dtypes(launch, [&](auto w, auto g) {
    using W = decltype(w);
    using G = decltype(g);
    if (launch.moments_dtype == kInt8) return use(adamw_update<W, G, int8_code>);
    if (launch.moments_dtype == kBfloat16) return use(adamw_update<W, G, bfloat16>);
    return use(adamw_update<W, G, float>);
  });
}

}  // namespace

int launch_project(const Launch& launch) {
  return with_project(launch, launch.hyper.distribution,
                      [&](Kernel kernel, int threads, int shared) {
                        return run(kernel, launch.blocks, threads, shared, launch);
                      });
}

int launch_scale(const Launch& launch) {
  return run(scale_channels, launch.blocks, kScaleThreads, 0, launch);
}

int launch_apply(const Launch& launch) {
  return with_apply(launch, launch.hyper.stochastic_rounding, [&](Kernel kernel) {
    return run(kernel, launch.blocks, kStreamThreads, 0, launch);
  });
}

int launch_heads(const Launch& launch) {
  return run(project_head, launch.blocks, kHeadThreads, 0, launch);
}

int launch_send(const Launch& launch) {
  return run(send_sums, launch.blocks, kScaleThreads, 0, launch);
}

int launch_scale_parts(const Launch& launch) {
  return run(scale_parts, launch.blocks, kScaleThreads, 0, launch);
}

int launch_limit(const Launch& launch) {
  return run(limit_parts, (launch.blocks + kScaleThreads - 1) / kScaleThreads, kScaleThreads, 0,
             launch);
}

int launch_adamw(const Launch& launch) {
  return with_adamw(
      launch, [&](Kernel kernel) { return run(kernel, launch.blocks, kStreamThreads, 0, launch); });
}

int launch_advance(const Launch& launch) {
  return run(advance_steps, (launch.blocks + kStreamThreads - 1) / kStreamThreads, kStreamThreads,
             0, launch);
}

int load_low_rank(const Launch& launch) {
  for (const int distribution : {kGaussian, kExactGaussian, kRademacher, kSparse}) {
    const auto loaded = [](Kernel kernel, int, int shared) { return load(kernel, shared); };
    if (const int error = with_project(launch, distribution, loaded)) return error;
  }
  for (const Kernel kernel : {scale_channels, project_head, send_sums, scale_parts, limit_parts}) {
    if (const int error = load(kernel)) return error;
  }
  for (const bool by_chance : {false, true}) {
    const auto loaded = [](Kernel kernel) { return load(kernel); };
    if (const int error = with_apply(launch, by_chance, loaded)) return error;
  }
  return 0;
}

int load_dense(const Launch& launch) {
  if (const int error = load(advance_steps)) return error;
  return with_adamw(launch, [](Kernel kernel) { return load(kernel); });
}

#if defined(__CUDACC__)
const char* error_name(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
int current_device(int* device) { return int(cudaGetDevice(device)); }
int use_device(int device) { return int(cudaSetDevice(device)); }
int probe() {
  cudaFuncAttributes attributes;
  return int(cudaFuncGetAttributes(&attributes, scale_channels));
}
#else
const char* error_name(int) { return "emulated"; }
int current_device(int* device) { return *device = 0; }
int use_device(int) { return 0; }
int probe() { return 0; }
#endif

}  // namespace apollo
