// The one file that knows which compiler reads the kernels: nvcc for a GPU, or g++ for the tests'
// build on a CPU. Fast functions of the special-function unit, and the words around them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define APOLLO_HOST_DEVICE __host__ __device__ __forceinline__
#define APOLLO_DEVICE __device__ __forceinline__

namespace apollo {
// PTX's approximations without range handling: lg2 errs by 2^-22, sin and cos by 2^-20.5 in [-pi,
// pi].
APOLLO_DEVICE float approx_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
APOLLO_DEVICE float approx_sqrt(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
APOLLO_DEVICE float approx_sin(float x) {
  float y;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
APOLLO_DEVICE float approx_cos(float x) {
  float y;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
}  // namespace apollo

#else

#define APOLLO_HOST_DEVICE inline

#endif
