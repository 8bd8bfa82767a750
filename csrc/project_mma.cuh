// project for rank >= 8 on tensor cores: R = r^-1/2 X Z^T and q_c = |X_c|^2, reading X once; Z is
// drawn and never leaves the SM. A block of 16 warps holds a tile of channels x rank rows and walks
// along K in steps of 32: X and Z go to shared memory as bf16 (two stages, one barrier per step),
// ldmatrix brings them to mma.m16n8k16. X in more than bf16's 8 bits is split into exact bf16
// pieces: float16 into two, float32 into three.
#pragma once

#include "common.cuh"
#include "draw.cuh"
#include "project_epilogue.cuh"

namespace apollo {

template <class T>
constexpr int kPieces = pieces(kDtypeOf<T>);

// Eight values as one 16-byte chunk of each bf16 piece: x = p0 + p1 + p2 exactly (24 = 3 * 8 bits).
template <int PIECES>
APOLLO_DEVICE void split(const float (&x)[8], uint4 (&pieces)[PIECES]) {
  float rest[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) rest[i] = x[i];
#pragma unroll
  for (int p = 0; p < PIECES; ++p) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[i] = pack_bf16(rest[2 * i], rest[2 * i + 1]);
      rest[2 * i] -= low_bf16(pairs[i]);
      rest[2 * i + 1] -= high_bf16(pairs[i]);
    }
    pieces[p] = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
  }
}

template <class T>
struct Tile {
  static constexpr int kChannels = mma_channels(kDtypeOf<T>);
  static constexpr int kVectors = kChannels * kStep / 8 / kTileThreads;  // per thread and stage
  static constexpr int kPlane = kChannels * kStep * 2;                   // bytes of a piece
};

// One thread's share of a stage of X: registers between the global load and shared memory, so that
// the load of the next stage is under way while tensor cores work on this one.
template <class T, bool BY_ROW>
struct Stage {
  using Shape = Tile<T>;
  static constexpr int kRowVectors = BY_ROW ? kStep / 8 : Shape::kChannels / 8;
  static constexpr int kRowsApart = kTileThreads / kRowVectors;  // of a thread's vectors
  static constexpr int kRowBytes = BY_ROW ? 2 * kStep : 2 * Shape::kChannels;
  static_assert(kRowsApart % 8 == 0, "a thread's vectors are swizzled alike");
  const T* src_gmem;  // this thread's first vector of the next stage
  int dst_smem;       // and where it goes in the stage's shared memory
  int64_t stage_stride, row_stride;
  int channels, k;  // of the tile, and what is left of K
  bool wide;
  Pack8<T> packs[Shape::kVectors];
  float squares[BY_ROW ? Shape::kVectors : 8] = {};

  APOLLO_DEVICE static int row(int i) { return int(threadIdx.x) / kRowVectors + i * kRowsApart; }
  APOLLO_DEVICE static int chunk() { return int(threadIdx.x) % kRowVectors; }

  APOLLO_DEVICE void begin(const Matrix& p, int c0, int64_t k_begin, int64_t k_end) {
    const int left = int(p.channels) - c0;
    channels = left < Shape::kChannels ? left : Shape::kChannels;
    k = int(k_end - k_begin);
    const int64_t outer = (BY_ROW ? c0 : k_begin) + row(0);
    const int64_t inner = (BY_ROW ? k_begin : c0) + 8 * chunk();
    src_gmem = static_cast<const T*>(p.grad) + outer * p.grad_ld + inner;
    stage_stride = BY_ROW ? kStep : kStep * p.grad_ld;
    row_stride = kRowsApart * p.grad_ld;
    dst_smem = swizzled<kRowBytes>(row(0), chunk());
    wide = aligned16(static_cast<const T*>(p.grad), p.grad_ld);
  }

  APOLLO_DEVICE void load() {
    const int inner = (BY_ROW ? k : channels) - 8 * chunk(), outer = BY_ROW ? channels : k;
#pragma unroll
    for (int i = 0; i < Shape::kVectors; ++i) {
      packs[i].load(src_gmem + i * row_stride, row(i) < outer ? inner : 0, wide);
    }
    src_gmem += stage_stride;
    k -= kStep;
  }

  APOLLO_DEVICE void store(unsigned char* x_smem) {
    for (int i = 0; i < Shape::kVectors; ++i) {
      float x[8];
      packs[i].get(x);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float& square = squares[BY_ROW ? i : e];
        square = fmaf(x[e], x[e], square);
      }
      unsigned char* to = x_smem + dst_smem + i * kRowsApart * kRowBytes;
      if constexpr (kPieces<T> == 1) {
        *reinterpret_cast<uint4*>(to) = packs[i].words[0];
      } else {
        uint4 pieces[kPieces<T>];
        split(x, pieces);
        for (int piece = 0; piece < kPieces<T>; ++piece) {
          *reinterpret_cast<uint4*>(to + piece * Shape::kPlane) = pieces[piece];
        }
      }
    }
  }

  // q of the tile's channels, of which `left` are there; `scratch` holds 16 rows of them. Fixed
  // order, so the same bits.
  APOLLO_DEVICE void reduce(float* scratch, float* q, int left) {
    if constexpr (BY_ROW) {
      for (int i = 0; i < Shape::kVectors; ++i) {
        float sum = squares[i];
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
        if (chunk() == 0 && row(i) < left) q[row(i)] = sum;
      }
    } else {
      constexpr int kRows = kTileThreads / kRowVectors;
      for (int e = 0; e < 8; ++e) {
        scratch[row(0) * Shape::kChannels + 8 * chunk() + e] = squares[e];
      }
      __syncthreads();  // all rows of squares are there
      const int c = int(threadIdx.x);
      if (c < Shape::kChannels && c < left) {
        float sum = 0.0f;
        for (int i = 0; i < kRows; ++i) sum += scratch[i * Shape::kChannels + c];
        q[c] = sum;
      }
      __syncthreads();  // scratch is free again
    }
  }
};

