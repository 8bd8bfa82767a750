// project: R = r^-1/2 X Z^T and q_c = |X_c|^2, reading X once; Z is drawn and never leaves the SM.
//
// project_tiles (rank >= 8): tensor cores. A block of 16 warps holds a tile of channels x rank rows
// and walks along K in steps of 32: X and Z go to shared memory as bf16 (two stages, one barrier a
// step), ldmatrix brings them to mma.m16n8k16. X in more than bf16's 8 bits is split into exact
// bf16 pieces: float16 into two, float32 into three. Where the block holds all of K it updates the
// moments at once. project_dots (rank < 8): a streaming dot product, memory bound.
#pragma once

#include "common.cuh"
#include "philox.cuh"

namespace apollo {

constexpr int kStep = 32;          // K per stage
constexpr int kTileThreads = 512;  // 16 warps
constexpr int kDotThreads = 256;
constexpr int kDotSlab = 1024;  // K per stage of project_dots

template <class T>
constexpr int kPieces = sizeof(T) == 4 ? 3 : 1;
template <>
constexpr int kPieces<float16> = 2;

// Channels of a tile. Three planes of 256 would not fit the 99 KB of sm_86, 89 and 120.
template <class T>
constexpr int kChannelTile = kPieces<T> == 1 ? 256 : 128;

// Where 16-byte chunk `chunk` of row `row` lies, so that 8 rows of a matrix meet all banks.
template <int ROW_BYTES>
APOLLO_DEVICE int swizzled(int row, int chunk) {
  const int turn = ROW_BYTES == 64 ? (row >> 1) & 3 : row & 7;
  return row * ROW_BYTES + ((chunk ^ turn) << 4);
}

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
  static constexpr int kChannels = kChannelTile<T>;
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
  const T* from;  // this thread's first vector of the next stage
  int at;         // and where it goes in shared memory
  int64_t ahead, apart;
  int channels, k;  // of the tile, and what is left of K
  bool wide;
  Pack8<T> packs[Shape::kVectors];
  float squares[BY_ROW ? Shape::kVectors : 8] = {};

  APOLLO_DEVICE static int row(int i) { return int(threadIdx.x) / kRowVectors + i * kRowsApart; }
  APOLLO_DEVICE static int chunk() { return int(threadIdx.x) % kRowVectors; }

  APOLLO_DEVICE void begin(const Parameter& p, int c0, int64_t k_begin, int64_t k_end) {
    const int left = int(p.channels) - c0;
    channels = left < Shape::kChannels ? left : Shape::kChannels;
    k = int(k_end - k_begin);
    const int64_t outer = (BY_ROW ? c0 : k_begin) + row(0);
    const int64_t inner = (BY_ROW ? k_begin : c0) + 8 * chunk();
    from = static_cast<const T*>(p.grad) + outer * p.grad_ld + inner;
    ahead = BY_ROW ? kStep : kStep * p.grad_ld;
    apart = kRowsApart * p.grad_ld;
    at = swizzled<kRowBytes>(row(0), chunk());
    wide = aligned16(static_cast<const T*>(p.grad), p.grad_ld);
  }

  APOLLO_DEVICE void load() {
    const int inner = (BY_ROW ? k : channels) - 8 * chunk(), outer = BY_ROW ? channels : k;
#pragma unroll
    for (int i = 0; i < Shape::kVectors; ++i) {
      packs[i].load(from + i * apart, row(i) < outer ? inner : 0, wide);
    }
    from += ahead;
    k -= kStep;
  }

  APOLLO_DEVICE void store(unsigned char* shared) {
    for (int i = 0; i < Shape::kVectors; ++i) {
      float x[8];
      packs[i].get(x);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float& square = squares[BY_ROW ? i : e];
        square = fmaf(x[e], x[e], square);
      }
      unsigned char* to = shared + at + i * kRowsApart * kRowBytes;
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

  // q of the tile's channels; `scratch` holds 16 rows of them. Fixed order, so the same bits.
  APOLLO_DEVICE void reduce(float* scratch, float* q, int64_t c0, int64_t channels) {
    if constexpr (BY_ROW) {
      for (int i = 0; i < Shape::kVectors; ++i) {
        float sum = squares[i];
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
        if (chunk() == 0 && c0 + row(i) < channels) q[c0 + row(i)] = sum;
      }
    } else {
      constexpr int kRows = kTileThreads / kRowVectors;
      for (int e = 0; e < 8; ++e) {
        scratch[row(0) * Shape::kChannels + 8 * chunk() + e] = squares[e];
      }
      __syncthreads();
      const int c = int(threadIdx.x);
      if (c < Shape::kChannels && c0 + c < channels) {
        float sum = 0.0f;
        for (int i = 0; i < kRows; ++i) sum += scratch[i * Shape::kChannels + c];
        q[c0 + c] = sum;
      }
      __syncthreads();
    }
  }
};

// Z of rank rows j0.. and k0..k0+31 into shared memory, rows of 64 bytes. Rows beyond the rank are
// 0.
template <int RANKS, bool SIGNS>
struct Drawing {
  static constexpr int kCalls = RANKS * 8 / kTileThreads;  // (row, t, block of 16) per thread
  uint32_t signs;                                          // of this thread's row and t, for 128 k
  uint32_t key0, key1, epoch, j;
  int at;  // in shared memory, of chunk 0
  bool inside;

