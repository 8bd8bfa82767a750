// project for rank >= 8 on tensor cores: R = r^-1/2 X Z^T and q_c = |X_c|^2, reading X once; Z is
// drawn and never leaves the SM. A block of 16 warps holds a tile of channels x rank rows and walks
// along K in steps of 32: X and Z go to shared memory as bf16, in stages that are made one or two
// steps before ldmatrix brings them to mma.m16n8k16. X in more than bf16's 8 bits is split into
// exact bf16 pieces: float16 into two, float32 into three.
#pragma once

#include <type_traits>

#include "common.cuh"
#include "draw.cuh"
#include "project_epilogue.cuh"

namespace apollo {

template <class T>
constexpr int kPieces = pieces(kDtypeOf<T>);

template <class T>
struct Tile {
  static constexpr int kChannels = mma_channels(kDtypeOf<T>);
  static constexpr int kPlane = kChannels * kStep * 2;  // bytes of a piece
};

// Rounds each x to bf16 and leaves the rest in x: all pieces of an element add up to it exactly.
template <int N>
struct alignas(2 * N) Piece {
  uint32_t pairs[N / 2];
};
template <int N>
APOLLO_DEVICE Piece<N> split_off(float (&x)[N]) {
  Piece<N> piece;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    piece.pairs[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
    x[2 * i] -= low_bf16(piece.pairs[i]);
    x[2 * i + 1] -= high_bf16(piece.pairs[i]);
  }
  return piece;
}

// One thread's share of a stage of X: registers between the global load and shared memory, so that
// the load of the next stage is under way while tensor cores work on this one. Neighbouring threads
// load neighbouring 16 bytes.
template <class T, bool BY_ROW>
struct Stage {
  using Shape = Tile<T>;
  static constexpr int kVector = 16 / int(sizeof(T));  // elements of a load
  static constexpr int kVectors = Shape::kChannels * kStep / kVector / kTileThreads;
  static constexpr int kRow = BY_ROW ? kStep : Shape::kChannels;
  static constexpr int kRowVectors = kRow / kVector;
  static constexpr int kRowsApart = kTileThreads / kRowVectors;  // of a thread's vectors
  static constexpr int kRowBytes = 2 * kRow;                     // in shared memory, of a piece
  static_assert(kRowsApart % 8 == 0, "a thread's vectors are swizzled alike");
  const unsigned char* src_gmem;     // this thread's first vector of the next stage
  int dst_smem;                      // and where it goes in the stage's shared memory
  int64_t stage_stride, row_stride;  // in bytes, as the compiler would not keep them itself
  int channels;                      // of the tile
  bool wide;
  Pack<T, kVector> packs[kVectors];
  float squares[BY_ROW ? kVectors : kVector] = {};

  APOLLO_DEVICE static int row(int i, int thread = int(threadIdx.x)) {
    return thread / kRowVectors + i * kRowsApart;
  }
  APOLLO_DEVICE static int first(int thread = int(threadIdx.x)) {
    return thread % kRowVectors * kVector;
  }

  APOLLO_DEVICE void begin(const Matrix& p, int c0, int64_t k_begin) {
    const int left = int(p.channels) - c0;
    channels = left < Shape::kChannels ? left : Shape::kChannels;
    const int64_t outer = (BY_ROW ? c0 : k_begin) + row(0);
    const int64_t inner = (BY_ROW ? k_begin : c0) + first();
    const int64_t ld = p.grad_ld * int64_t(sizeof(T));
    src_gmem = static_cast<const unsigned char*>(p.grad) + outer * ld + inner * int(sizeof(T));
    stage_stride = BY_ROW ? kStep * int(sizeof(T)) : kStep * ld;
    row_stride = kRowsApart * ld;
    dst_smem = swizzled<kRowBytes>(row(0), first() / 8) + 2 * (first() % 8);
    wide = aligned16(static_cast<const T*>(p.grad), p.grad_ld);
  }

  // A stage within K needs no guard.
  APOLLO_DEVICE bool whole() const { return wide && channels == Shape::kChannels; }

  // The next stage, zeros beyond what is left of channels and K.
  template <bool WHOLE>
  APOLLO_DEVICE void load(int k_left) {
    const int inner = (BY_ROW ? k_left : channels) - first();
    const int outer = BY_ROW ? channels : k_left;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const T* from = reinterpret_cast<const T*>(src_gmem + i * row_stride);
      if constexpr (WHOLE) {
        packs[i].load(from);
      } else {
        packs[i].load(from, row(i) < outer ? inner : 0, wide);
      }
    }
    src_gmem += stage_stride;
  }

