// project for the sparse distribution and rank >= 2: R[c, h(k)] += sigma(k) X[c, k], and q. Each k
// meets one row of R, so every element of X is read once whatever the rank, and sums stay in the
// registers of the lane (channels by row) or of the warp (channels by column) that holds the row.
// A block of K, r long, is a turned permutation of the rows (philox.cuh): a holder of rows reads
// from each block the k that belong to them, so nothing moves between lanes.
#pragma once

#include "common.cuh"
#include "draw.cuh"
#include "sparse_share.h"

namespace apollo {

constexpr int kSparseThreads = 256;
constexpr int kSparseWarps = kSparseThreads / 32;

// What one load brings: 16 bytes of neighbours, or a single element.
template <class T, int E>
struct Unit {
  static_assert(E * sizeof(T) == 16, "16 bytes");
  uint4 word;

  APOLLO_DEVICE void load(const T* from) { word = load16(from); }
  // At most n elements, zeros beyond; `wide`: the address is a multiple of 16.
  APOLLO_DEVICE void load(const T* from, int n, bool wide) {
    if (wide && n >= E) {
      load(from);
      return;
    }
    T values[E];
#pragma unroll
    for (int i = 0; i < E; ++i) values[i] = i < n ? from[i] : T{};
    memcpy(&word, values, sizeof word);
  }

  // x[e] is element e xor turn.
  APOLLO_DEVICE void get(float (&x)[E], uint32_t turn) const {
    const bool second = (turn & 2) != 0, first = (turn & 1) != 0;
    if constexpr (E == 4) {
      const uint32_t a[4] = {second ? word.z : word.x, second ? word.w : word.y,
                             second ? word.x : word.z, second ? word.y : word.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = __uint_as_float(first ? a[e ^ 1] : a[e]);
    } else {
      const bool third = (turn & 4) != 0;
      const uint32_t a[4] = {third ? word.z : word.x, third ? word.w : word.y,
                             third ? word.x : word.z, third ? word.y : word.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t pair = second ? a[i ^ 1] : a[i];
        if constexpr (kDtypeOf<T> == kBfloat16) {  // widening picks the bytes of either half
          const uint32_t low = first ? 0x3244u : 0x1044u;
          x[2 * i] = __uint_as_float(__byte_perm(pair, 0, low));
          x[2 * i + 1] = __uint_as_float(__byte_perm(pair, 0, low ^ 0x2200u));
        } else {
          const uint32_t turned = __byte_perm(pair, 0, first ? 0x1032u : 0x3210u);
          x[2 * i] = half_to_float(uint16_t(turned));
          x[2 * i + 1] = half_to_float(uint16_t(turned >> 16));
        }
      }
    }
  }
};
template <class T>
struct Unit<T, 1> {
  T value;

  APOLLO_DEVICE void load(const T* from) { value = *from; }
  APOLLO_DEVICE void load(const T* from, int n, bool) { value = n > 0 ? *from : T{}; }
  APOLLO_DEVICE void get(float (&x)[1], uint32_t) const { x[0] = to_float(value); }
};

// Half i mod 8 of a call, low halves first; an index into registers would send them to memory.
APOLLO_DEVICE uint32_t half_of(const Words& words, uint32_t i) {
  const uint32_t low = i & 2 ? words.w[1] : words.w[0], high = i & 2 ? words.w[3] : words.w[2];
  return ((i & 4 ? high : low) >> (16 * (i & 1))) & 0xFFFFu;
}

// The words of a matrix and epoch.
struct SparseWords {
  uint32_t key0, key1, epoch;

  APOLLO_DEVICE Words call(uint32_t c0, uint32_t c1) const {
    return philox4x32({{c0, c1, epoch, kSparse}}, key0, key1);
  }
};

// How far the blocks of K are rotated, in groups of 8 or, for other ranks, in rows; and `turn`,
// which swaps places inside of a group. One call of the generator serves 8 blocks.
struct Places {
  SparseWords numbers;
  uint32_t count;  // of what is rotated: groups or rows
  Words words = {};
  uint32_t held = ~0u;
  uint32_t rotation = 0, turn = 0;

  APOLLO_DEVICE void move_to(uint32_t b) {
    if (b / 8 != held) {
      held = b / 8;
      words = numbers.call(held, 0xFFFFFFFFu);
    }
    const uint32_t place = half_of(words, b);
    turn = place % 8;
    rotation = uint32_t((uint64_t{place / 8} * count) >> 13);
  }
  // Which of the block's groups (or columns) is turned onto the i-th group (or row) of R.
  APOLLO_DEVICE uint32_t source(uint32_t i) const {
    return i - rotation + (i < rotation ? count : 0);
  }
};

// The signs of E neighbouring rows of R from j on, 16 blocks per call of the generator.
template <int E>
struct RowSigns {
  static constexpr int kWords = E == 1 ? 1 : E / 2;
  SparseWords numbers;
  uint32_t j;
  uint32_t words[kWords] = {};
  uint32_t held = ~0u;