  APOLLO_DEVICE void begin(const Parameter& p, int j0, uint32_t the_epoch) {
    key0 = uint32_t(p.key);
    key1 = uint32_t(p.key >> 32);
    epoch = the_epoch;
    j = uint32_t(j0) + threadIdx.x / 4 % RANKS;
    inside = j < p.rank;
    at = swizzled<64>(int(threadIdx.x / 4 % RANKS), 0) + 4 * int(threadIdx.x % 4);
  }

  APOLLO_DEVICE void store(unsigned char* shared, uint32_t k0) {
    const uint32_t t = threadIdx.x % 4;
    if constexpr (SIGNS) {  // one word serves 4 stages; keeping all four would spill registers
      if (inside && k0 % 128 == 0) {  // every chunk of K begins at one
        const Words w = philox4x32({{4 * (k0 / 512) + t, j, epoch, kRademacher}}, key0, key1);
        signs = sign_word(w, k0);
      }
    }
    for (int i = 0; i < kCalls; ++i) {
      const int block = kCalls == 2 ? i : int(threadIdx.x) / (4 * RANKS);
      uint32_t low = 0, high = 0;
      if (inside) {
        if constexpr (SIGNS) {
          low = sign_pair(signs, k0 + 16 * block);
          high = sign_pair(signs, k0 + 16 * block + 8);
        } else {
          const Words w =
              philox4x32({{4 * (k0 / 16 + block) + t, j, epoch, kGaussian}}, key0, key1);
          low = normal_pair_fast(w.w[0], w.w[1]);
          high = normal_pair_fast(w.w[2], w.w[3]);
        }
      }
      *reinterpret_cast<uint32_t*>(shared + (at ^ 32 * block)) = low;
      *reinterpret_cast<uint32_t*>(shared + (at ^ 32 * block ^ 16)) = high;
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
  static constexpr int kWarpsRank = RANKS / 32, kWarpsChannel = 16 / kWarpsRank;
  static constexpr int kWarpChannels = Tile<T>::kChannels / kWarpsChannel;
  static constexpr int kM = kWarpChannels / 16;
  // Tensor cores cut sums off instead of rounding them: beyond bf16's precision short runs are
  // accumulated there and added up in float32 registers.
  static constexpr bool kShortRuns = kPieces<T> > 1;
  // In shared memory, of this lane's matrix rows: the others lie a constant or one turned bit away.
  int x_at, z_at;
  float run[kM][4][4] = {};
  float total[kShortRuns ? kM : 1][4][4] = {};

  APOLLO_DEVICE static int warp_channel() {
    return int(threadIdx.x / 32) / kWarpsRank * kWarpChannels;
  }
  APOLLO_DEVICE static int warp_rank() { return int(threadIdx.x / 32) % kWarpsRank * 32; }

  APOLLO_DEVICE void begin() {
    const int lane = int(threadIdx.x % 32), low = lane & 7, second = (lane >> 3) & 1;
    const int third = lane >> 4, c = warp_channel();
    z_at = swizzled<64>(warp_rank() + 8 * third + low, second);
    x_at = BY_ROW ? swizzled<64>(c + (lane & 15), third)
                  : swizzled<2 * Tile<T>::kChannels>(8 * third + low, c / 8 + second);
  }

  APOLLO_DEVICE void add(const unsigned char* x, const unsigned char* z) {
#pragma unroll
    for (int kk = 0; kk < 2; ++kk) {
      uint32_t b[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        load_matrices<false>(b[n], z + (z_at ^ 32 * kk) + 16 * 64 * n);
      }
#pragma unroll
      for (int piece = 0; piece < kPieces<T>; ++piece) {
        const unsigned char* plane = x + piece * Tile<T>::kPlane;
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          uint32_t a[4];
          const int at = BY_ROW ? (x_at ^ 32 * kk) + 16 * 64 * m
                                : (x_at ^ 32 * m) + 16 * 2 * Tile<T>::kChannels * kk;
          load_matrices<!BY_ROW>(a, plane + at);
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            multiply_add(run[m][n], a, b[n / 2][2 * (n % 2)], b[n / 2][2 * (n % 2) + 1]);
          }
        }
      }
    }
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

  // Moments of every entry of R, and the sums of squares of R and N per channel of this rank tile;
  // or, where `scale` sums, R itself.
  APOLLO_DEVICE void finish(const Parameter& p, const Launch& launch, int c0, int j0, int chunk,
                            float* scratch) {
    const Hyper& h = launch.hyper;
    const float factor = rsqrtf(float(p.rank)) * sign_and_scale(h);
    const int lane = int(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    const int channels = int(p.channels), rank = int(p.rank), j = j0 + warp_rank() + 2 * t;
    const bool summed_later = p.chunks > 1;
    float* partial = launch.workspace + p.partial + chunk * p.channels * p.rank;
    float *exp_avg = p.exp_avg, *exp_avg_sq = p.exp_avg_sq;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_channel() + 16 * m + g + 8 * half, c = c0 + row;
        const int64_t at = int64_t(c) * rank + j;
        const int left = c < channels ? rank - j : 0;
        float rr = 0.0f, nn = 0.0f, old_m[4][2], old_v[4][2];
        if (!summed_later) {  // all loads before the first store
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int k = 8 * (i / 2) + i % 2;
            if (k >= left) continue;
            old_m[i / 2][i % 2] = exp_avg[at + k];
            old_v[i / 2][i % 2] = exp_avg_sq[at + k];
          }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int n = i / 2, e = i % 2, k = 8 * n + e;
          if (k >= left) continue;
          const float r =
              factor * (kShortRuns ? total[kShortRuns ? m : 0] : run[m])[n][2 * half + e];
          if (summed_later) {
            partial[at + k] = r;
            continue;
          }
          const float ne = update_moments(r, old_m[n][e], old_v[n][e], h);
          exp_avg[at + k] = old_m[n][e];
          exp_avg_sq[at + k] = old_v[n][e];
          rr = fmaf(r, r, rr);
          nn = fmaf(ne, ne, nn);
        }
        for (int offset = 1; offset < 4; offset *= 2) {
          rr += __shfl_xor_sync(0xFFFFFFFFu, rr, offset);
          nn += __shfl_xor_sync(0xFFFFFFFFu, nn, offset);
        }
        if (t == 0) {
          const int at = (warp_rank() / 32 * Tile<T>::kChannels + row) * 2;
          scratch[at] = rr;
          scratch[at + 1] = nn;
        }
      }
    }
    __syncthreads();
    const int row = int(threadIdx.x);
    if (p.chunks == 1 && row < Tile<T>::kChannels && c0 + row < p.channels) {
      float rr = 0.0f, nn = 0.0f;
      for (int i = 0; i < kWarpsRank; ++i) {
        rr += scratch[(i * Tile<T>::kChannels + row) * 2];
        nn += scratch[(i * Tile<T>::kChannels + row) * 2 + 1];
      }
      float* sums = launch.workspace + p.sums + int64_t(j0 / RANKS) * p.channels + c0 + row;
      sums[0] = rr;
      sums[(p.rank + RANKS - 1) / RANKS * p.channels] = nn;
    }
  }
};

