// The entries z(j, k) as kernels draw them, and the tile of Z that project_mma.cuh multiplies.
//
// A distribution is a struct like Gaussian and Signs, with begin and pairs: four entries of rank
// row j per call of the generator, k = 16 b + {2t, 2t+1, 2t+8, 2t+9}, which is what one lane holds
// of the 16-deep A operand of mma.m16n8k16. A new one joins here, in `with_distribution` of
// launch.cu, with a number of its own in philox.cuh's enum Distribution and in DISTRIBUTIONS of
// cuda.py; on the host, in `draw` of philox.cuh. The sparse distribution has kernels of its own.
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

// The sparse distribution has one entry per k, so project_dot.cuh draws it by columns.
struct OneSign {};

// The places of blocks 8 call to 8 call + 7, as 16-bit halves.
APOLLO_DEVICE Words sparse_place_call(uint32_t call, uint32_t epoch, uint32_t key0, uint32_t key1) {
  return philox4x32({{call, 0xFFFFFFFFu, epoch, kSparse}}, key0, key1);
}
// Half i mod 8 of a call, low halves first; an index into registers would send them to memory.
APOLLO_DEVICE uint32_t sparse_half(const Words& words, uint32_t i) {
  const uint32_t low = i & 2 ? words.w[1] : words.w[0], high = i & 2 ? words.w[3] : words.w[2];
  return ((i & 4 ? high : low) >> (16 * (i & 1))) & 0xFFFFu;
}
// By how many of `count` a block's groups of 8, or its rows, are rotated.
APOLLO_DEVICE uint32_t sparse_rotation(uint32_t place, uint32_t count) {
  return uint32_t((uint64_t{place / 8} * count) >> 13);
}

// Column k of a slab for a rank below 8: z[j] lies `stride` floats from z[j - 1].
template <int R>
APOLLO_DEVICE void draw_column(float* z, int stride, const Matrix& p, uint32_t epoch, uint32_t k) {
  const uint32_t key0 = uint32_t(p.key), key1 = uint32_t(p.key >> 32);
  const uint32_t rank = R == 1 ? 1 : uint32_t(p.rank), b = k / rank;
  uint32_t row = 0;
  if constexpr (R > 1) {
    const Words places = sparse_place_call(b / 8, epoch, key0, key1);
    row = k - b * rank + sparse_rotation(sparse_half(places, b), rank);
    if (row >= rank) row -= rank;
  }
  const Words signs = philox4x32({{b / 16, 0, epoch, kSparse}}, key0, key1);
  const float sign = sparse_half(signs, row) >> b % 16 & 1 ? -1.0f : 1.0f;
#pragma unroll
  for (int j = 0; j < R; ++j) z[j * stride] = uint32_t(j) == row ? sign : 0.0f;
}

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
