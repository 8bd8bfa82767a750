// X on its way to the tensor cores: from rows or columns in global memory to stages of bf16 in
// shared memory, with the squared norms of its channels on the way.
#pragma once

#include <type_traits>

#include "common.cuh"
#include "draw.cuh"

namespace apollo {

template <class T>
constexpr int kPieces = pieces(kDtypeOf<T>);

// A stage holds kStep of K for all channels of a tile, in planes, one for each bf16 piece of an
// element. A turn of the main loop multiplies kSteps stages while as many are made for the next
// one.
template <class T>
struct Tile {
  static constexpr int kChannels = mma_channels(kDtypeOf<T>);
  static constexpr int kPlane = kChannels * kStep * 2;  // bytes
  static constexpr int kStage = kPieces<T> * kPlane;
  static constexpr int kSteps = kPieces<T> == 1 ? 2 : 1;
  static constexpr int kStages = 2 * kSteps;
  // On Ampere and Ada instructions are what binds, and these are worth 7 % of them: one guard for
  // all stages of a turn, and places in shared memory whose first term the compiler cannot see
  // through, or else it makes an address of each sum where an instruction adds a constant for
  // nothing. Hopper gains nothing by either, and on Blackwell kernels would spill.
  static constexpr bool kSpelledOut = kArchitecture < 90;
  // Of the stage `i` after `step`, a multiple of kSteps, in units of `bytes`.
  APOLLO_DEVICE static int place(int step, int i, int bytes) {
    if (!kSpelledOut) return (step + i) % kStages * bytes;
    return made_again(int(uint32_t(step) % kStages) * bytes) + i * bytes;
  }
  APOLLO_DEVICE static int stage(int step, int i) { return place(step, i, kStage); }
};
constexpr int kPanel = 64 * kStep * 2;  // bytes of 64 channels in a plane

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

// One thread's vectors of a stage, 16 bytes of global memory each. In shared memory a plane lies in
// rows of 64 bytes, one for each channel, or, where channels are the inner side of X, in panels of
// 64 channels with rows of 128 bytes, one for each k. Neighbouring threads take neighbouring
// vectors. Not every block SQUARES: the rank tiles of a channel tile share q.
template <class T, bool BY_ROW, bool SQUARES>
struct Vectors {
  using Shape = Tile<T>;
  static constexpr int kVector = 16 / int(sizeof(T));  // elements
  static constexpr int kVectors = Shape::kChannels * kStep / kVector / kTileThreads;
  static constexpr int kRowVectors = (BY_ROW ? kStep : Shape::kChannels) / kVector;
  static constexpr int kRowsApart = kTileThreads / kRowVectors;  // of a thread's vectors
  static constexpr int kRowBytes = BY_ROW ? 64 : 128;
  static_assert(kRowsApart % 8 == 0, "a thread's vectors are swizzled alike");
  const unsigned char* src_gmem;     // this thread's first vector of the next stage
  int dst_smem;                      // and where it goes in a stage
  int64_t stage_stride, row_stride;  // in bytes, as the compiler would not keep them itself
  int channels, length;              // of the tile
  int whole;                         // stages that need no guard, from the first on
  bool wide;
  float squares[BY_ROW ? kVectors : kVector] = {};

  APOLLO_DEVICE static int row(int i, int thread = int(threadIdx.x)) {
    return thread / kRowVectors + i * kRowsApart;
  }
  APOLLO_DEVICE static int first(int thread = int(threadIdx.x)) {
    return thread % kRowVectors * kVector;
  }

  APOLLO_DEVICE void begin(const Matrix& p, int c0, int64_t k_begin, int of_k) {
    const int channels_left = int(p.channels) - c0;
    channels = channels_left < Shape::kChannels ? channels_left : Shape::kChannels;
    length = of_k;
    const int64_t outer = (BY_ROW ? c0 : k_begin) + row(0);
    const int64_t inner = (BY_ROW ? k_begin : c0) + first();
    const int64_t ld = p.grad_ld * int64_t(sizeof(T));
    src_gmem = static_cast<const unsigned char*>(p.x) + outer * ld + inner * int(sizeof(T));
    stage_stride = BY_ROW ? kStep * int(sizeof(T)) : kStep * ld;
    row_stride = kRowsApart * ld;
    dst_smem = (BY_ROW ? 0 : first() / 64 * kPanel) + swizzled<kRowBytes>(row(0), first() / 8 % 8) +
               2 * (first() % 8);
    wide = aligned16(static_cast<const T*>(p.x), p.grad_ld);
    whole = wide && channels == Shape::kChannels ? length / kStep : 0;
  }

  APOLLO_DEVICE const T* source(int i) const {
    return reinterpret_cast<const T*>(src_gmem + i * row_stride);
  }
  APOLLO_DEVICE int place(int i) const { return dst_smem + i * kRowsApart * kRowBytes; }

  // Vector i of stage `step`, the next one, with zeros beyond what is left of channels and K.
  APOLLO_DEVICE void load_guarded(Pack<T, kVector>& pack, int i, int step) const {
    const int left = length - step * kStep;
    const int inner = (BY_ROW ? left : channels) - first();
    pack.load(source(i), row(i) < (BY_ROW ? channels : left) ? inner : 0, wide);
  }

