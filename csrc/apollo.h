// The border of the kernels: the rows of their tables, the structs of a launch, and the launches.
//
// A step of the low-rank matrices of one family is three launches, whatever their number:
//   project  R = X P^T per tile, moments where the tile holds all of K;  q          reads G
//   scale    R that lies in the workspace: its moments;  s_c;  the limiter           small
//   apply    W <- (1 - lr wd) W - f s_c X_c;  the step                               reads G and W
// Dense parameters take two: adamw and advance. Nothing here allocates, waits or asks the device.
// plan.h fills tables, maps and launches from named fields; launch.cu picks the kernels.
#pragma once

#include <cstdint>

#include "device.h"

namespace apollo {

// A dtype joins here, in `pieces` below, in common.cuh (conversions and kDtypeOf), in `with_dtype`
// of launch.cu and in DTYPES of cuda.py. kInt8 stands for codes: of a weight, beside a grid for
// each group of neighbours in a row (int8.cuh), with a WeightPack of its own in weights.cuh; or of
// dense moments, beside a unit for each block of neighbours (moments.cuh).
enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 3 };

constexpr int size_of(int dtype) { return dtype == kFloat32 ? 4 : dtype == kInt8 ? 1 : 2; }
constexpr int kGroup = 128;  // int8 weights that share a grid
constexpr int kBlock = 128;  // int8 moments that share a unit

// How many bf16 numbers hold a gradient's element exactly: the tensor cores multiply bf16.
constexpr int pieces(int dtype) { return dtype == kBfloat16 ? 1 : dtype == kFloat16 ? 2 : 3; }

// The kernels of `project` by the matrix's own rank: a matrix's bits must not depend on what else
// is in the launch. kRankOne holds the rank 0 of an empty matrix too.
enum RankClass : int { kRankOne, kRankTo4, kRankTo7, kRankTo64, kRankBeyond };
constexpr RankClass rank_class(int64_t rank) {
  return rank <= 1    ? kRankOne
         : rank <= 4  ? kRankTo4
         : rank <= 7  ? kRankTo7
         : rank <= 64 ? kRankTo64
                      : kRankBeyond;
}
// Below rank 8 the tensor cores' tiles would lie mostly idle; project_dot.cuh runs instead.
constexpr bool uses_dots(RankClass rank) { return rank <= kRankTo7; }

// Tiles of a block of `project`: rank rows, and channels. Three planes of 256 channels would not
// fit the 99 KB of sm_86, 89 and 120; for dots, contiguous channels take a warp each in turn, the
// others lie across the lanes.
constexpr int rank_tile(RankClass rank) {
  return uses_dots(rank) ? 7 : rank == kRankTo64 ? 64 : 128;
}
constexpr int mma_channels(int dtype) { return pieces(dtype) == 1 ? 256 : 128; }
constexpr int kDotChannels = 64, kDotColumns = 256;

// The limiter's gamma, and what keeps quotients of norms finite; a stored norm below it counts as
// unset. apollo_kernels/batch.py has the same two, and a test compares them.
constexpr double kNormGrowth = 1.01, kTiny = 1e-8;

// `scale` takes a thread per channel where `project` has left sums, or a few entries of R; more of
// them are shared by 2^shift neighbouring lanes, so that a lone matrix fills the device.
constexpr int kScaleThreads = 256;
APOLLO_HOST_DEVICE constexpr int scale_shift(int64_t rank, bool summed) {
  return summed && rank >= 8 ? 3 : 0;
}
APOLLO_HOST_DEVICE constexpr int64_t scale_blocks(int64_t channels, int shift) {
  const int64_t of_block = kScaleThreads >> shift;
  return channels > 0 ? (channels + of_block - 1) / of_block : 1;
}

// `apply` and `adamw` stream vectors of neighbours: 16 bytes of the wider element, so that a warp's
// accesses lie side by side and touch each 32-byte sector once; beside it lie 16 bytes or less of
// the other.
constexpr int kStreamThreads = 256, kStreamVectors = 8;  // of a block, of a thread
constexpr int apply_vector(int weight_dtype, int grad_dtype) {
  return size_of(weight_dtype) == 4 || size_of(grad_dtype) == 4 ? 4 : 8;
}
constexpr int kDenseVector = 4;  // moments are float32, or a warp's vectors are a block of codes
constexpr int kDenseElements = kDenseVector * kStreamVectors * kStreamThreads;  // of a block

// K per stage of the dense projections, whose first one begins at a multiple of it.
constexpr int kStep = 32;
constexpr int kHeadChannels = 32;  // of a block of project_head.cuh

