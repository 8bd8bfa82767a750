// project for rank >= 8 on tensor cores: R = r^-1/2 X Z^T and q_c = |X_c|^2, reading X once; Z is
// drawn and never leaves the SM. A block of 16 warps holds a tile of channels x rank rows and walks
// along K: X and Z go to stages in shared memory as bf16 (project_source.cuh, draw.cuh), and while
// some are multiplied the next ones are made. X in more than bf16's 8 bits is split into exact bf16
// pieces: float16 into two, float32 into three.
#pragma once

#include <type_traits>

#include "common.cuh"
#include "draw.cuh"
#include "project_epilogue.cuh"
#include "project_source.cuh"
#include "project_warpgroup.cuh"

namespace apollo {

// The block's accumulators: each warp holds kM x kN fragments of 16 channels x 8 rank rows.
template <class T, int RANKS, bool BY_ROW>
struct Product {
  using Layout = TileLayout<T, RANKS>;
  static constexpr int kRanks = RANKS, kChannels = Tile<T>::kChannels, kN = 4;
  static constexpr int kWarpsRank = RANKS / 32, kWarpsChannel = 16 / kWarpsRank;
  static constexpr int kWarpChannels = Tile<T>::kChannels / kWarpsChannel;
  static constexpr int kM = kWarpChannels / 16;
  // Tensor cores cut sums off instead of rounding them: beyond bf16's precision they add up one
  // stage, and float32 registers add up the stages.
  static constexpr bool kShortRuns = kPieces<T> > 1;
  // In shared memory, of this lane's matrix rows: the others lie a constant or one turned bit away.
  int x_smem, z_smem;
  float sums[kM][kN][4] = {};

  APOLLO_DEVICE static int warp_channel(int thread = int(threadIdx.x)) {
    return thread / 32 / kWarpsRank * kWarpChannels;
  }
  APOLLO_DEVICE static int warp_rank(int thread = int(threadIdx.x)) {
    return thread / 32 % kWarpsRank * 32;
  }

  APOLLO_DEVICE void begin(const unsigned char*) {
    const int lane = int(threadIdx.x % 32), low = lane & 7, second = (lane >> 3) & 1;
    const int third = lane >> 4, c = warp_channel();
    z_smem = swizzled<64>(warp_rank() + 8 * third + low, second);
    x_smem = BY_ROW ? swizzled<64>(c + (lane & 15), third)
                    : c / 64 * kPanel + swizzled<128>(8 * third + low, c / 8 % 8 + second);
  }
  APOLLO_DEVICE void publish() {}

  // The stages from `step` on, and make(). Half of a scheduler's warps multiply first and half of
  // them make first, so that tensor cores and arithmetic are busy at once.
  template <class MAKE>
  APOLLO_DEVICE void multiply(const unsigned char* shared, int step, MAKE make) {
    const bool makes_first = threadIdx.x / 128 % 2 == 0;
    if (makes_first) make();
#pragma unroll
    for (int i = 0; i < Tile<T>::kSteps; ++i) {
      add(shared + Layout::x(step, i), shared + Layout::z(step, i));
    }
    if (!makes_first) make();
  }

  APOLLO_DEVICE void add(const unsigned char* x, const unsigned char* z) {
    if constexpr (kShortRuns) {
      float run[kM][kN][4] = {};
      add(run, x, z);
#pragma unroll
      for (int i = 0; i < kM * kN * 4; ++i) {
        sums[i / 16][i / 4 % 4][i % 4] += run[i / 16][i / 4 % 4][i % 4];
      }
    } else {
      add(sums, x, z);
    }
  }

  APOLLO_DEVICE void add(float (&to)[kM][kN][4], const unsigned char* x, const unsigned char* z) {
#pragma unroll
    for (int kk = 0; kk < 2; ++kk) {
      uint32_t b[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        load_matrices<false>(b[n], z + (z_smem ^ 32 * kk) + 16 * 64 * n);
      }
#pragma unroll
      for (int piece = 0; piece < kPieces<T>; ++piece) {
        const unsigned char* plane = x + piece * Tile<T>::kPlane;
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          uint32_t a[4];
          const int offset =
              BY_ROW ? (x_smem ^ 32 * kk) + 16 * 64 * m : (x_smem ^ 32 * m) + 16 * 128 * kk;
          load_matrices<!BY_ROW>(a, plane + offset);
#pragma unroll
          for (int n = 0; n < kN; ++n) {
            multiply_add(to[m][n], a, b[n / 2][2 * (n % 2)], b[n / 2][2 * (n % 2) + 1]);
          }
        }
      }
    }
  }

  // Of channel 8 row + lane div 4 and rank row 8 n + 2 (lane mod 4) + e (fragments of the PTX ISA).
  APOLLO_DEVICE float sum(int row, int n, int e) const { return sums[row / 2][n][row % 2 * 2 + e]; }
};

