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
  // owners: over how many ranks the moments of each matrix's channels are dealt out, since they
  // share its contracted side. More than one: `send` makes ready what the owners get, and each
  // `scale` goes on with what they have sent to this one.
  LowRankPlan(int weight_dtype, int grad_dtype, bool separate, int64_t owners = 1);

  // `matrix` holds addresses, key, sizes, leading dimensions, the flags kByRow, kRowMajor and
  // kLeads and, of a part, k_first, row and column; its place among the others is worked out here.
  // own_channels: of which this rank has the moments. Throws std::invalid_argument.
  void add(Matrix matrix, int64_t own_channels = 0);
  void set_gradients(const std::vector<uintptr_t>& addresses);

  int64_t size() const { return int64_t(rows().size()); }
  int64_t table_words() const { return (shares() ? 3 : 2) * size() * int64_t(sizeof(Matrix) / 8); }
  int64_t map_size() const {
    return apply_blocks_ + layouts_[0].map_size() + layouts_[1].map_size() + own_.map_size();
  }
  int64_t workspace_floats() const { return r_begin() + r_size(); }
  // All q of the plan under a distribution, in floats of the workspace; of several owners those of
  // this one.
  int64_t q_begin() const { return parts_begin() + parts_size_; }
  int64_t q_end(int distribution) const {
    return q_begin() + (shares() ? own_.q_size : layout(distribution).q_size);
  }

  // Of several owners: floats of this rank's sums, which `project` leaves and `send` reads, and of
  // what one owner is sent, R of all matrices and then q of all. In the workspace they go to where
  // R and q begin.
  int64_t scratch_floats() const;
  int64_t sent_floats() const { return sent_r() + own_.q_size; }
  int64_t sent_r() const { return own_.r_size; }  // floats of R in it
  int64_t own_r_begin() const { return r_begin(); }
  // s of all channels here, those of this owner, and, for each float of the former, the place of
  // that channel in the latter of all owners, one after the other.
  int64_t s_begin() const { return vectors(q_begin() + q_size()); }
  int64_t s_end() const { return s_begin() + s_size_; }
  int64_t own_s_begin() const { return s_end(); }
  int64_t own_s_end() const { return own_s_begin() + own_.s_size; }
  void write_scale_order(int64_t* order) const;

  // s of a matrix after `scale`: of its channels or, with one scale per tensor, in the first place.
  int64_t s_begin(size_t matrix) const { return s_begin() + rows().at(matrix).s; }
  int64_t s_end(size_t matrix) const { return s_begin(matrix) + rows().at(matrix).channels; }

  void write_table(void* table) const;
  void write_maps(int32_t* maps) const;

  void place(const Memory& memory) { memory_ = memory; }
  int load() const;  // the kernels, onto the current device
  int project(const Hyper& hyper, void* stream, void* scratch = nullptr) const;
  int send(const Hyper& hyper, void* stream, void* scratch, float* to) const;
  int scale(const Hyper& hyper, void* stream) const;
  int scale_parts(const Hyper& hyper, void* stream, double* norms) const;
  int limit(const Hyper& hyper, void* stream, double* norms) const;
  int apply(const Hyper& hyper, void* stream) const;

 private:
  int64_t parts_begin() const { return size() * kRecordFloats; }
  int64_t q_size() const {
    return shares() ? own_.q_size : std::max(layouts_[0].q_size, layouts_[1].q_size);
  }
  int64_t r_size() const {
    return shares() ? own_.r_size : std::max(layouts_[0].r_size, layouts_[1].r_size);
  }
  int64_t r_begin() const { return vectors(own_s_end()); }
  bool shares() const { return owners_ > 1; }
  int64_t share_of(const Matrix& m) const { return (m.channels + owners_ - 1) / owners_; }
  Launch launch(const Hyper& hyper, void* stream, int64_t map, int64_t blocks) const;
  Launch launch_of_scale(const Hyper& hyper, void* stream) const;

  // The rows as a distribution's kernels want them. A group may change its distribution between two
  // steps, so the table holds both layouts, and a launch takes the one of its distribution. Tiling,
  // places of q and R, and the blocks of `project` and `scale` differ; all else is equal.
  struct Layout {
    std::vector<Matrix> rows;  // offsets count from the beginning of their part of the workspace
    int64_t project_blocks = 0, scale_blocks = 0, head_blocks = 0;
    int64_t q_size = 0, r_size = 0, s_size = 0;
    int64_t map_size() const { return project_blocks + scale_blocks + head_blocks; }
  };
  void add(Layout& layout, Matrix matrix);
  void add_own(Matrix matrix, int64_t channels);
  int64_t map_begin(int distribution) const;
  static bool is_sparse(int distribution);
  // s and R begin at multiples of 16 bytes; the numbers of every matrix in them do.
  static int64_t vectors(int64_t floats) { return (floats + 3) / 4 * 4; }
  const Layout& layout(int distribution) const { return layouts_[is_sparse(distribution)]; }
  const std::vector<Matrix>& rows() const { return layouts_[0].rows; }

  int weight_dtype_, grad_dtype_;
  bool separate_;
  Memory memory_;
  int64_t owners_;
  Layout layouts_[2];  // dense, sparse
  Layout own_;         // of several owners: `scale` of this one's channels, by R and q from all
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