// What a block computes. Rank tiles are neighbours, so that they share X in L2. Each side is below
// 2^31; products are not.
struct Place {
  int c0, j0, chunk;
};
template <int CHANNELS, int RANKS>
APOLLO_DEVICE Place place_of(const Parameter& p) {
  const int block = int(int64_t(blockIdx.x) - p.first_project);
  const int rank_tiles = (int(p.rank) + RANKS - 1) / RANKS;
  const int channel_tiles = (int(p.channels) + CHANNELS - 1) / CHANNELS;
  return {block / rank_tiles % channel_tiles * CHANNELS, block % rank_tiles * RANKS,
          block / rank_tiles / channel_tiles};
}

template <class T, int RANKS, bool SIGNS, bool BY_ROW>
APOLLO_DEVICE void project_tile(const Parameter& p, const Launch& launch, unsigned char* shared) {
  using Layout = TileLayout<T, RANKS>;
  const auto place = place_of<Tile<T>::kChannels, RANKS>(p);
  const int64_t k_begin = place.chunk * p.chunk_length;
  const int64_t k_end = k_begin + p.chunk_length < p.k ? k_begin + p.chunk_length : p.k;
  const uint32_t epoch = uint32_t(int64_t(*p.step) / launch.hyper.update_proj_gap);

  Stage<T, BY_ROW> stage;
  Drawing<RANKS, SIGNS> drawing;
  Product<T, RANKS, BY_ROW> product;
  drawing.begin(p, place.j0, epoch);
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
    __syncthreads();  // one a step: the other stage was read before the last one
    product.add(x, z);
    if (parity == 1) product.end_run();
    parity ^= 1;
  }
  product.end_run();
  __syncthreads();  // the stages become scratch
  float* scratch = reinterpret_cast<float*>(shared);
  const auto again =
      place_of<Tile<T>::kChannels, RANKS>(p);  // cheaper than registers kept till here
  if (again.j0 == 0) {
    float* q = launch.workspace + p.channel + p.channels * (1 + again.chunk);
    stage.reduce(scratch, q, again.c0, p.channels);
  }
  product.finish(p, launch, again.c0, again.j0, again.chunk, scratch);
}

