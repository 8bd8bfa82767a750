// What crosses from bindings.cpp to the kernels: tables of parameters, and one launch each.
//
// A step of the low-rank parameters of one group is four launches, whatever their number:
//   project  R = X P^T per tile, moments where the tile holds all of K;  q        reads G
//   scale    sums of K chunks and rank tiles, moments of split tensors, s_c        small
//   limit    one block per parameter: the limiter, step, update_norm, counters     tiny
//   apply    W <- W - decay W - f s_c X                                            reads G, W;
//   writes W
// Dense parameters take two: adamw and advance. Nothing here allocates, waits or asks the device.
#pragma once

#include <cstdint>

namespace apollo {

enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// One low-rank parameter; all fields are 8 bytes, so that Python fills the table as int64 [n, 20].
// X [channels, k] lies in memory as rows of length k, `ld` elements apart (by_row), or as rows of
// length `channels`. Offsets count floats in the workspace, blocks count from the launch's first.
struct Parameter {
  void* weight;
  const void* grad;
  float* exp_avg;      // [channels, rank]
  float* exp_avg_sq;   // [channels, rank]
  float* update_norm;  // []
  float* step;         // []
  uint64_t key;
  int64_t channels, k, rank;
  int64_t weight_ld, grad_ld, by_row;
  int64_t chunks, chunk_length;  // parts of K that are summed by `scale`; 1: moments in `project`
  int64_t partial;               // R of each chunk [chunks, channels, rank], if `scale` sums
  int64_t sums;                  // |R_c|^2 and |N_c|^2 of each rank tile [2, rank_tiles, channels]
  int64_t channel;               // s [channels], then q [chunks, channels]
  int64_t parts;                 // of `scale`'s blocks [3, blocks], then {f, skip} for `apply`
  int64_t first_project, first_scale, first_apply;
};
constexpr int kParameterFields = 22;
static_assert(sizeof(Parameter) == 8 * kParameterFields, "a table row is int64 [22]");

// One dense parameter: `count` elements in the same memory order in all four tensors.
struct DenseParameter {
  void* weight;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* step;
  int64_t count, first_block, bad;  // bad: index of its flag among `flags`
};
constexpr int kDenseFields = 8;
static_assert(sizeof(DenseParameter) == 8 * kDenseFields, "a table row is int64 [8]");

// What a parameter group asks for. Pointers may be null; they are read on the device.
struct Hyper {
  const float* lr_tensor;   // overrides lr
  const float* grad_scale;  // of GradScaler: gradients are that many times too large
  const float* found_inf;   // non-zero: nothing is written
  long long* counters;      // updates, limited, not finite
  double lr, beta1, beta2, weight_decay, scale;
  float beta2_float, keep1, keep2, eps;  // keep: 1 - beta, subtracted in float64
  int64_t update_proj_gap;
  int correct_bias, maximize, tensor_scale, scale_front, disable_nl, rademacher;
};

// A launch over a group: parameter b of the table belongs to block i if map[i] == b.
struct Launch {
  const void* table;  // Parameter or DenseParameter
  const int32_t* map;
  float* workspace;
  int32_t* flags;
  int64_t blocks;
  int weight_dtype, grad_dtype;
  int rank;  // the group's: picks the kernel; a parameter's own may be smaller
  void* stream;
  Hyper hyper;
};

// How `project` cuts a parameter into blocks; Python lays out workspace and maps by it.
struct Tiling {
  int64_t channel_tile, rank_tile, channel_tiles, rank_tiles, chunks, chunk_length;
  int fused;  // moments in `project`
};
Tiling tiling(int64_t channels, int64_t k, int64_t rank, int64_t group_rank, int grad_dtype,
              bool by_row);

constexpr int kScaleChannels = 256;         // channels of a block of `scale`
constexpr int64_t kApplyVectors = 8 * 256;  // vectors of 8 elements of a block of `apply`, `adamw`

// Each returns a cudaError_t, 0 for success; a launch over no blocks does nothing.
int project(const Launch& launch);
int scale(const Launch& launch);
int limit(const Launch& launch);
int apply(const Launch& launch);
int adamw(const Launch& launch);
int advance(const Launch& launch);
const char* error_name(int error);

// The calling thread's device: hooks run on threads whose device is another one.
int current_device(int* device);
int use_device(int device);
int probe();  // an error if the current device has no image of the kernels

}  // namespace apollo