  APOLLO_DEVICE void get(float (&z)[E], uint32_t b) {
    if (b / 16 != held) {
      held = b / 16;
      const Words all = numbers.call(held, j / 8);
      if constexpr (E == 8) {
        for (int i = 0; i < 4; ++i) words[i] = all.w[i];
      } else if constexpr (E == 4) {
        words[0] = j % 8 < 4 ? all.w[0] : all.w[2];
        words[1] = j % 8 < 4 ? all.w[1] : all.w[3];
      } else {
        words[0] = half_of(all, j);
      }
    }
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const uint32_t shifted = words[e / 2] << (15 - b % 16);
      z[e] = __uint_as_float(((e % 2 ? shifted : shifted << 16) & 0x80000000u) | 0x3F800000u);
    }
  }
};

// What a block computes: channels from c0 on, the rows of R of one rank tile, a chunk of K, which
// is `length` long from k_begin on.
struct SparsePlace {
  RankShare share;
  uint32_t tile, chunk, k_begin, length;
  int64_t c0;

  APOLLO_DEVICE static SparsePlace of(const Matrix& p, uint32_t unit, uint32_t holders,
                                      uint32_t channels) {
    SparsePlace at;
    at.share = share_ranks(uint32_t(p.rank), unit, holders);
    const uint32_t block = uint32_t(int64_t(blockIdx.x) - p.first_project);
    const uint32_t channel_tiles = (uint32_t(p.channels) + channels - 1) / channels;
    const uint32_t rest = block / at.share.tiles;
    at.tile = block % at.share.tiles;
    at.chunk = rest / channel_tiles;
    at.c0 = int64_t(rest % channel_tiles) * channels;
    at.k_begin = uint32_t(p.k_begin) + at.chunk * uint32_t(p.chunk_length);
    const uint32_t left = uint32_t(p.k_end) - at.k_begin;
    at.length = left < uint32_t(p.chunk_length) ? left : uint32_t(p.chunk_length);
    return at;
  }
};

// From the sums in shared memory, `slots` per row of R, to moments and norms, or to R. Neighbouring
// threads take neighbouring rows of a channel, V each, 4 where they lie as 16 bytes. CHANNELS is a
// multiple of 32. `of_channel` gives a channel's place in shared memory.
template <int V, int CHANNELS, class OF_CHANNEL>
APOLLO_DEVICE void finish_rows(const Matrix& p, const Launch& launch, const SparsePlace& at,
                               int rows, const float* sums_smem, OF_CHANNEL of_channel) {
  constexpr int kTogether = 8 / V;  // of a thread, so that 32 threads hold all rows of a tile
  const Hyper& h = launch.hyper;
  const float factor = sign_and_scale(h);
  const bool summed_later = summed(p);
  const int j0 = int(at.tile) * rows, slots = int(at.share.slots);
  const int rank = int(p.rank), left = rank - j0 < rows ? rank - j0 : rows;
  const int lanes = rows <= 64 ? 8 : rows <= 128 ? 16 : 32;
  const int thread = thread_again(), lane = thread % lanes;
  float *exp_avg = global(p.exp_avg) + j0, *exp_avg_sq = global(p.exp_avg_sq) + j0;
  float* r_workspace = r_of(p, launch, at.chunk) + j0;
  float* norms = r_of(p, launch, 0) + int64_t(at.tile) * p.channels;
  const int64_t channels = p.channels, other_norms = p.rank_tiles * p.channels;
  const int after = kSparseThreads / lanes;  // a thread's next channel

  struct Moments {
    Pack<float, V> m[kTogether], v[kTogether];
  };
  const auto end_of = [&](int channel) {
    return channel < CHANNELS && at.c0 + channel < channels ? left : 0;
  };
  const auto load = [&](Moments& to, int channel) {
    const int64_t entry = (at.c0 + channel) * rank;
    const int end = summed_later ? 0 : end_of(channel);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int row = (lane + i * lanes) * V;
      if (row >= end) continue;
      to.m[i].load(exp_avg + entry + row);
      to.v[i].load(exp_avg_sq + entry + row);
    }
  };