  APOLLO_DEVICE void store(unsigned char* x_smem) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float x[kVector];
      packs[i].get(x);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        float& square = squares[BY_ROW ? i : e];
        square = fmaf(x[e], x[e], square);
      }
      unsigned char* to_smem = x_smem + dst_smem + i * kRowsApart * kRowBytes;
      if constexpr (kPieces<T> == 1) {
        *reinterpret_cast<uint4*>(to_smem) = packs[i].words[0];
      } else {
#pragma unroll
        for (int piece = 0; piece < kPieces<T>; ++piece) {
          *reinterpret_cast<Piece<kVector>*>(to_smem + piece * Shape::kPlane) = split_off(x);
        }
      }
    }
  }

  // q of the tile's channels, of which `left` are there; `scratch` holds kRowsApart rows of them.
  // Fixed order, so the same bits.
  APOLLO_DEVICE void reduce(float* scratch, float* q, int left, int thread) {
    if constexpr (BY_ROW) {
      for (int i = 0; i < kVectors; ++i) {
        float sum = squares[i];
        for (int o = 1; o < kRowVectors; o *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, o);
        if (first(thread) == 0 && row(i, thread) < left) q[row(i, thread)] = sum;
      }
    } else {
      for (int e = 0; e < kVector; ++e) {
        scratch[row(0, thread) * Shape::kChannels + first(thread) + e] = squares[e];
      }
      __syncthreads();  // all rows of squares are there
      const int c = thread;
      if (c < Shape::kChannels && c < left) {
        float sum = 0.0f;
        for (int i = 0; i < kRowsApart; ++i) sum += scratch[i * Shape::kChannels + c];
        q[c] = sum;
      }
      __syncthreads();  // scratch is free again
    }
  }
};

constexpr int kSharedLimit = 99 * 1024;  // of a block on sm_86, sm_89 and sm_120

template <class T, int RANKS>
struct TileLayout {
  static constexpr int kX = kPieces<T> * Tile<T>::kPlane;
  static constexpr int kStage = kX + RANKS * 2 * kStep;
  // A stage is made so many turns before it is multiplied, and as many later it may be overwritten.
  static constexpr int kAhead = 4 * kStage <= kSharedLimit ? 2 : 1;
  static constexpr int kStages = 2 * kAhead;
  static constexpr int kShared = kStages * kStage;
  static_assert(kShared <= kSharedLimit);
  static_assert(8 * kTileThreads * 4 <= kShared, "q's scratch lies in the stages");
  // Stages lie in a ring: the one that is multiplied half of it away from the one that is made.
  APOLLO_DEVICE static const unsigned char* opposite(unsigned char* stage, unsigned char* shared) {
    return stage < shared + kShared / 2 ? stage + kShared / 2 : stage - kShared / 2;
  }
  APOLLO_DEVICE static unsigned char* after(unsigned char* stage, unsigned char* shared) {
    return stage == shared + (kShared - kStage) ? shared : stage + kStage;
  }
};

// Between two turns of the main loop: the next one begins when all warps have ended the one AHEAD
// turns before it. One ahead is __syncthreads. Two ahead, warps of one scheduler (every fourth)
// still end a turn together, since it serves them one after the other, but the four schedulers may
// be a turn apart. Each has two barriers, for even and for odd turns: its own warps wait there and
// the others only arrive, so that one which is late makes nobody wait who is not a turn ahead.
template <int AHEAD>
struct Turns {
  APOLLO_DEVICE void begin() {}
  APOLLO_DEVICE void next() {
    __syncthreads();  // the next stage is there, and this one was read by all
  }
  APOLLO_DEVICE void end() {}
};
template <>
struct Turns<2> {
  int own;  // this scheduler's barrier of the turn before; 8 to 15, so that a bit picks another

  APOLLO_DEVICE void begin() {
    own = 8 + int(threadIdx.x / 32 % 4 * 2);
    arrive();
  }
  APOLLO_DEVICE void next() {
    end();
    own ^= 1;
    arrive();
  }
  APOLLO_DEVICE void end() const { wait_at<kTileThreads>(own); }  // the turn before, by all others

  APOLLO_DEVICE void arrive() const {
#pragma unroll
    for (int other = 2; other < 8; other += 2) arrive_at<kTileThreads>(own ^ other);
  }
};

// The block's accumulators: each warp holds kM x 4 fragments of 16 channels x 8 rank rows.
template <class T, int RANKS, bool BY_ROW>
struct Product {
  static constexpr int kRanks = RANKS, kChannels = Tile<T>::kChannels;
  static constexpr int kWarpsRank = RANKS / 32, kWarpsChannel = 16 / kWarpsRank;
  static constexpr int kWarpChannels = Tile<T>::kChannels / kWarpsChannel;
  static constexpr int kM = kWarpChannels / 16;
  // Tensor cores cut sums off instead of rounding them: beyond bf16's precision they add up one
  // stage, and float32 registers add up the stages.
  static constexpr bool kShortRuns = kPieces<T> > 1;
  // In shared memory, of this lane's matrix rows: the others lie a constant or one turned bit away.
  int x_smem, z_smem;
  float sums[kM][4][4] = {};

