// The entries z(j, k) as kernels draw them, and the tile of Z that project_mma.cuh multiplies.
//
// A distribution is a struct like Gaussian and Signs. words() is a call of the generator, which
// serves kCallLength of k, and pairs() makes four entries of it: of rank row j, k = 16 b + {2t,
// 2t+1, 2t+8, 2t+9}, what one lane holds of the 16-deep A operand of mma.m16n8k16. A new one joins
// here, in `with_distribution` of launch.cu, with a number of its own in philox.cuh's enum
// Distribution and in DISTRIBUTIONS of cuda.py; on the host, in `draw` of philox.cuh. The sparse
// distribution has one entry per k and a kernel of its own, project_sparse.cuh, but at rank 1 it is
// a row of signs, too.
#pragma once

#include "common.cuh"
#include "philox.cuh"

namespace apollo {

constexpr int kTileThreads = 512;  // 16 warps

// Which numbers: of a matrix and epoch, rank row j, and the call t of four.
struct Stream {
  uint32_t key0, key1, epoch, j, t;

  APOLLO_DEVICE static Stream of(const Matrix& p, uint32_t epoch, uint32_t j, uint32_t t) {
    return {uint32_t(p.key), uint32_t(p.key >> 32), epoch, j, t};
  }
  APOLLO_DEVICE Words call(uint32_t four_blocks, Distribution distribution) const {
    return philox4x32({{four_blocks + t, j, epoch, distribution}}, key0, key1);
  }
};

APOLLO_DEVICE uint32_t epoch_of(const Matrix& p, const Launch& launch) {
  return uint32_t(*p.step / launch.hyper.update_proj_gap);
}

// Two bf16x2 of the `block`-th 16 of the 32 k that begin at k0: {2t, 2t+1} and {2t+8, 2t+9}.
struct Pairs {
  uint32_t low, high;
};

struct Gaussian {
  static constexpr uint32_t kCallLength = 16;
  APOLLO_DEVICE static Words words(const Stream& stream, uint32_t k0, uint32_t block) {
    return stream.call(k0 / 4 + 4 * block, kGaussian);
  }
  APOLLO_DEVICE static Pairs pairs(const Words& w, uint32_t, uint32_t) {
    return {normal_pair_fast(w.w[0], w.w[1]), normal_pair_fast(w.w[2], w.w[3])};
  }
};

// For replicas on unlike cards, whose fast functions may round differently.
struct ExactGaussian : Gaussian {
  APOLLO_DEVICE static Pairs pairs(const Words& w, uint32_t, uint32_t) {
    return {normal_pair_exact(w.w[0], w.w[1]), normal_pair_exact(w.w[2], w.w[3])};
  }
};

struct Signs {
  static constexpr uint32_t kCallLength = 512;
  APOLLO_DEVICE static Words words(const Stream& stream, uint32_t k0, uint32_t) {
    return stream.call(k0 / 512 * 4, kRademacher);
  }
  APOLLO_DEVICE static Pairs pairs(const Words& words, uint32_t k0, uint32_t block) {
    const uint32_t word = sign_word(words, k0);
    return {sign_pair(word, k0 + 16 * block), sign_pair(word, k0 + 16 * block + 8)};
  }
};

// Rank 1 of the sparse distribution, where each block of K is a single k: bit k mod 16 of a call's
// first word.
struct SparseSigns {
  static constexpr uint32_t kCallLength = 16;
  APOLLO_DEVICE static Words words(const Stream& s, uint32_t k0, uint32_t block) {
    Words words = philox4x32({{k0 / 16 + block, 0, s.epoch, kSparse}}, s.key0, s.key1);
    words.w[0] >>= 2 * s.t;
    return words;
  }
  APOLLO_DEVICE static Pairs pairs(const Words& words, uint32_t, uint32_t) {
    const uint32_t bits = words.w[0];
    const uint32_t low = (bits & 1) << 15 | (bits & 2) << 30;
    const uint32_t high = (bits & 0x100) << 7 | (bits & 0x200) << 22;
    return {low | 0x3F803F80u, high | 0x3F803F80u};
  }
};

// Where 16-byte chunk `chunk` of row `row` lies, so that 8 rows of a matrix meet all banks.
template <int ROW_BYTES>
APOLLO_DEVICE int swizzled(int row, int chunk) {
  const int turn = ROW_BYTES == 64 ? (row >> 1) & 3 : row & 7;
  return row * ROW_BYTES + ((chunk ^ turn) << 4);
}

// Z of rank rows j0.. in shared memory, a stage after the other, in rows of 64 bytes. Rows beyond
// the rank are drawn, too: no R of theirs is stored. AHEAD: the words of a stage are worked out
// beside the entries of the one before, so that integer products and special functions are busy at
// once; for the same reason half of the warps begin with the words, and half with the entries. It
// takes registers, which not every kernel has.
template <int RANKS, class DISTRIBUTION, bool AHEAD>
struct Drawing {
  static constexpr int kCalls = RANKS * 8 / kTileThreads;  // (row, t, block of 16) per thread
  static constexpr bool kServesMany = DISTRIBUTION::kCallLength > kStep;  // stages by one call
  static constexpr bool kHolds = AHEAD || kServesMany;
  static constexpr int kWords = kServesMany ? 1 : kCalls;
  using CallWords = Words[kWords];
  Stream stream;
  uint32_t block;  // this thread's first one in a stage
  int dst_smem;
  CallWords held;  // of the next stage

