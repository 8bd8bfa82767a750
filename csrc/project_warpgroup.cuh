// The products of a bf16 tile by Hopper's own instructions (sm_90a): a warpgroup of four warps
// multiplies 64 channels by all rank rows of the tile straight from shared memory, and makes the
// next stages while the tensor cores work. Other cards and other dtypes take project_mma.cuh's
// Product, which has the same stages.
#pragma once

#include "common.cuh"
#include "draw.cuh"
#include "project_source.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define APOLLO_WARPGROUPS 1

namespace apollo {

// A matrix in shared memory as wgmma is told of it: where it begins, and that its rows of 64 or 128
// bytes are swizzled, as draw.cuh's `swizzled` does it, in groups of 8 that lie one after the
// other. The address is all that changes from one to the next, in units of 16 bytes.
APOLLO_DEVICE uint32_t unit_of(const void* at) {
  return (static_cast<uint32_t>(__cvta_generic_to_shared(at)) & 0x3FFFF) >> 4;
}
template <int ROW_BYTES>
APOLLO_DEVICE uint64_t matrix_at(uint32_t unit) {
  constexpr uint64_t kSwizzle = ROW_BYTES == 128 ? 1 : 2, kGroup = 8 * ROW_BYTES >> 4;
  return kSwizzle << 62 | kGroup << 32 | uint64_t{1} << 16 | unit;
}

// clang-format off
#define APOLLO_EACH_8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
  "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define APOLLO_EACH_32(d, i) \
  APOLLO_EACH_8(d, i), APOLLO_EACH_8(d, i + 8), APOLLO_EACH_8(d, i + 16), APOLLO_EACH_8(d, i + 24)
#define APOLLO_OPERANDS_32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define APOLLO_OPERANDS_64 APOLLO_OPERANDS_32 "," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
// clang-format on

// D += A B^T for A [64, 32] and B [N, 32], N / 2 floats of D per thread, as two products of depth
// 16 whose operands are a[0], b[0] and a[1], b[1]. It goes on after this returns, till
// wait_for_products, and both are one piece for the compiler, which would part them by a wait.
// TRANSPOSED: A lies as rows of k.
template <bool TRANSPOSED>
APOLLO_DEVICE void begin_products(float (&d)[64], const uint64_t (&a)[2], const uint64_t (&b)[2]) {
  asm volatile(
      "wgmma.fence.sync.aligned;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{" APOLLO_OPERANDS_64
      "}, %64, %65, 1, 1, 1, %68, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{" APOLLO_OPERANDS_64
      "}, %66, %67, 1, 1, 1, %68, 0;\n"
      "wgmma.commit_group.sync.aligned;\n"
      : APOLLO_EACH_32(d, 0), APOLLO_EACH_32(d, 32)
      : "l"(a[0]), "l"(b[0]), "l"(a[1]), "l"(b[1]), "n"(int(TRANSPOSED))
      : "memory");
}
template <bool TRANSPOSED>
APOLLO_DEVICE void begin_products(float (&d)[32], const uint64_t (&a)[2], const uint64_t (&b)[2]) {
  asm volatile(
      "wgmma.fence.sync.aligned;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{" APOLLO_OPERANDS_32
      "}, %32, %33, 1, 1, 1, %36, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{" APOLLO_OPERANDS_32
      "}, %34, %35, 1, 1, 1, %36, 0;\n"
      "wgmma.commit_group.sync.aligned;\n"
      : APOLLO_EACH_32(d, 0)
      : "l"(a[0]), "l"(b[0]), "l"(a[1]), "l"(b[1]), "n"(int(TRANSPOSED))
      : "memory");
}
APOLLO_DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : : : "memory");
}

// Each warp ends with 16 channels of all rank rows.
template <class T, int RANKS, bool BY_ROW>
struct WarpgroupProduct {
  using Layout = TileLayout<T, RANKS>;
  static constexpr int kRanks = RANKS, kChannels = 256, kM = 1, kN = RANKS / 8, kWarpsRank = 1;
  static constexpr int kRowBytes = BY_ROW ? 64 : 128;
  static constexpr uint32_t kSecondHalf = (BY_ROW ? 32 : 16 * kRowBytes) / 16;  // of a stage's k
  uint32_t x, z;  // units: the warpgroup's channels of the first stage of X, the first one of Z
  float sums[RANKS / 2] = {};

  APOLLO_DEVICE static int warp_channel(int thread = int(threadIdx.x)) { return thread / 32 * 16; }
  APOLLO_DEVICE static int warp_rank(int = 0) { return 0; }

  APOLLO_DEVICE void begin(const unsigned char* shared) {
    const int group = __shfl_sync(0xFFFFFFFFu, int(threadIdx.x / 128), 0);  // known as uniform
    x = unit_of(shared + group * kPanel);
    z = unit_of(shared + Layout::kZ);
  }
  // What this thread has stored in shared memory, for the tensor cores to read.
  APOLLO_DEVICE void publish() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

  template <class MAKE>
  APOLLO_DEVICE void multiply(const unsigned char*, int step, MAKE make) {
#pragma unroll
    for (int i = 0; i < Tile<T>::kSteps; ++i) {
      const uint32_t a = x + uint32_t(Layout::x(step, i)) / 16;
      const uint32_t b = z + uint32_t(Layout::z(step, i) - Layout::kZ) / 16;
      begin_products<!BY_ROW>(sums,
                              {matrix_at<kRowBytes>(a), matrix_at<kRowBytes>(a + kSecondHalf)},
                              {matrix_at<64>(b), matrix_at<64>(b + 2)});
    }
    make();
    wait_for_products();
  }

  // Of channel 8 row + lane div 4 and rank row 8 n + 2 (lane mod 4) + e (fragments of the PTX ISA).
  APOLLO_DEVICE float sum(int row, int n, int e) const { return sums[4 * n + 2 * row + e]; }
};

}  // namespace apollo

#endif