  Moments held, next;
  int channel = thread / lanes;
  load(held, channel);
#pragma unroll 1
  for (; channel - thread / lanes < CHANNELS; channel += after) {
    load(next, channel + after);  // under way while this channel is updated
    const int64_t c = at.c0 + channel, entry = c * rank;
    const float* from_smem = sums_smem + of_channel(channel);
    const int end = end_of(channel);
    float rr = 0.0f, nn = 0.0f;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int row = (lane + i * lanes) * V;
      if (row >= end) continue;
      float r[V], m[V], v[V];
#pragma unroll
      for (int e = 0; e < V; ++e) r[e] = from_smem[row + e];
#pragma unroll 1
      for (int slot = 1; slot < slots; ++slot) {
#pragma unroll
        for (int e = 0; e < V; ++e) r[e] += from_smem[slot * rows + row + e];
      }
      held.m[i].get(m);
      held.v[i].get(v);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        r[e] *= factor;
        if (summed_later) continue;
        update_moments(r[e], m[e], v[e], h);
        const float normal = normalized(m[e], v[e], h);
        rr = fmaf(r[e], r[e], rr);
        nn = fmaf(normal, normal, nn);
      }
      Pack<float, V> pack;
      if (summed_later) {
        pack.set(r);
        pack.store(r_workspace + entry + row);
        continue;
      }
      pack.set(m);
      pack.store(exp_avg + entry + row);
      pack.set(v);
      pack.store(exp_avg_sq + entry + row);
    }
    held = next;
    if (summed_later) continue;
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      rr += __shfl_xor_sync(0xFFFFFFFFu, rr, offset);
      nn += __shfl_xor_sync(0xFFFFFFFFu, nn, offset);
    }
    if (lane == 0 && end > 0) {
      norms[c] = rr;
      norms[other_norms + c] = nn;
    }
  }
}

template <int CHANNELS, class OF_CHANNEL>
APOLLO_DEVICE void finish_sparse(const Matrix& p, const Launch& launch, const SparsePlace& at,
                                 int rows, const float* sums_smem, OF_CHANNEL of_channel) {
  const float* r_workspace = r_of(p, launch, at.chunk);
  const bool wide = aligned16(p.exp_avg, p.rank) && aligned16(p.exp_avg_sq, p.rank) &&
                    aligned16(r_workspace, p.rank) && rows % 4 == 0;
  if (wide) {
    finish_rows<4, CHANNELS>(p, launch, at, rows, sums_smem, of_channel);
  } else {
    finish_rows<1, CHANNELS>(p, launch, at, rows, sums_smem, of_channel);
  }
}

// Channels by row: a warp holds a few of them, a lane E rows of R for each: what 16 bytes of X
// hold, or 1 where the rank is no multiple of 8.
template <class T, int E>
APOLLO_DEVICE void sparse_by_row(const Launch& launch, float* sums_smem) {
  constexpr int kChannels = sparse_warp_channels(E);   // of a warp
  constexpr int kAhead = E == 4 ? 1 : E == 8 ? 2 : 4;  // blocks of K that are loaded ahead
  const Matrix& p = matrix_of(launch);
  const auto at = SparsePlace::of(p, E, 32, kSparseWarps * kChannels);
  const int thread = thread_again(), lane = thread % 32, warp = thread / 32;
  const uint32_t rank = uint32_t(p.rank), slots = at.share.slots;
  uint32_t slot = uint32_t(lane) / at.share.width;
  uint32_t unit = at.tile * at.share.width + uint32_t(lane) % at.share.width;
  // Lanes that hold nothing read what others read, and it is dropped.
  const bool idle = slot >= slots || unit >= rank / E;
  if (slot >= slots) slot = 0;
  if (unit >= rank / E) unit = rank / E - 1;
  const uint32_t length = at.length, k_end = at.k_begin + length;
  const bool wide = E == 1 || aligned16(static_cast<const T*>(p.x), p.grad_ld);
  const int64_t c0 = at.c0 + warp * kChannels, ld = p.grad_ld;
  const int channels = p.channels - c0 < kChannels ? int(p.channels - c0) : kChannels;
  const T* src_gmem = static_cast<const T*>(p.x) + c0 * ld;
  const SparseWords numbers = {uint32_t(p.key), uint32_t(p.key >> 32), epoch_of(p, launch)};
  Places places = {numbers, E == 1 ? rank : rank / 8};
  RowSigns<E> signs = {numbers, unit * E};

  float sums[kChannels][E] = {}, squares[kChannels] = {};
  // The first of this lane's k in block b, whose turn is left in `places`.
  const auto source = [&](uint32_t b) -> uint32_t {
    places.move_to(b);
    if constexpr (E == 1) return b * rank + places.source(unit);
    if constexpr (E == 8) return b * rank + 8 * places.source(unit);
    return b * rank + 8 * places.source(unit / 2) + 4 * (unit % 2 ^ places.turn / 4);
  };
  const auto add = [&](const Unit<T, E>(&x_reg)[kChannels], uint32_t turn, uint32_t b) {
    float z[E];
    signs.get(z, b);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      float x[E];
      x_reg[c].get(x, turn);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        sums[c][e] = fmaf(x[e], z[e], sums[c][e]);
        squares[c] = fmaf(x[e], x[e], squares[c]);
      }
    }
  };

  uint32_t b = at.k_begin / rank + slot, k = 0;
  const uint32_t rounds = (length + rank * slots - 1) / (rank * slots);
  const bool complete = wide && channels == kChannels;
  const uint32_t whole = complete ? length / rank / slots / kAhead * kAhead : 0;
  if (whole > 0) {
    Unit<T, E> x_reg[kAhead][kChannels];
    uint32_t turns[kAhead];
    const auto load = [&](int a, uint32_t block) {
      k = source(block);
      turns[a] = places.turn;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) x_reg[a][c].load(src_gmem + c * ld + k);
    };