template <class T, int RANKS, bool SIGNS>
__global__ void __launch_bounds__(kTileThreads, 1) project_tiles(Launch launch) {
  APOLLO_SHARED(shared);
  if (skipped(launch.hyper)) return;
  const Parameter& p = static_cast<const Parameter*>(launch.table)[launch.map[blockIdx.x]];
  if (by_row(p)) {
    project_tile<T, RANKS, SIGNS, true>(p, launch, shared);
  } else {
    project_tile<T, RANKS, SIGNS, false>(p, launch, shared);
  }
}

// z(j, k) for one row j and 16 k from k0 (a multiple of 16) as floats, by one thread per call t.
template <bool SIGNS>
APOLLO_DEVICE void draw_call(float* z, uint64_t key, uint32_t epoch, uint32_t j, int64_t k0,
                             uint32_t t) {
  const uint32_t key0 = uint32_t(key), key1 = uint32_t(key >> 32);
  uint32_t low, high;
  if constexpr (SIGNS) {
    const uint32_t c0 = 4 * uint32_t(k0 / 512) + t;
    const Words w = philox4x32({{c0, j, epoch, kRademacher}}, key0, key1);
    low = sign_pair(sign_word(w, uint32_t(k0)), uint32_t(k0));
    high = sign_pair(sign_word(w, uint32_t(k0)), uint32_t(k0) + 8);
  } else {
    const uint32_t c0 = 4 * uint32_t(k0 / 16) + t;
    const Words w = philox4x32({{c0, j, epoch, kGaussian}}, key0, key1);
    low = normal_pair_fast(w.w[0], w.w[1]);
    high = normal_pair_fast(w.w[2], w.w[3]);
  }
  z[2 * t] = low_bf16(low);
  z[2 * t + 1] = high_bf16(low);
  z[2 * t + 8] = low_bf16(high);
  z[2 * t + 9] = high_bf16(high);
}

// Channels of a block of project_dots: contiguous ones take a warp each in turn, the others lie
// across the lanes.
constexpr int kDotChannels = 64, kDotColumns = 256;

template <class T, int R, bool BY_ROW>
struct Dots {
  static constexpr int kOwn = 8;  // channels of a lane: one after the other, or side by side
  float sums[kOwn][R + 1] = {};   // R dot products and the squared norm