  APOLLO_DEVICE static int warp_channel(int thread = int(threadIdx.x)) {
    return thread / 32 / kWarpsRank * kWarpChannels;
  }
  APOLLO_DEVICE static int warp_rank(int thread = int(threadIdx.x)) {
    return thread / 32 % kWarpsRank * 32;
  }

  APOLLO_DEVICE void begin() {
    const int lane = int(threadIdx.x % 32), low = lane & 7, second = (lane >> 3) & 1;
    const int third = lane >> 4, c = warp_channel();
    z_smem = swizzled<64>(warp_rank() + 8 * third + low, second);
    x_smem = BY_ROW ? swizzled<64>(c + (lane & 15), third)
                    : swizzled<2 * Tile<T>::kChannels>(8 * third + low, c / 8 + second);
  }

  APOLLO_DEVICE void add(const unsigned char* x, const unsigned char* z) {
    if constexpr (kShortRuns) {
      float run[kM][4][4] = {};
      add(run, x, z);
#pragma unroll
      for (int i = 0; i < kM * 16; ++i)
        sums[i / 16][i / 4 % 4][i % 4] += run[i / 16][i / 4 % 4][i % 4];
    } else {
      add(sums, x, z);
    }
  }

  APOLLO_DEVICE void add(float (&to)[kM][4][4], const unsigned char* x, const unsigned char* z) {
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
            multiply_add(to[m][n], a, b[n / 2][2 * (n % 2)], b[n / 2][2 * (n % 2) + 1]);
          }
        }
      }
    }
  }

  // Of channel 8 row + lane div 4 and rank row 8 n + 2 (lane mod 4) + e (fragments of the PTX ISA).
  APOLLO_DEVICE float sum(int row, int n, int e) const { return sums[row / 2][n][row % 2 * 2 + e]; }
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
  const int length = int(p.k - k_begin < p.chunk_length ? p.k - k_begin : p.chunk_length);

  Stage<T, BY_ROW> stage;
  Drawing<RANKS, DISTRIBUTION> drawing;
  Product<T, RANKS, BY_ROW> product;
  drawing.begin(p, place.j0, epoch_of(p, launch));
  product.begin();
  stage.begin(p, place.c0, k_begin);
  stage.template load<false>(length);
  Turns<Layout::kAhead> turns;
  turns.begin();
  // The stage from k on is multiplied, a later one made and the one after that loaded. Half of a
  // scheduler's warps multiply first and half of them draw first, so that tensor cores and
  // arithmetic are busy at once.
  constexpr int kAhead = Layout::kAhead * kStep;
  const bool makes_first = threadIdx.x / 128 % 2 == 0;
  unsigned char* to_smem = shared;
  const auto turn = [&](auto is_whole, int k) {
    constexpr bool WHOLE = decltype(is_whole)::value;
    const unsigned char* from_smem = Layout::opposite(to_smem, shared);
    const auto make = [&] {
      if (!WHOLE && k + kAhead >= length) return;
      stage.store(to_smem);
      stage.template load<WHOLE>(length - (k + kAhead + kStep));
      drawing.store(to_smem + Layout::kX, uint32_t(k_begin) + uint32_t(k + kAhead));
    };
    if (makes_first) make();
    if (WHOLE || k >= 0) product.add(from_smem, from_smem + Layout::kX);
    if (!makes_first) make();
    turns.next();
    to_smem = Layout::after(to_smem, shared);
  };
  const int whole = stage.whole() ? length / kStep * kStep : 0;
#pragma unroll 1
  for (int k = -kAhead; k < length; k += kStep) {
    turn(std::false_type{}, k);
    if (k < -kStep) continue;  // nothing to multiply yet
#pragma unroll 1
    for (; k + kAhead + 3 * kStep <= whole; k += kStep) turn(std::true_type{}, k + kStep);
  }
  turns.end();
  float* scratch = reinterpret_cast<float*>(shared);
  // Looked up again: cheaper than registers kept till here.
  const int thread = thread_again();
  const Matrix& matrix = matrix_of(launch);
  const auto end = place_of<Tile<T>::kChannels, RANKS>(matrix);
  if (end.j0 == 0) {
    float* q = q_of(matrix, launch, end.chunk) + end.c0;
    stage.reduce(scratch, q, int(matrix.channels) - end.c0, thread);
  }
  finish_tile(product, matrix, launch, end.c0, end.j0, end.chunk, scratch, thread);
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