#pragma unroll
    for (int a = 0; a < kAhead; ++a) load(a, b + a * slots);
#pragma unroll 1
    for (uint32_t round = 0; round < whole; round += kAhead) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        add(x_reg[a], turns[a], b);
        if (round + kAhead < whole) load(a, b + kAhead * slots);
        b += slots;
      }
    }
  }
#pragma unroll 1
  for (uint32_t round = whole; round < rounds; ++round) {  // K may end within, rows may lie askew
    Unit<T, E> x_reg[kChannels];
    k = source(b);
    const int n = k < k_end ? (k_end - k < E ? int(k_end - k) : E) : 0;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      x_reg[c].load(src_gmem + c * ld + k, c < channels ? n : 0, wide);
    }
    add(x_reg, places.turn, b);
    b += slots;
  }

  float* q = q_of(p, launch, int64_t(at.chunk) * at.share.tiles + at.tile);
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    float* to_smem = sums_smem + (warp * kChannels + c) * 32 * E + lane * E;
#pragma unroll
    for (int e = 0; e < E; ++e) to_smem[e] = sums[c][e];
    float square = idle ? 0.0f : squares[c];
    for (int o = 16; o > 0; o /= 2) square += __shfl_xor_sync(0xFFFFFFFFu, square, o);
    if (lane == 0 && c < channels) q[c0 + c] = square;
  }
  __syncthreads();  // the sums of all channels are there
  finish_sparse<kSparseWarps * kChannels>(p, launch, at, int(at.share.width) * E, sums_smem,
                                          [](int channel) { return channel * 32 * E; });
}

// Channels by column: a lane holds what 16 bytes of a row of X hold, a warp a few rows of R, for
// which it reads one row of X each from every block of K.
template <class T>
struct SparseColumns {
  static constexpr int kLoad = sparse_load(kDtypeOf<T>);
  static constexpr int kRows = sparse_unit(kDtypeOf<T>, 0, false);  // of R, of a warp
  static constexpr int kChannels = 32 * kLoad;
  static constexpr int kPitch = kSparseWarps * kRows + 4;  // 16-byte stores meet all banks
  static constexpr int kSums = kChannels * kPitch;
  static constexpr int kShared = (kSums + kSparseWarps * kChannels) * int(sizeof(float));
  static constexpr int kAhead = 8 / kRows;
};