#if defined(APOLLO_WARPGROUPS)
template <class T, int RANKS, bool BY_ROW>
using TileProduct = std::conditional_t<kPieces<T> == 1, WarpgroupProduct<T, RANKS, BY_ROW>,
                                       Product<T, RANKS, BY_ROW>>;
#else
template <class T, int RANKS, bool BY_ROW>
using TileProduct = Product<T, RANKS, BY_ROW>;
#endif

// What a block computes. Rank tiles are neighbours, so that they share X in L2. Each side is below
// 2^31; products are not.
struct Place {
  int c0, j0, chunk;
};
template <int CHANNELS, int RANKS>
APOLLO_DEVICE Place place_of(const Matrix& p) {
  const int block = int(int64_t(blockIdx.x) - p.first_project);
  const int rank_tiles = (int(p.rank) + RANKS - 1) / RANKS;
  const int channel_tiles = (int(p.channels) + CHANNELS - 1) / CHANNELS;
  return {block / rank_tiles % channel_tiles * CHANNELS, block % rank_tiles * RANKS,
          block / rank_tiles / channel_tiles};
}

// bf16 with normals by fast functions or signs: what is trained with, and what has registers left.
template <class T, class DISTRIBUTION>
constexpr bool kIsFast = kPieces<T> == 1 && !std::is_same_v<DISTRIBUTION, ExactGaussian>;

template <class T, int RANKS, class DISTRIBUTION, bool BY_ROW, bool SQUARES>
APOLLO_DEVICE void project_tile(const Matrix& p, const Launch& launch, unsigned char* shared) {
  using Layout = TileLayout<T, RANKS>;
  constexpr int kSteps = Tile<T>::kSteps;
  const auto place = place_of<Tile<T>::kChannels, RANKS>(p);
  const int64_t k_begin = p.k_begin + place.chunk * p.chunk_length, left = p.k_end - k_begin;
  const int length = int(left < p.chunk_length ? left : p.chunk_length);
  const int steps = (length + kStep - 1) / kStep;

  Source<T, BY_ROW, SQUARES> source;
  Drawing<RANKS, DISTRIBUTION, kIsFast<T, DISTRIBUTION>> drawing;
  TileProduct<T, RANKS, BY_ROW> product;
  source.begin(p, place.c0, k_begin, length);
  drawing.begin(p, place.j0, epoch_of(p, launch), uint32_t(k_begin));
  product.begin(shared);
  const auto make = [&](int step) {
    source.fetch(shared, step);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      drawing.store(shared + Layout::z(step, i), uint32_t(k_begin) + uint32_t(step + i) * kStep);
    }
    source.finish(shared, step);
    product.publish();
  };
  make(0);
  __syncthreads();  // the first stages are there
#pragma unroll 1
  for (int step = 0; step < steps; step += kSteps) {
    const auto make_next = [&] {
      if (step + kSteps < steps) make(step + kSteps);
    };
    if constexpr (std::is_same_v<DISTRIBUTION, ExactGaussian>) {
      make_next();  // a second copy of this code would not find the registers that it needs
      product.multiply(shared, step, [] {});
    } else {
      product.multiply(shared, step, make_next);
    }
    __syncthreads();  // the next stages are there, and these were read by all
  }
  float* scratch = reinterpret_cast<float*>(shared);
  // Looked up again: cheaper than registers kept till here.
  const int thread = thread_again();
  const Matrix& matrix = matrix_of(launch);
  const auto end = place_of<Tile<T>::kChannels, RANKS>(matrix);
  if (SQUARES && end.j0 == 0) {
    float* q = q_of(matrix, launch, end.chunk) + end.c0;
    source.reduce(scratch, q, int(matrix.channels) - end.c0, thread);
  }
  finish_tile(product, matrix, launch, end.c0, end.j0, end.chunk, scratch, thread);
}

// Where a tile's rank does not fit one block, the first block sums squares for all. Only in the
// fast kernels is the time that the others save worth a loop of their own.
template <class T, int RANKS, class DISTRIBUTION, bool BY_ROW>
APOLLO_DEVICE void project_tile(const Matrix& p, const Launch& launch, unsigned char* shared) {
  if constexpr (RANKS == 128 && kIsFast<T, DISTRIBUTION>) {
    if (place_of<Tile<T>::kChannels, RANKS>(p).j0 != 0) {
      project_tile<T, RANKS, DISTRIBUTION, BY_ROW, false>(p, launch, shared);
      return;
    }
  }
  project_tile<T, RANKS, DISTRIBUTION, BY_ROW, true>(p, launch, shared);
}

template <class T, int RANKS, class DISTRIBUTION>
__global__ void __launch_bounds__(kTileThreads, 1) project_tiles(Launch launch) {
  APOLLO_SHARED(shared);
  if (skipped(launch.hyper)) return;
  const Matrix& p = matrix_of(launch);
  if (by_row(p)) {
    project_tile<T, RANKS, DISTRIBUTION, true>(p, launch, shared);
  } else {
    project_tile<T, RANKS, DISTRIBUTION, false>(p, launch, shared);
  }
}

}  // namespace apollo