template <class T, int RANKS>
struct TileLayout {
  static constexpr int kStageBytes = kPieces<T> * Tile<T>::kPlane + RANKS * 2 * kStep;
  static constexpr int kShared = 2 * kStageBytes;
  static_assert(kShared <= 99 * 1024, "sm_86, sm_89 and sm_120 give a block 99 KB");
  static_assert(8 * kTileThreads * 4 <= kShared, "q's scratch lies in the stages");
};

// The block's accumulators: each warp holds kM x 4 fragments of 16 channels x 8 rank rows.
template <class T, int RANKS, bool BY_ROW>
struct Product {
  static constexpr int kRanks = RANKS, kChannels = Tile<T>::kChannels;
  static constexpr int kWarpsRank = RANKS / 32, kWarpsChannel = 16 / kWarpsRank;
  static constexpr int kWarpChannels = Tile<T>::kChannels / kWarpsChannel;
  static constexpr int kM = kWarpChannels / 16;
  // Tensor cores cut sums off instead of rounding them: beyond bf16's precision short runs are
  // accumulated there and added up in float32 registers.
  static constexpr bool kShortRuns = kPieces<T> > 1;
  // In shared memory, of this lane's matrix rows: the others lie a constant or one turned bit away.
  int x_smem, z_smem;
  float run[kM][4][4] = {};
  float total[kShortRuns ? kM : 1][4][4] = {};

  APOLLO_DEVICE static int warp_channel() {
    return int(threadIdx.x / 32) / kWarpsRank * kWarpChannels;
  }
  APOLLO_DEVICE static int warp_rank() { return int(threadIdx.x / 32) % kWarpsRank * 32; }

  APOLLO_DEVICE void begin() {
    const int lane = int(threadIdx.x % 32), low = lane & 7, second = (lane >> 3) & 1;
    const int third = lane >> 4, c = warp_channel();
    z_smem = swizzled<64>(warp_rank() + 8 * third + low, second);
    x_smem = BY_ROW ? swizzled<64>(c + (lane & 15), third)
                    : swizzled<2 * Tile<T>::kChannels>(8 * third + low, c / 8 + second);
  }

  APOLLO_DEVICE void add(const unsigned char* x, const unsigned char* z) {
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
          const int offset = BY_ROW ? (x_smem ^ 32 * kk) + 16 * 64 * m
                                    : (x_smem ^ 32 * m) + 16 * 2 * Tile<T>::kChannels * kk;
          load_matrices<!BY_ROW>(a, plane + offset);
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            multiply_add(run[m][n], a, b[n / 2][2 * (n % 2)], b[n / 2][2 * (n % 2) + 1]);
          }
        }
      }
    }
  }

  // Of matrix row g + 8 half, column 2t + e (fragments of the PTX ISA) of fragment (m, n).
  APOLLO_DEVICE float sum(int m, int n, int half, int e) const {
    return (kShortRuns ? total[kShortRuns ? m : 0] : run[m])[n][2 * half + e];
  }

  APOLLO_DEVICE void end_run() {
    if constexpr (kShortRuns) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        for (int n = 0; n < 4; ++n) {
          for (int e = 0; e < 4; ++e) {
            total[m][n][e] += run[m][n][e];
            run[m][n][e] = 0.0f;
          }
        }
      }
    }
  }
};

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

template <class T, int RANKS, class DISTRIBUTION, bool BY_ROW>
APOLLO_DEVICE void project_tile(const Matrix& p, const Launch& launch, unsigned char* shared) {
  using Layout = TileLayout<T, RANKS>;
  const auto place = place_of<Tile<T>::kChannels, RANKS>(p);
  const int64_t k_begin = place.chunk * p.chunk_length;
  const int64_t k_end = k_begin + p.chunk_length < p.k ? k_begin + p.chunk_length : p.k;

  Stage<T, BY_ROW> stage;
  Drawing<RANKS, DISTRIBUTION> drawing;
  Product<T, RANKS, BY_ROW> product;
  drawing.begin(p, place.j0, epoch_of(p, launch));
  product.begin();
  stage.begin(p, place.c0, k_begin, k_end);
  stage.load();
  int parity = 0;
  const uint32_t k_last = uint32_t(k_end);
#pragma unroll 1
  for (uint32_t k = uint32_t(k_begin); k < k_last; k += kStep) {
    unsigned char* x = shared + parity * Layout::kStageBytes;
    unsigned char* z = x + kPieces<T> * Tile<T>::kPlane;
    stage.store(x);
    if (k + kStep < k_last) stage.load();
    drawing.store(z, k);
    __syncthreads();  // one per step: the other stage was read before the last one
    product.add(x, z);
    if (parity == 1) product.end_run();
    parity ^= 1;
  }
  product.end_run();
  __syncthreads();  // the stages become scratch
  float* scratch = reinterpret_cast<float*>(shared);
  // Looked up again: cheaper than registers kept till here.
  const Matrix& matrix = matrix_of(launch);
  const auto end = place_of<Tile<T>::kChannels, RANKS>(matrix);
  if (end.j0 == 0) {
    stage.reduce(scratch, q_of(matrix, launch, end.chunk) + end.c0, int(matrix.channels) - end.c0);
  }
  finish_tile(product, matrix, launch, end.c0, end.j0, end.chunk, scratch);
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