// X [channels, k] lies in memory as rows of length k, `ld` elements apart (kByRow), or as rows of
// length `channels`. Offsets count floats in the workspace, blocks count from the launch's first.
enum Flag : int64_t {
  kByRow = 1,     // the rows in memory are channels
  kRowMajor = 2,  // the rows in memory are the matrix's own
  kLeads = 4,     // `apply` advances `step`, which matrices may share
  kSummed = 8,    // R goes to the workspace and `scale` updates the moments
};
struct Matrix {
  void* weight;
  int32_t* grid;  // of an int8 weight: [rows, groups], where the whole's first row would be
  const void* grad;
  float* exp_avg;      // [channels, rank]
  float* exp_avg_sq;   // [channels, rank]
  float* update_norm;  // []
  int64_t* step;       // []
  uint64_t key;
  int64_t channels, k, rank;
  int64_t weight_ld, grad_ld;
  int64_t flags;
  int64_t chunks, chunk_length;  // of K, each summed by a block of its own
  int64_t rank_tiles;
  int64_t q_rows;  // parts that a channel's q comes in: chunks, or chunks x rank tiles
  int64_t q;       // squared norms [q_rows, channels] of X as it is
  int64_t s;       // [channels]
  int64_t r;       // R of each chunk [chunks, channels, rank] if kSummed; else |R_c|^2 and |N_c|^2
                   // of each rank tile [2, rank tiles, channels]
  int64_t parts;   // double [3, blocks], of `scale`'s blocks
  int64_t apply_shift;   // a block of `apply` is 2^shift vectors wide and lower by as much
  int64_t apply_across;  // such blocks side by side
  int64_t first_project, first_scale, first_apply;
  // X may be a part of a whole matrix, whose k and weights have the random numbers of their places
  // there. `project` takes [k_begin, k_end) of the whole's k, from the first one on where a block
  // of numbers begins; what this part has before it is the head (project_head.cuh).
  const void* x;  // where X would begin, if its first k were the whole's first
  int64_t k_first, k_begin, k_end;
  int64_t row, column;  // of the whole matrix: where this part's first weight stands
  int64_t first_head;
  // Where the contracted side is cut, each of several owners has the moments of `share` channels.
  int64_t share;
  int64_t sent_r, sent_q;  // places in what an owner is sent: R [share, rank] and q [share]
};

// What `scale` leaves for `apply`: one per matrix, at the workspace's beginning.
struct Record {
  int64_t t;        // the step, from 1
  float f;          // W <- keep W - f s_c X_c
  float keep_high;  // 1 - lr wd, as in keep.h
  float keep_low;
  uint32_t skip;     // u^2 is not finite
  uint32_t arrived;  // blocks of `scale` that are through; 0 between launches
  uint32_t unused;
};
constexpr int kRecordFloats = int(sizeof(Record) / sizeof(float));
static_assert(sizeof(Record) == 32, "records and parts need 8-byte aligned places");

// One dense parameter: `count` elements in the same memory order in all four tensors.
struct DenseRow {
  void* weight;
  int32_t* grid;    // of an int8 weight, whose rows are whole groups; where the whole's would be
  uint64_t key;     // of all rounding
  int64_t columns;  // the length of its rows
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  float* exp_avg_unit;  // of int8 moments, whose blocks do not end within a row: [blocks]
  float* exp_avg_sq_unit;
  int64_t* step;
  int64_t count, first_block;
  int64_t first;  // the number of its first element in the whole parameter, of which it is a part
};

// What a parameter group asks for. Pointers may be null; they are read on the device.
struct Hyper {
  const float* lr_tensor;   // overrides lr
  const float* grad_scale;  // of GradScaler: gradients are that many times too large
  const float* found_inf;   // non-zero: nothing is written
  const float* clip;        // of max_grad_norm: known from `scale` on
  long long* counters;      // updates, limited, not finite
  double lr, beta1, beta2, weight_decay, scale;
  float beta1_float, beta2_float, keep1, keep2, eps;  // keep: 1 - beta, subtracted in float64
  int64_t update_proj_gap;
  int distribution;  // of philox.cuh
  int correct_bias, maximize, tensor_scale, scale_front, disable_nl;
  int stochastic_rounding;  // of bf16 weights
};

// A launch over a family: row map[i] of the table belongs to block i.
struct Launch {
  const void* table;  // Matrix or DenseRow
  const int32_t* map;
  float* workspace;
  int32_t* bad;  // per dense parameter: an element was not finite
  int64_t blocks;
  int weight_dtype, grad_dtype;
  int moments_dtype;  // of dense parameters
  RankClass rank;
  void* stream;
  Hyper hyper;
  // Of parts of matrices:
  float* sent;                  // R and q for each of the owners
  int64_t owners, sent_floats;  // of one of them
  double* norms;                // sums over channels, for each matrix 1 or, if tensor_scale, 3
};

// Each returns a cudaError_t, 0 for success; a launch over no blocks does nothing.
int launch_project(const Launch& launch);
int launch_scale(const Launch& launch);
int launch_apply(const Launch& launch);
int launch_heads(const Launch& launch);
int launch_send(const Launch& launch);
int launch_scale_parts(const Launch& launch);
int launch_limit(const Launch& launch);  // blocks: the matrices
int launch_adamw(const Launch& launch);
int launch_advance(const Launch& launch);  // blocks: the parameters

// Loads the kernels of a family onto the current device, which a first launch would do otherwise:
// too late within the capture of a graph. `launch` need hold dtypes and rank only.
int load_low_rank(const Launch& launch);
int load_dense(const Launch& launch);

const char* error_name(int error);
// The calling thread's device: hooks run on threads whose device is another one.
int current_device(int* device);
int use_device(int device);
int probe();  // an error if the current device has no image of the kernels

}  // namespace apollo