template <class T>
APOLLO_DEVICE void sparse_by_column(const Launch& launch, float* sums_smem) {
  using Shape = SparseColumns<T>;
  constexpr int kLoad = Shape::kLoad, kRows = Shape::kRows, kAhead = Shape::kAhead;
  const Matrix& p = matrix_of(launch);
  const auto at = SparsePlace::of(p, kRows, kSparseWarps, Shape::kChannels);
  const int thread = thread_again(), lane = thread % 32, warp = thread / 32;
  const uint32_t rank = uint32_t(p.rank), slots = at.share.slots;
  const uint32_t slot = uint32_t(warp) / at.share.width;
  const uint32_t j0 = (at.tile * at.share.width + uint32_t(warp) % at.share.width) * kRows;
  const bool idle = slot >= slots || j0 >= rank;
  const uint32_t length = at.length, k_end = at.k_begin + length;
  const bool wide = aligned16(static_cast<const T*>(p.x), p.grad_ld);
  const int64_t channels_left = p.channels - at.c0 - lane * kLoad, ld = p.grad_ld;
  const T* src_gmem = static_cast<const T*>(p.x) + at.c0 + lane * kLoad;
  const bool eighths = rank % 8 == 0;
  const SparseWords numbers = {uint32_t(p.key), uint32_t(p.key >> 32), epoch_of(p, launch)};
  Places places = {numbers, eighths ? rank / 8 : rank};
  RowSigns<kRows> signs = {numbers, j0};

  float sums[kRows][kLoad] = {}, squares[kLoad] = {};
  // The k of row j0 + i in block b, after places.move_to(b).
  const auto source = [&](uint32_t b, uint32_t i) -> uint32_t {
    if (!eighths) return b * rank + places.source(j0 + i);
    return b * rank + 8 * places.source(j0 / 8) + ((j0 % 8 + i) ^ places.turn);
  };
  const auto add = [&](const Unit<T, kLoad>(&x_reg)[kRows], uint32_t b) {
    float z[kRows];
    signs.get(z, b);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float x[kLoad];
      x_reg[i].get(x, 0);
#pragma unroll
      for (int e = 0; e < kLoad; ++e) {
        sums[i][e] = fmaf(x[e], z[i], sums[i][e]);
        squares[e] = fmaf(x[e], x[e], squares[e]);
      }
    }
  };

  uint32_t b = at.k_begin / rank + slot;
  const uint32_t rounds = idle ? 0 : (length + rank * slots - 1) / (rank * slots);
  const bool complete = wide && at.c0 + Shape::kChannels <= p.channels && j0 + kRows <= rank;
  const uint32_t whole = complete && !idle ? length / rank / slots / kAhead * kAhead : 0;
  if (whole > 0) {
    Unit<T, kLoad> x_reg[kAhead][kRows];
    const auto load = [&](int a, uint32_t block) {
      places.move_to(block);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        x_reg[a][i].load(src_gmem + int64_t(source(block, uint32_t(i))) * ld);
      }
    };
#pragma unroll
    for (int a = 0; a < kAhead; ++a) load(a, b + a * slots);
#pragma unroll 1
    for (uint32_t round = 0; round < whole; round += kAhead) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        add(x_reg[a], b);
        if (round + kAhead < whole) load(a, b + kAhead * slots);
        b += slots;
      }
    }
  }
#pragma unroll 1
  for (uint32_t round = whole; round < rounds; ++round) {
    Unit<T, kLoad> x_reg[kRows];
    places.move_to(b);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint32_t k = j0 + i < rank ? source(b, uint32_t(i)) : k_end;
      const int n = k >= k_end || channels_left <= 0 ? 0
                    : channels_left < kLoad          ? int(channels_left)
                                                     : kLoad;
      x_reg[i].load(src_gmem + int64_t(k) * ld, n, wide);
    }
    add(x_reg, b);
    b += slots;
  }

  float* squares_smem = sums_smem + Shape::kSums;
  // A lane's channels lie 32 places apart, so that a store's lanes lie side by side.
  const auto of_channel = [](int c) { return (c % kLoad * 32 + c / kLoad) * Shape::kPitch; };
#pragma unroll
  for (int e = 0; e < kLoad; ++e) {
    float* to_smem = sums_smem + (e * 32 + lane) * Shape::kPitch + warp * kRows;
#pragma unroll
    for (int i = 0; i < kRows; ++i) to_smem[i] = sums[i][e];
    squares_smem[warp * Shape::kChannels + lane * kLoad + e] = squares[e];
  }
  __syncthreads();  // the sums of all rank rows are there
  const int channel = thread_again();
  if (channel < Shape::kChannels && at.c0 + channel < p.channels) {
    float sum = 0.0f;
    for (int i = 0; i < kSparseWarps; ++i) sum += squares_smem[i * Shape::kChannels + channel];
    q_of(p, launch, int64_t(at.chunk) * at.share.tiles + at.tile)[at.c0 + channel] = sum;
  }
  finish_sparse<Shape::kChannels>(p, launch, at, int(at.share.width) * kRows, sums_smem,
                                  of_channel);
}

template <class T>
__global__ void __launch_bounds__(kSparseThreads, 2) project_sparse(Launch launch) {
  APOLLO_SHARED(shared);
  if (skipped(launch.hyper)) return;
  const Matrix& p = matrix_of(launch);
  float* sums_smem = reinterpret_cast<float*>(shared);
  if (!by_row(p)) {
    sparse_by_column<T>(launch, sums_smem);
  } else if (p.rank % 8 == 0) {
    sparse_by_row<T, sparse_load(kDtypeOf<T>)>(launch, sums_smem);
  } else {
    sparse_by_row<T, 1>(launch, sums_smem);
  }
}

}  // namespace apollo
