// From named fields to what the kernels read: rows, maps from blocks to rows, workspace, launches.
// The one place that knows how a matrix is cut into blocks, where its numbers lie in the workspace
// and in which order the launches go. Plain C++, shared with the tests' emulated device.
#pragma once

#include <cstdint>
#include <vector>

#include "apollo.h"

namespace apollo {

// Where the caller has put what a plan asked for, on the device.
struct Memory {
  const void* table = nullptr;
  const int32_t* maps = nullptr;
  void* workspace = nullptr;
};

// How `project` cuts a matrix into blocks.
struct Tiling {
  int64_t channel_tiles, rank_tiles, chunks, chunk_length;
};
Tiling tiling(int64_t channels, int64_t k, int64_t rank, int grad_dtype, bool by_row);

// The low-rank matrices of one family: dtypes and rank class are equal.
class LowRankPlan {
 public:
  // separate: R goes to the workspace, so that something may come between `project` and `scale`.
  LowRankPlan(int weight_dtype, int grad_dtype, bool separate);

  // `matrix` holds addresses, key, sizes, leading dimensions and the flags kByRow, kRowMajor and
  // kLeads; its place among the others is worked out here. Throws std::invalid_argument.
  void add(Matrix matrix);
  void set_gradients(const std::vector<uintptr_t>& addresses);

  int64_t size() const { return int64_t(rows_.size()); }
  int64_t table_words() const { return size() * int64_t(sizeof(Matrix) / 8); }
  int64_t map_size() const { return project_blocks_ + scale_blocks_ + apply_blocks_; }
  int64_t workspace_floats() const { return r_begin() + r_size_; }
  // All q of the plan, in floats of the workspace.
  int64_t q_begin() const { return parts_begin() + parts_size_; }
  int64_t q_end() const { return q_begin() + q_size_; }

  void write_table(void* table) const;
  void write_maps(int32_t* maps) const;

  void place(const Memory& memory) { memory_ = memory; }
  int load() const;  // the kernels, onto the current device
  int project(const Hyper& hyper, void* stream) const;
  int scale(const Hyper& hyper, void* stream) const;
  int apply(const Hyper& hyper, void* stream) const;

 private:
  int64_t parts_begin() const { return size() * kRecordFloats; }
  int64_t s_begin() const { return q_end(); }
  int64_t r_begin() const { return s_begin() + s_size_; }
  Launch launch(const Hyper& hyper, void* stream, int64_t map, int64_t blocks) const;

  int weight_dtype_, grad_dtype_;
  bool separate_;
  Memory memory_;
  std::vector<Matrix> rows_;  // offsets count from the beginning of their part of the workspace
  int64_t parts_size_ = 0, q_size_ = 0, s_size_ = 0, r_size_ = 0;
  int64_t project_blocks_ = 0, scale_blocks_ = 0, apply_blocks_ = 0;
};

// The dense parameters of one family: dtypes are equal. The workspace holds an int32 for each.
class DensePlan {
 public:
  DensePlan(int weight_dtype, int grad_dtype);

  void add(DenseRow row);  // addresses and count
  void set_gradients(const std::vector<uintptr_t>& addresses);

  int64_t size() const { return int64_t(rows_.size()); }
  int64_t table_words() const { return size() * int64_t(sizeof(DenseRow) / 8); }
  int64_t map_size() const { return blocks_; }
  int64_t workspace_floats() const { return size(); }
  void write_table(void* table) const;
  void write_maps(int32_t* maps) const;

  void place(const Memory& memory) { memory_ = memory; }
  int load() const;
  int adamw(const Hyper& hyper, void* stream) const;

 private:
  int weight_dtype_, grad_dtype_;
  Memory memory_;
  std::vector<DenseRow> rows_;
  int64_t blocks_ = 0;
};

}  // namespace apollo