  APOLLO_DEVICE void square(const float (&x)[kVector], int i) {
    if constexpr (SQUARES) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        float& sum = squares[BY_ROW ? i : e];
        sum = fmaf(x[e], x[e], sum);
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

// A source makes stages ready in turns: fetch() brings kSteps of them from `step` on, and what it
// has brought may be multiplied after finish() and a barrier.
//
// bf16 is multiplied as it is, so that copies go past the registers: what is under way has to cover
// memory's latency.
template <class T, bool BY_ROW, bool SQUARES>
struct Copied : Vectors<T, BY_ROW, SQUARES> {
  using Base = Vectors<T, BY_ROW, SQUARES>;

  APOLLO_DEVICE void begin(const Matrix& p, int c0, int64_t k_begin, int of_k) {
    Base::begin(p, c0, k_begin, of_k);
  }
  APOLLO_DEVICE void fetch(unsigned char* stages_smem, int step) {
    constexpr int kSteps = Tile<T>::kSteps;
    if constexpr (!Tile<T>::kSpelledOut) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        unsigned char* to_smem = stages_smem + Tile<T>::stage(step, s);
        step + s < Base::whole ? copy(to_smem) : copy_guarded(to_smem, step + s);
        Base::src_gmem += Base::stage_stride;
      }
    } else if (step + kSteps <= Base::whole) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        copy(stages_smem + Tile<T>::stage(step, s));
        Base::src_gmem += Base::stage_stride;
      }
    } else {
#pragma unroll 1
      for (int s = 0; s < kSteps; ++s) {
        copy_guarded(stages_smem + Tile<T>::stage(step, s), step + s);
        Base::src_gmem += Base::stage_stride;
      }
    }
    commit_copies();
  }
  APOLLO_DEVICE void copy(unsigned char* to_smem) {
#pragma unroll
    for (int i = 0; i < Base::kVectors; ++i) copy16(to_smem + Base::place(i), Base::source(i));
  }
  APOLLO_DEVICE void copy_guarded(unsigned char* to_smem, int step) {
#pragma unroll 1
    for (int i = 0; i < Base::kVectors; ++i) {
      Pack<T, Base::kVector> pack;
      Base::load_guarded(pack, i, step);
      *reinterpret_cast<uint4*>(to_smem + Base::place(i)) = pack.words[0];
    }
  }
  // Each thread squares what it has copied itself, so that it need wait for no other.
  APOLLO_DEVICE void finish(const unsigned char* stages_smem, int step) {
    wait_for_copies();
    if constexpr (SQUARES) {
#pragma unroll
      for (int s = 0; s < Tile<T>::kSteps; ++s) {
        const unsigned char* from_smem = stages_smem + Tile<T>::stage(step, s);
#pragma unroll
        for (int i = 0; i < Base::kVectors; ++i) {
          Pack<T, Base::kVector> pack;
          float x[Base::kVector];
          pack.words[0] = *reinterpret_cast<const uint4*>(from_smem + Base::place(i));
          pack.get(x);
          Base::square(x, i);
        }
      }
    }
  }
};

// float16 and float32 are split into bf16 pieces in registers, where the next stage waits already.
template <class T, bool BY_ROW, bool SQUARES>
struct Split : Vectors<T, BY_ROW, SQUARES> {
  using Base = Vectors<T, BY_ROW, SQUARES>;
  static_assert(Tile<T>::kSteps == 1);
  Pack<T, Base::kVector> packs[Base::kVectors];

  APOLLO_DEVICE void begin(const Matrix& p, int c0, int64_t k_begin, int of_k) {
    Base::begin(p, c0, k_begin, of_k);
    load(0);
  }
  APOLLO_DEVICE void fetch(unsigned char* stages_smem, int step) {
    store(stages_smem + Tile<T>::stage(step, 0));
    load(step + 1);
  }
  APOLLO_DEVICE void finish(const unsigned char*, int) {}

  APOLLO_DEVICE void load(int step) {
#pragma unroll
    for (int i = 0; i < Base::kVectors; ++i) {
      if (step < Base::whole) {
        packs[i].load(Base::source(i));
      } else {
        Base::load_guarded(packs[i], i, step);
      }
    }
    Base::src_gmem += Base::stage_stride;
  }
  APOLLO_DEVICE void store(unsigned char* to_smem) {
#pragma unroll
    for (int i = 0; i < Base::kVectors; ++i) {
      float x[Base::kVector];
      packs[i].get(x);
      Base::square(x, i);
#pragma unroll
      for (int piece = 0; piece < kPieces<T>; ++piece) {
        unsigned char* to = to_smem + Base::place(i) + piece * Tile<T>::kPlane;
        *reinterpret_cast<Piece<Base::kVector>*>(to) = split_off(x);
      }
    }
  }
};

template <class T, bool BY_ROW, bool SQUARES>
using Source =
    std::conditional_t<kPieces<T> == 1, Copied<T, BY_ROW, SQUARES>, Split<T, BY_ROW, SQUARES>>;

constexpr int kSharedLimit = 99 * 1024;  // of a block on sm_86, sm_89 and sm_120

// Shared memory of a block: stages of X, then as many of Z.
template <class T, int RANKS>
struct TileLayout {
  static constexpr int kZStage = RANKS * 2 * kStep, kZ = Tile<T>::kStages * Tile<T>::kStage;
  static constexpr int kShared = kZ + Tile<T>::kStages * kZStage;
  static_assert(kShared <= kSharedLimit);
  static_assert(8 * kTileThreads * 4 <= kShared, "q's scratch lies in the stages");
  APOLLO_DEVICE static int x(int step, int i) { return Tile<T>::stage(step, i); }
  APOLLO_DEVICE static int z(int step, int i) { return kZ + Tile<T>::place(step, i, kZStage); }
};

}  // namespace apollo
