// Philox4x32 (Salmon et al., SC 2011) and the projection's entries z(j, k) made from it.
// DESIGN.md, "Random numbers", is the contract; the file is read by g++ and nvcc alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "device.h"

namespace apollo {

constexpr int kRounds = 7;  // the fewest that pass BigCrush

struct Words {
  uint32_t w[4];
};

// The counter's last word says what the numbers are for, so no two uses share a counter.
// kExactGaussian is no such word: it asks for kGaussian's numbers by correctly rounded functions.
enum Distribution : uint32_t {
  kGaussian = 0,
  kRademacher = 1,
  kRounding = 2,
  kRoundingInt8 = 3,
  kSparse = 4,
  kMoments = 5,
  kExactGaussian = 16
};

// The 64-bit idiom alone makes nvcc add empty halves.
APOLLO_HOST_DEVICE uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t{a} * b;
#endif
}

APOLLO_HOST_DEVICE Words philox4x32(Words c, uint32_t key0, uint32_t key1, int rounds = kRounds) {
  for (int i = 0; i < rounds; ++i) {
    const uint64_t p0 = wide_product(0xD2511F53u, c.w[0]);
    const uint64_t p1 = wide_product(0xCD9E8D57u, c.w[2]);
    c = {{uint32_t(p1 >> 32) ^ c.w[1] ^ key0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.w[3] ^ key1,
          uint32_t(p0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// The float nearest to x, as the bits of the nearest bfloat16 (ties to even); x is finite.
inline uint16_t bfloat16_bits(double x) {
  const float narrow = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// Box-Muller in float64: after the rounding to bf16 no libm's last bit shows, so that the PyTorch
// form (philox.py) draws the same bits.
inline void normal_pair(uint32_t w0, uint32_t w1, uint16_t* z0, uint16_t* z1) {
  const double u1 = (double(w0 >> 9) + 0.5) * 0x1p-23;
  const double angle = double(w1 >> 9) * 0x1p-23 * 6.283185307179586476925;
  const double rho = std::sqrt(-2.0 * std::log(u1));
  *z0 = bfloat16_bits(rho * std::cos(angle));
  *z1 = bfloat16_bits(rho * std::sin(angle));
}

// One block of 16 normals of rank row j: call t holds k = 2t, 2t+1, 2t+8, 2t+9 of the block.
inline void normal_block(uint32_t block, uint32_t j, uint32_t epoch, uint32_t key0, uint32_t key1,
                         uint16_t z[16]) {
  for (uint32_t t = 0; t < 4; ++t) {
    const Words v = philox4x32({{4 * block + t, j, epoch, kGaussian}}, key0, key1);
    normal_pair(v.w[0], v.w[1], z + 2 * t, z + 2 * t + 1);
    normal_pair(v.w[2], v.w[3], z + 2 * t + 8, z + 2 * t + 9);
  }
}

// One block of 512 signs: bit i + 16e of word v of call t is k = 8 (16v + i) + 2t + e of the block.
inline void sign_block(uint32_t block, uint32_t j, uint32_t epoch, uint32_t key0, uint32_t key1,
                       uint16_t z[512]) {
  for (uint32_t t = 0; t < 4; ++t) {
    const Words words = philox4x32({{4 * block + t, j, epoch, kRademacher}}, key0, key1);
    for (uint32_t p = 0; p < 64; ++p) {
      for (uint32_t e = 0; e < 2; ++e) {
        const uint32_t minus = (words.w[p / 16] >> (p % 16 + 16 * e)) & 1u;
        z[8 * p + 2 * t + e] = static_cast<uint16_t>(0x3F80u | (minus << 15));
      }
    }
  }
}

// z [rank, dim] for k from start on, as bfloat16 bits in row-major order.
inline void draw(uint16_t* out, uint64_t key, uint32_t epoch, int64_t rank, int64_t dim,
                 int64_t start, Distribution distribution) {
  const uint32_t key0 = uint32_t(key), key1 = uint32_t(key >> 32);
  const int64_t width = distribution == kGaussian ? 16 : 512;
  uint16_t z[512];
  for (int64_t j = 0; j < rank; ++j) {
    for (int64_t first = start / width * width; first < start + dim; first += width) {
      const uint32_t block = uint32_t(first / width);
      if (distribution == kGaussian) {
        normal_block(block, uint32_t(j), epoch, key0, key1, z);
      } else {
        sign_block(block, uint32_t(j), epoch, key0, key1, z);
      }
      const int64_t begin = first < start ? start : first;
      const int64_t end = first + width < start + dim ? first + width : start + dim;
      std::memcpy(out + j * dim + (begin - start), z + (begin - first),
                  sizeof(uint16_t) * size_t(end - begin));
    }
  }
}

// Where block b of the sparse projection lies: 16 bits that say how far its `rank` columns are
// rotated and how places inside of a group of 8 are swapped.
APOLLO_HOST_DEVICE uint32_t sparse_place(uint32_t b, uint32_t epoch, uint32_t key0, uint32_t key1) {
  const Words v = philox4x32({{b / 8, 0xFFFFFFFFu, epoch, kSparse}}, key0, key1);
  return (v.w[b % 8 / 2] >> (16 * (b % 2))) & 0xFFFFu;
}

// The row of R that column i of a block at `place` is added to.
APOLLO_HOST_DEVICE int64_t sparse_row(int64_t i, uint32_t place, int64_t rank) {
  const int64_t turns = place / 8;
  if (rank % 8 != 0) return (i + (turns * rank >> 13)) % rank;
  const int64_t groups = rank / 8;
  return 8 * ((i / 8 + (turns * groups >> 13)) % groups) + (i % 8 ^ place % 8);
}

// The signs of 8 rows j from 8 j8 on, for the 16 blocks of b: bit b mod 16 + 16 (j mod 2) of word
// j mod 8 div 2; a set bit means -1.
APOLLO_HOST_DEVICE Words sparse_signs(uint32_t b, uint32_t j8, uint32_t epoch, uint32_t key0,
                                      uint32_t key1) {
  return philox4x32({{b / 16, j8, epoch, kSparse}}, key0, key1);
}
APOLLO_HOST_DEVICE uint32_t sparse_minus(const Words& signs, uint32_t b, uint32_t j) {
  return (signs.w[j % 8 / 2] >> (b % 16 + 16 * (j % 2))) & 1u;
}

// The one nonzero of each column k from start on: its row, and +1 or -1. One call of the generator
// serves 8 rows of 16 blocks, so the signs of 16 blocks are kept.
inline void sparse(int64_t* row, int8_t* sign, uint64_t key, uint32_t epoch, int64_t rank,
                   int64_t dim, int64_t start) {
  const uint32_t key0 = uint32_t(key), key1 = uint32_t(key >> 32);
  const int64_t end = start + dim;
  std::vector<Words> signs;
  int64_t band = -1;
  for (int64_t k = start; k < end;) {
    const int64_t b = k / rank;
    if (b / 16 != band) {
      band = b / 16;
      signs.clear();
      for (int64_t j = 0; j < rank; j += 8) {
        signs.push_back(sparse_signs(uint32_t(b), uint32_t(j / 8), epoch, key0, key1));
      }
    }
    const uint32_t place = sparse_place(uint32_t(b), epoch, key0, key1);
    for (int64_t i = k % rank; i < rank && k < end; ++i, ++k) {
      const int64_t j = sparse_row(i, place, rank);
      row[k - start] = j;
      sign[k - start] = sparse_minus(signs[size_t(j / 8)], uint32_t(b), uint32_t(j)) ? -1 : 1;
    }
  }
}

#if defined(APOLLO_KERNELS)

// The same two normals in float32 for the kernels, as bf16x2 (z0 in the low half): 14 issue slots
// per normal. Both uniforms are exact; the angle lies in [-pi, pi), which turns both signs. The
// absolute value costs nothing: lg2.approx errs by 2^-22 and might make the logarithm of the
// largest u1 positive, and the root of that a NaN.
APOLLO_DEVICE uint32_t normal_pair_fast(uint32_t w0, uint32_t w1) {
  const float u1 = __uint_as_float((w0 >> 9) | 0x3F800000u) - 0x1.fffffep-1f;
  const float x = (__uint_as_float((w1 >> 9) | 0x3F800000u) - 1.5f) * 6.283185307179586f;
  const float rho = -approx_sqrt(1.3862943611198906f * fabsf(approx_log2(u1)));  // -2 ln u1
  return pack_bf16(rho * approx_cos(x), rho * approx_sin(x));
}

// The same two normals in float64, as the host computes them: every card rounds to the same bf16.
APOLLO_DEVICE uint32_t normal_pair_exact(uint32_t w0, uint32_t w1) {
  const double u1 = (double(w0 >> 9) + 0.5) * 0x1p-23;
  const double rho = std::sqrt(-2.0 * std::log(u1));
  double sine, cosine;
  sine_and_cosine_of_turns(double(w1 >> 9) * 0x1p-23, sine, cosine);
  return pack_bf16(float(rho * cosine), float(rho * sine));
}

// The word of a rademacher call that holds the signs of k (a multiple of 8), and from that word the
// signs of k + {2t, 2t+1} as bf16x2.
APOLLO_DEVICE uint32_t sign_word(const Words& words, uint32_t k) {
  const uint32_t low = k & 128 ? words.w[1] : words.w[0], high = k & 128 ? words.w[3] : words.w[2];
  return k & 256 ? high : low;
}
APOLLO_DEVICE uint32_t sign_pair(uint32_t word, uint32_t k) {
  return ((word << (15 - k / 8 % 16)) & 0x80008000u) | 0x3F803F80u;
}

#endif

}  // namespace apollo