  // A slab of Z as floats, z[j][k], meets the slab's k of this block's channels.
  APOLLO_DEVICE void add(const Parameter& p, int64_t c0, int64_t k0, int64_t k_end, const float* z,
                         bool wide) {
    constexpr int kAhead = 4;  // loads under way before the first is used
    const T* grad = static_cast<const T*>(p.grad);
    const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
    const int last = k_end - k0 < kDotSlab ? int(k_end - k0) : kDotSlab;
    if constexpr (BY_ROW) {
      for (int at = 8 * lane; at < last; at += 256) {
#pragma unroll
        for (int first = 0; first < kOwn; first += kAhead) {
          Pack8<T> packs[kAhead];
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
            const int64_t c = c0 + 8 * warp + first + i;
            packs[i].load(grad + c * p.grad_ld + k0 + at, c < p.channels ? last - at : 0, wide);
          }
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
            float x[8];
            packs[i].get(x);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
              float (&own)[R + 1] = sums[first + i];
              own[R] = fmaf(x[e], x[e], own[R]);
#pragma unroll
              for (int j = 0; j < R; ++j) own[j] = fmaf(x[e], z[j * kDotSlab + at + e], own[j]);
            }
          }
        }
      }
    } else {
      const int64_t c = c0 + 8 * lane, left = p.channels - c;
      if (left <= 0) return;
      for (int first = warp; first < last; first += 8 * kAhead) {
        Pack8<T> packs[kAhead];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          const int at = first + 8 * a;
          packs[a].load(grad + (k0 + at) * p.grad_ld + c, at < last ? left : 0, wide);
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          float x[8];
          packs[a].get(x);
#pragma unroll
          for (int i = 0; i < kOwn; ++i) {
            sums[i][R] = fmaf(x[i], x[i], sums[i][R]);
#pragma unroll
            for (int j = 0; j < R; ++j) {
              sums[i][j] = fmaf(x[i], z[j * kDotSlab + first + 8 * a], sums[i][j]);
            }
          }
        }
      }
    }
  }

  // Adds up what lanes or warps hold, in fixed order; `scratch` holds 256 floats a warp.
  APOLLO_DEVICE void finish(const Parameter& p, const Launch& launch, int64_t c0, int64_t chunk,
                            float* scratch) {
    const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
    const float factor = rsqrtf(float(p.rank)) * sign_and_scale(launch.hyper);
    float* partial = launch.workspace + p.partial + chunk * p.channels * p.rank;
    float* q = launch.workspace + p.channel + p.channels * (1 + chunk);
#pragma unroll
    for (int j = 0; j <= R; ++j) {
      if (j < R && j >= p.rank) continue;
      if constexpr (BY_ROW) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          float sum = sums[i][j];
          for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, o);
          const int64_t c = c0 + 8 * warp + i;
          if (lane == 0 && c < p.channels) {
            if (j == R) {
              q[c] = sum;
            } else {
              partial[c * p.rank + j] = factor * sum;
            }
          }
        }
      } else {
        for (int i = 0; i < kOwn; ++i) scratch[256 * warp + 8 * lane + i] = sums[i][j];
        __syncthreads();
        float sum = 0.0f;
        for (int w = 0; w < 8; ++w) sum += scratch[256 * w + threadIdx.x];
        const int64_t c = c0 + threadIdx.x;
        if (c < p.channels) {
          if (j == R) {
            q[c] = sum;
          } else {
            partial[c * p.rank + j] = factor * sum;
          }
        }
        __syncthreads();
      }
    }
  }
};

template <class T, int R, bool SIGNS, bool BY_ROW>
APOLLO_DEVICE void project_dot(const Parameter& p, const Launch& launch, int64_t block,
                               float* shared) {
  constexpr int kChannels = BY_ROW ? kDotChannels : kDotColumns;
  const int64_t tiles = (p.channels + kChannels - 1) / kChannels;
  const int64_t c0 = block % tiles * kChannels, chunk = block / tiles;
  const int64_t k_begin = chunk * p.chunk_length;
  const int64_t k_end = k_begin + p.chunk_length < p.k ? k_begin + p.chunk_length : p.k;
  const uint32_t epoch = uint32_t(int64_t(*p.step) / launch.hyper.update_proj_gap);
  const bool wide = aligned16(static_cast<const T*>(p.grad), p.grad_ld);
  Dots<T, R, BY_ROW> dots;
  for (int64_t k = k_begin; k < k_end; k += kDotSlab) {
    for (int i = int(threadIdx.x); i < R * kDotSlab / 4; i += kDotThreads) {
      const int j = i / (kDotSlab / 4), call = i % (kDotSlab / 4), at = call / 4 * 16;
      if (j < p.rank) {  // beyond K too: x is zero there, and z has to be finite
        draw_call<SIGNS>(shared + j * kDotSlab + at, p.key, epoch, uint32_t(j), k + at,
                         uint32_t(call % 4));
      }
    }
    __syncthreads();
    dots.add(p, c0, k, k_end, shared, wide);
    __syncthreads();
  }
  dots.finish(p, launch, c0, chunk, shared);
}

template <class T, int R, bool SIGNS>
__global__ void __launch_bounds__(kDotThreads, R > 1            ? 1
                                               : sizeof(T) == 4 ? 2
                                                                : 3) project_dots(Launch launch) {
  APOLLO_SHARED(shared);
  if (skipped(launch.hyper)) return;
  const Parameter& p = static_cast<const Parameter*>(launch.table)[launch.map[blockIdx.x]];
  const int64_t block = int64_t(blockIdx.x) - p.first_project;
  float* z = reinterpret_cast<float*>(shared);
  if (by_row(p)) {
    project_dot<T, R, SIGNS, true>(p, launch, block, z);
  } else {
    project_dot<T, R, SIGNS, false>(p, launch, block, z);
  }
}

template <int R>
constexpr int kDotShared = (R * kDotSlab > 2048 ? R * kDotSlab : 2048) * int(sizeof(float));

}  // namespace apollo
