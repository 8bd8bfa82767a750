// The entries z(j, k) as kernels draw them, and the tile of Z that project_mma.cuh multiplies.
//
// A distribution is a struct like Gaussian and Signs, with begin and pairs: four entries of rank
// row j per call of the generator, k = 16 b + {2t, 2t+1, 2t+8, 2t+9}, which is what one lane holds
// of the 16-deep A operand of mma.m16n8k16. A new one joins here, in `with_distribution` of
// launch.cu, with a number of its own in philox.cuh's enum Distribution and in DISTRIBUTIONS of
// cuda.py; on the host, in `draw` of philox.cuh. The sparse distribution has one entry per k and a
// kernel of its own, project_sparse.cuh, but at rank 1 it is a row of signs, too.
#pragma once

#include "common.cuh"
#include "philox.cuh"

namespace apollo {

constexpr int kStep = 32;          // K per stage
constexpr int kTileThreads = 512;  // 16 warps

// Which numbers: of a matrix and epoch, rank row j, and the call t of four.
struct Stream {
  uint32_t key0, key1, epoch, j, t;

  APOLLO_DEVICE static Stream of(const Matrix& p, uint32_t epoch, uint32_t j, uint32_t t) {
    return {uint32_t(p.key), uint32_t(p.key >> 32), epoch, j, t};
  }
  APOLLO_DEVICE Words call(uint32_t block, Distribution distribution) const {
    return philox4x32({{4 * block + t, j, epoch, distribution}}, key0, key1);
  }
};

APOLLO_DEVICE uint32_t epoch_of(const Matrix& p, const Launch& launch) {
  return uint32_t(*p.step / launch.hyper.update_proj_gap);
}

// Two bf16x2 of a block of 16 k, the `block`-th from k0 on: {2t, 2t+1} and {2t+8, 2t+9}.
struct Pairs {
  uint32_t low, high;
};

struct Gaussian {
  static constexpr uint32_t kRun = 16;  // `begin` is needed at each multiple of it

  APOLLO_DEVICE void begin(const Stream&, uint32_t) {}
  APOLLO_DEVICE Pairs pairs(const Stream& stream, uint32_t k0, uint32_t block) const {
    const Words w = stream.call(k0 / 16 + block, kGaussian);
    return {normal_pair_fast(w.w[0], w.w[1]), normal_pair_fast(w.w[2], w.w[3])};
  }
};

// For replicas on unlike cards, whose fast functions may round differently.
struct ExactGaussian {
  static constexpr uint32_t kRun = 16;

  APOLLO_DEVICE void begin(const Stream&, uint32_t) {}
  APOLLO_DEVICE Pairs pairs(const Stream& stream, uint32_t k0, uint32_t block) const {
    const Words w = stream.call(k0 / 16 + block, kGaussian);
    return {normal_pair_exact(w.w[0], w.w[1]), normal_pair_exact(w.w[2], w.w[3])};
  }
};

struct Signs {
  static constexpr uint32_t kRun = 128;
  uint32_t word;  // one of a call's four; keeping all of them would spill registers

  APOLLO_DEVICE void begin(const Stream& stream, uint32_t k0) {
    word = sign_word(stream.call(k0 / 512, kRademacher), k0);
  }
  APOLLO_DEVICE Pairs pairs(const Stream&, uint32_t k0, uint32_t block) const {
    return {sign_pair(word, k0 + 16 * block), sign_pair(word, k0 + 16 * block + 8)};
  }
};

// Rank 1 of the sparse distribution, where each block of K is a single k: bit k mod 16 of a call's
// first word.
struct SparseSigns {
  static constexpr uint32_t kRun = 16;

  APOLLO_DEVICE void begin(const Stream&, uint32_t) {}
  APOLLO_DEVICE Pairs pairs(const Stream& s, uint32_t k0, uint32_t block) const {
    const Words words = philox4x32({{k0 / 16 + block, 0, s.epoch, kSparse}}, s.key0, s.key1);
    const uint32_t bits = words.w[0] >> (2 * s.t);
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

// Z of rank rows j0.. and k0..k0+31 into shared memory, rows of 64 bytes. Rows beyond the rank are
// 0.
template <int RANKS, class DISTRIBUTION>
struct Drawing {
  static constexpr int kCalls = RANKS * 8 / kTileThreads;  // (row, t, block of 16) per thread
  DISTRIBUTION distribution;
  Stream stream;
  int at_smem;  // of chunk 0
  bool inside;

  APOLLO_DEVICE void begin(const Matrix& p, int j0, uint32_t epoch) {
    const int row = int(threadIdx.x / 4 % RANKS);
    stream = Stream::of(p, epoch, uint32_t(j0 + row), threadIdx.x % 4);
    inside = stream.j < p.rank;
    at_smem = swizzled<64>(row, 0) + 4 * int(threadIdx.x % 4);
  }

  APOLLO_DEVICE void store(unsigned char* z_smem, uint32_t k0) {
    if (DISTRIBUTION::kRun > kStep && inside && k0 % DISTRIBUTION::kRun == 0) {
      distribution.begin(stream, k0);  // every chunk of K begins at a run
    }
    for (int i = 0; i < kCalls; ++i) {
      const int block = kCalls == 2 ? i : int(threadIdx.x) / (4 * RANKS);
      Pairs z = {0, 0};
      if (inside) z = distribution.pairs(stream, k0, uint32_t(block));
      *reinterpret_cast<uint32_t*>(z_smem + (at_smem ^ 32 * block)) = z.low;
      *reinterpret_cast<uint32_t*>(z_smem + (at_smem ^ 32 * block ^ 16)) = z.high;
    }
  }
};

// z(j, k) for the stream's row j and call t, and 16 k from k0 (a multiple of 16), as floats.
template <class DISTRIBUTION>
APOLLO_DEVICE void draw_call(float* z, const Stream& stream, uint32_t k0) {
  DISTRIBUTION distribution;
  distribution.begin(stream, k0);
  const Pairs pairs = distribution.pairs(stream, k0, 0);
  const uint32_t t = stream.t;
  z[2 * t] = low_bf16(pairs.low);
  z[2 * t + 1] = high_bf16(pairs.low);
  z[2 * t + 8] = low_bf16(pairs.high);
  z[2 * t + 9] = high_bf16(pairs.high);
}

}  // namespace apollo
