// The one file that knows which compiler reads the kernels: nvcc for a GPU, g++ for the tests'
// build on a CPU (APOLLO_EMULATED; tests/cuda_on_cpu), or g++ for the host's random numbers alone.
// It holds everything that is not plain C++: launches, dynamic shared memory, PTX.
#pragma once

#include <cstdint>
#include <cstring>

namespace apollo {

// 80 for sm_80; 0 where no card is compiled for.
#if defined(__CUDA_ARCH__)
constexpr int kArchitecture = __CUDA_ARCH__ / 10;
#else
constexpr int kArchitecture = 0;
#endif

}  // namespace apollo

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define APOLLO_HOST_DEVICE __host__ __device__ __forceinline__
#define APOLLO_DEVICE __device__ __forceinline__
#define APOLLO_KERNELS 1
#define APOLLO_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define APOLLO_LAUNCH(kernel, grid, block, shared, stream, ...) \
  (kernel)<<<grid, block, shared, stream>>>(__VA_ARGS__)

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

// Of `turns` full turns, in float64.
APOLLO_DEVICE void sine_and_cosine_of_turns(double turns, double& sine, double& cosine) {
  sincospi(2.0 * turns, &sine, &cosine);
}

// Both err by 2^-23 at most. Subnormals: the root takes them, the reciprocal takes them for 0.
APOLLO_DEVICE float approx_root(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
APOLLO_DEVICE float approx_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x, of which the compiler knows nothing: what follows from it is worked out where it is needed,
// and holds no register in a loop.
APOLLO_DEVICE int made_again(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
// threadIdx.x, which the compiler would otherwise keep in a register from its first use on.
APOLLO_DEVICE int thread_again() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// An address from a table, which the compiler could not know to be global memory's.
template <class T>
APOLLO_DEVICE T* global(T* address) {
  __builtin_assume(__isGlobal(address));
  return address;
}

// 16 bytes of global memory. Addresses come from tables, so the compiler could only take the slower
// generic path; and what streams through once need not stay in L1. L2 fetches 128 bytes at a time:
// a stage of `project` takes 64 of a row, the next one finds the others there.
APOLLO_DEVICE uint4 load16(const void* from) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return x;
}
APOLLO_DEVICE void store16(void* to, const uint4& x) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

// 16 bytes of global memory on their way to shared memory, past the registers. A group holds the
// copies since the last commit; a thread waits until all of its groups have landed.
APOLLO_DEVICE void copy16(void* to_smem, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to_smem))),
                 "l"(__cvta_generic_to_global(from))
               : "memory");
}
APOLLO_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }
APOLLO_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_group 0;" : : : "memory"); }

// Loads and stores by the word's own size: of 8 or 4 bytes for elements beside wider ones.
APOLLO_DEVICE void load_word(uint4& word, const uint4* from) { word = load16(from); }
APOLLO_DEVICE void store_word(uint4* to, const uint4& word) { store16(to, word); }
APOLLO_DEVICE void load_word(uint2& word, const uint2* from) {
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
               : "=r"(word.x), "=r"(word.y)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
}
APOLLO_DEVICE void store_word(uint2* to, const uint2& word) {
  asm volatile("st.global.v2.u32 [%0], {%1,%2};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(word.x), "r"(word.y)
               : "memory");
}
APOLLO_DEVICE void load_word(uint32_t& word, const uint32_t* from) {
  asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];"
               : "=r"(word)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
}
APOLLO_DEVICE void store_word(uint32_t* to, uint32_t word) {
  asm volatile("st.global.u32 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(word)
               : "memory");
}

// Two floats rounded to nearest even as bf16x2, `low` in the low half.
APOLLO_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
APOLLO_DEVICE float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
APOLLO_DEVICE uint16_t float_to_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// Four 8 x 8 matrices of bf16 from shared memory: lane i gives the address of row i mod 8 of matrix
// i div 8, and gets two neighbours of row (lane div 4) of each; transposed: of column (lane div 4).
template <bool TRANSPOSED>
APOLLO_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

// D += A B for bf16 A [16, 16], B [16, 8] and float32 D [16, 8]; fragments as in the PTX ISA.
APOLLO_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace apollo

#elif defined(APOLLO_EMULATED)

#define APOLLO_HOST_DEVICE inline
#define APOLLO_DEVICE inline
#define APOLLO_KERNELS 1
#include "emulated_device.h"

#else

#define APOLLO_HOST_DEVICE inline

#endif
