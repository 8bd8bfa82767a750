// From named fields to what the kernels read: rows, maps from blocks to rows, workspace, launches.
// The one place that knows how a matrix is cut into blocks, where its numbers lie in the workspace
// and in which order the launches go. Plain C++, shared with the tests' emulated device.
#pragma once

#include <algorithm>
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

// How `project` cuts a matrix into blocks: one way for dense distributions, one for the sparse one.
struct Tiling {
  int64_t channel_tiles, rank_tiles, chunks, chunk_length;
};
Tiling tiling(int64_t channels, int64_t k, int64_t rank, int grad_dtype, bool by_row, bool sparse);

// The low-rank matrices of one family: dtypes and rank class are equal.
class LowRankPlan {
 public:
  // separate: R goes to the workspace, so that something may come between `project` and `scale`.
  LowRankPlan(int weight_dtype, int grad_dtype, bool separate);

  // `matrix` holds addresses, key, sizes, leading dimensions and the flags kByRow, kRowMajor and
  // kLeads; its place among the others is worked out here. Throws std::invalid_argument.
  void add(Matrix matrix);
  void set_gradients(const std::vector<uintptr_t>& addresses);

  int64_t size() const { return int64_t(rows().size()); }
  int64_t table_words() const { return 2 * size() * int64_t(sizeof(Matrix) / 8); }
  int64_t map_size() const {
    return apply_blocks_ + layouts_[0].map_size() + layouts_[1].map_size();
  }
  int64_t workspace_floats() const {
    return r_begin() + std::max(layouts_[0].r_size, layouts_[1].r_size);
  }
  // All q of the plan under a distribution, in floats of the workspace.
  int64_t q_begin() const { return parts_begin() + parts_size_; }
  int64_t q_end(int distribution) const { return q_begin() + layout(distribution).q_size; }

  // s of a matrix after `scale`: of its channels or, with one scale per tensor, in the first place.
  int64_t s_begin(size_t matrix) const { return s_begin() + rows().at(matrix).s; }
  int64_t s_end(size_t matrix) const { return s_begin(matrix) + rows().at(matrix).channels; }

  void write_table(void* table) const;
  void write_maps(int32_t* maps) const;

  void place(const Memory& memory) { memory_ = memory; }
  int load() const;  // the kernels, onto the current device
  int project(const Hyper& hyper, void* stream) const;
  int scale(const Hyper& hyper, void* stream) const;
  int apply(const Hyper& hyper, void* stream) const;

 private:
  int64_t parts_begin() const { return size() * kRecordFloats; }
  int64_t s_begin() const {
    return vectors(q_begin() + std::max(layouts_[0].q_size, layouts_[1].q_size));
  }
  int64_t r_begin() const { return s_begin() + s_size_; }
  Launch launch(const Hyper& hyper, void* stream, int64_t map, int64_t blocks) const;

  // The rows as a distribution's kernels want them. A group may change its distribution between two
  // steps, so the table holds both layouts, and a launch takes the one of its distribution. Tiling,
  // places of q and R, and the blocks of `project` and `scale` differ; all else is equal.
  struct Layout {
    std::vector<Matrix> rows;  // offsets count from the beginning of their part of the workspace
    int64_t project_blocks = 0, scale_blocks = 0, q_size = 0, r_size = 0;
    int64_t map_size() const { return project_blocks + scale_blocks; }
  };
  void add(Layout& layout, Matrix matrix, const Tiling& tiling);
  int64_t map_begin(int distribution) const;
  static bool is_sparse(int distribution);
  // s and R begin at multiples of 16 bytes; the numbers of every matrix in them do.
  static int64_t vectors(int64_t floats) { return (floats + 3) / 4 * 4; }
  const Layout& layout(int distribution) const { return layouts_[is_sparse(distribution)]; }
  const std::vector<Matrix>& rows() const { return layouts_[0].rows; }

  int weight_dtype_, grad_dtype_;
  bool separate_;
  Memory memory_;
  Layout layouts_[2];  // dense, sparse
  int64_t parts_size_ = 0, s_size_ = 0;
  int64_t apply_blocks_ = 0;
};

// The dense parameters of one family: dtypes are equal. The workspace holds an int32 for each.
class DensePlan {
 public:
  DensePlan(int weight_dtype, int grad_dtype, int moments_dtype);

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
  Launch launch() const;  // over nothing: what kernels are asked for

  int weight_dtype_, grad_dtype_, moments_dtype_;
  Memory memory_;
  std::vector<DenseRow> rows_;
  int64_t blocks_ = 0;
};

}  // namespace apollo