  APOLLO_DEVICE void begin(const Matrix& p, int j0, uint32_t epoch, uint32_t k0) {
    const uint32_t row = threadIdx.x / 4 % RANKS, t = threadIdx.x % 4;
    stream = Stream::of(p, epoch, uint32_t(j0) + row, t);
    block = kCalls == 2 ? 0 : threadIdx.x / (4 * RANKS);
    dst_smem = swizzled<64>(int(row), int(2 * block)) + 4 * int(t);
    if constexpr (kHolds) call(held, k0);
  }

  // The next stage, which begins at k0.
  APOLLO_DEVICE void store(unsigned char* z_smem, uint32_t k0) {
    const uint32_t next = k0 + kStep;
    CallWords words;
    if constexpr (!kHolds) {
      call(words, k0);
      store(z_smem, k0, words);
    } else if (AHEAD && threadIdx.x / 128 % 2 != 0) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = held[i];
      if (begins_call(next)) call(held, next);
      store(z_smem, k0, words);
    } else {
      store(z_smem, k0, held);
      if (begins_call(next)) call(held, next);
    }
  }

  // Every stage does where a call serves one or less; the branch that says so costs 5 % of the
  // instructions. On Blackwell it stays: without it the compiler moves so much that it spills.
  APOLLO_DEVICE static bool begins_call(uint32_t k0) {
    if (!kServesMany && kArchitecture < 100) return true;
    return k0 % DISTRIBUTION::kCallLength == 0;
  }

  APOLLO_DEVICE void call(CallWords& words, uint32_t k0) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[i] = DISTRIBUTION::words(stream, k0, block + uint32_t(i));
    }
  }
  APOLLO_DEVICE void store(unsigned char* z_smem, uint32_t k0, const CallWords& words) const {
#pragma unroll
    for (int i = 0; i < kCalls; ++i) {
      const Pairs z = DISTRIBUTION::pairs(words[i % kWords], k0, block + uint32_t(i));
      *reinterpret_cast<uint32_t*>(z_smem + (dst_smem ^ 32 * i)) = z.low;
      *reinterpret_cast<uint32_t*>(z_smem + (dst_smem ^ 32 * i ^ 16)) = z.high;
    }
  }
};

// z(j, k) for the stream's row j and call t, and 16 k from k0 (a multiple of 16), as floats.
template <class DISTRIBUTION>
APOLLO_DEVICE void draw_call(float* z, const Stream& stream, uint32_t k0) {
  const Pairs pairs = DISTRIBUTION::pairs(DISTRIBUTION::words(stream, k0, 0), k0, 0);
  const uint32_t t = stream.t;
  z[2 * t] = low_bf16(pairs.low);
  z[2 * t + 1] = high_bf16(pairs.low);
  z[2 * t + 8] = low_bf16(pairs.high);
  z[2 * t + 9] = high_bf16(pairs.high);
}

}  // namespace apollo
