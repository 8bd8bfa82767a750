#include "plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "philox.cuh"
#include "sparse_share.h"

namespace apollo {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Row>
void move_gradients(std::vector<Row>& rows, const std::vector<uintptr_t>& addresses) {
  if (addresses.size() != rows.size()) {
    throw std::invalid_argument("set_gradients: got " + std::to_string(addresses.size()) +
                                " addresses for " + std::to_string(rows.size()) + " parameters");
  }
  for (size_t i = 0; i < rows.size(); ++i) rows[i].grad = reinterpret_cast<void*>(addresses[i]);
}

// Blocks from rows[i].*first on belong to row i.
template <class Row>
int32_t* write_map(const std::vector<Row>& rows, int64_t Row::* first, int64_t blocks,
                   int32_t* to) {
  for (size_t i = 0; i < rows.size(); ++i) {
    const int64_t end = i + 1 < rows.size() ? rows[i + 1].*first : blocks;
    to = std::fill_n(to, end - rows[i].*first, int32_t(i));
  }
  return to;
}

// A chunk holds whole blocks of r. Few tiles are split as below, but only where R, which then goes
// through the workspace, stays small beside the gradient; float32 sums take 65536 k at most.
Tiling sparse_tiling(int64_t channels, int64_t k, int64_t rank, int grad_dtype, bool by_row) {
  const auto r = uint32_t(rank);
  Tiling t{};
  t.channel_tiles = ceil_div(channels, sparse_channels(grad_dtype, r, by_row));
  t.rank_tiles =
      share_ranks(r, uint32_t(sparse_unit(grad_dtype, r, by_row)), by_row ? 32 : 8).tiles;
  const int64_t wanted =
      std::max<int64_t>(1, 16 / std::max<int64_t>(1, t.channel_tiles * t.rank_tiles));
  const int64_t most = std::max<int64_t>(1, k / std::max<int64_t>(1024, 8 * rank));
  const int64_t chunks = std::max<int64_t>(1, std::max(std::min(wanted, most), ceil_div(k, 65536)));
  t.chunk_length = ceil_div(ceil_div(k, chunks), rank) * rank;
  t.chunks = k > 0 ? ceil_div(k, t.chunk_length) : 1;
  return t;
}

}  // namespace

Tiling tiling(int64_t channels, int64_t k, int64_t rank, int grad_dtype, bool by_row, bool sparse) {
  const RankClass ranks = rank_class(rank);
  if (sparse && uses_sparse_kernel(ranks))
    return sparse_tiling(channels, k, rank, grad_dtype, by_row);
  const int64_t channel_tile =
      uses_dots(ranks) ? (by_row ? kDotChannels : kDotColumns) : mma_channels(grad_dtype);
  Tiling t{};
  t.channel_tiles = ceil_div(channels, channel_tile);
  t.rank_tiles = ceil_div(rank, rank_tile(ranks));
  // Few tiles are split along K, for the sake of a lone tensor; a fixed rule of the shapes, so that
  // the bits depend neither on the device nor on what else is in the launch.
  const int64_t tiles = std::max<int64_t>(1, t.channel_tiles * t.rank_tiles);
  const int64_t wanted = std::max<int64_t>(1, 8 / tiles);
  const int64_t longest = 65536, shortest = 1024;
  const int64_t most = std::max<int64_t>(1, k / shortest);
  const int64_t chunks = std::max(std::min(wanted, most), ceil_div(k, longest));
  // A chunk holds whole runs of signs, and whole slabs of project_dots.
  t.chunk_length = ceil_div(ceil_div(k, std::max<int64_t>(1, chunks)), 1024) * 1024;
  t.chunks = k > 0 ? ceil_div(k, t.chunk_length) : 1;
  return t;
}

LowRankPlan::LowRankPlan(int weight_dtype, int grad_dtype, bool separate)
    : weight_dtype_(weight_dtype), grad_dtype_(grad_dtype), separate_(separate) {}

void LowRankPlan::add(Matrix m) {
  if (m.channels < 0 || m.k < 0 || m.rank < 0 || m.rank > m.k || m.channels >= int64_t{1} << 31 ||
      m.k >= int64_t{1} << 31) {
    throw std::invalid_argument("add: rank " + std::to_string(m.rank) + " of X [" +
                                std::to_string(m.channels) + ", " + std::to_string(m.k) + "]");
  }
  const RankClass ranks = rank_class(m.rank);
  if (size() > 0 && rank_class(rows().front().rank) != ranks) {
    throw std::invalid_argument("add: rank " + std::to_string(m.rank) +
                                " is of another class than the plan's first matrix");
  }
  const bool by_row = (m.flags & kByRow) != 0;
  const int64_t outer = by_row ? m.channels : m.k, inner = by_row ? m.k : m.channels;
  if (outer <= 1) m.weight_ld = m.grad_ld = 0;  // no second row; and 0 never spoils an alignment

  // Every matrix has a block of `scale`, which hands its step on; an empty one has no others.
  const int64_t scale_blocks = std::max<int64_t>(1, ceil_div(m.channels, kScaleChannels));
  m.first_scale = scale_blocks_;
  m.first_apply = apply_blocks_;
  scale_blocks_ += scale_blocks;
  apply_blocks_ += ceil_div(outer * ceil_div(inner, 8), kApplyVectors);

  m.parts = parts_size_;
  m.s = s_size_;
  parts_size_ += 3 * scale_blocks * int64_t(sizeof(double) / sizeof(float));
  s_size_ += m.channels;
  for (const bool sparse : {false, true}) {
    add(layouts_[sparse], m, tiling(m.channels, m.k, m.rank, grad_dtype_, by_row, sparse));
  }
}

void LowRankPlan::add(Layout& layout, Matrix m, const Tiling& t) {
  const RankClass ranks = rank_class(m.rank);
  const bool sparse = &layout == &layouts_[1] && uses_sparse_kernel(ranks);
  // Tiles update moments by pairs of neighbours.
  const bool pairs = m.rank % 2 == 0 && (reinterpret_cast<uintptr_t>(m.exp_avg) % 8 == 0) &&
                     (reinterpret_cast<uintptr_t>(m.exp_avg_sq) % 8 == 0);
  const bool later = uses_dots(ranks) || !pairs;
  const bool summed = separate_ || (later && !sparse) || t.chunks > 1;
  if (summed) m.flags |= kSummed;
  m.chunks = t.chunks;
  m.chunk_length = t.chunk_length;
  m.rank_tiles = t.rank_tiles;
  // Rank tiles of the dense kernels each see the whole of X, those of the sparse one a part of it.
  m.q_rows = t.chunks * (sparse ? t.rank_tiles : 1);
  m.first_project = layout.blocks;
  if (m.channels > 0 && m.k > 0) layout.blocks += t.channel_tiles * t.rank_tiles * t.chunks;
  m.q = layout.q_size;
  m.r = layout.r_size;
  layout.q_size += m.q_rows * m.channels;
  layout.r_size += summed ? t.chunks * m.channels * m.rank : 2 * t.rank_tiles * m.channels;
  layout.rows.push_back(m);
}

bool LowRankPlan::is_sparse(int distribution) { return distribution == kSparse; }

void LowRankPlan::set_gradients(const std::vector<uintptr_t>& addresses) {
  for (Layout& layout : layouts_) move_gradients(layout.rows, addresses);
}

void LowRankPlan::write_table(void* table) const {
  auto* to = static_cast<unsigned char*>(table);
  for (const Layout& layout : layouts_) {
    for (Matrix m : layout.rows) {
      m.parts += parts_begin();
      m.q += q_begin();
      m.s += s_begin();
      m.r += r_begin();
      std::memcpy(to, &m, sizeof m);
      to += sizeof m;
    }
  }
}

void LowRankPlan::write_maps(int32_t* maps) const {
  maps = write_map(rows(), &Matrix::first_scale, scale_blocks_, maps);
  maps = write_map(rows(), &Matrix::first_apply, apply_blocks_, maps);
  for (const Layout& layout : layouts_) {
    maps = write_map(layout.rows, &Matrix::first_project, layout.blocks, maps);
  }
}

Launch LowRankPlan::launch(const Hyper& hyper, void* stream, int64_t map, int64_t blocks) const {
  Launch launch{};
  launch.table =
      static_cast<const Matrix*>(memory_.table) + (is_sparse(hyper.distribution) ? size() : 0);
  launch.map = memory_.maps + map;
  launch.workspace = static_cast<float*>(memory_.workspace);
  launch.blocks = blocks;
  launch.weight_dtype = weight_dtype_;
  launch.grad_dtype = grad_dtype_;
  launch.rank = size() == 0 ? kRankOne : rank_class(rows().front().rank);
  launch.stream = stream;
  launch.hyper = hyper;
  return launch;
}

int LowRankPlan::load() const { return load_low_rank(launch(Hyper{}, nullptr, 0, 0)); }

int LowRankPlan::project(const Hyper& hyper, void* stream) const {
  const bool sparse = is_sparse(hyper.distribution);
  const int64_t map = scale_blocks_ + apply_blocks_ + (sparse ? layouts_[0].blocks : 0);
  return launch_project(launch(hyper, stream, map, layouts_[sparse].blocks));
}

int LowRankPlan::scale(const Hyper& hyper, void* stream) const {
  if (hyper.clip != nullptr && !separate_) {
    throw std::invalid_argument("scale: clip comes too late where project updates the moments");
  }
  const int error = launch_scale(launch(hyper, stream, 0, scale_blocks_));
  return error ? error : launch_limit(launch(hyper, stream, 0, size()));
}

int LowRankPlan::apply(const Hyper& hyper, void* stream) const {
  return launch_apply(launch(hyper, stream, scale_blocks_, apply_blocks_));
}

DensePlan::DensePlan(int weight_dtype, int grad_dtype)
    : weight_dtype_(weight_dtype), grad_dtype_(grad_dtype) {}

void DensePlan::add(DenseRow row) {
  if (row.count < 0) throw std::invalid_argument("add: count " + std::to_string(row.count));
  row.first_block = blocks_;
  blocks_ += ceil_div(row.count, 8 * kApplyVectors);
  rows_.push_back(row);
}

void DensePlan::set_gradients(const std::vector<uintptr_t>& addresses) {
  move_gradients(rows_, addresses);
}

void DensePlan::write_table(void* table) const {
  if (!rows_.empty()) std::memcpy(table, rows_.data(), rows_.size() * sizeof(DenseRow));
}

void DensePlan::write_maps(int32_t* maps) const {
  write_map(rows_, &DenseRow::first_block, blocks_, maps);
}

int DensePlan::load() const {
  Launch launch{};
  launch.weight_dtype = weight_dtype_;
  launch.grad_dtype = grad_dtype_;
  return load_dense(launch);
}

int DensePlan::adamw(const Hyper& hyper, void* stream) const {
  Launch launch{};
  launch.table = memory_.table;
  launch.map = memory_.maps;
  launch.bad = static_cast<int32_t*>(memory_.workspace);
  launch.blocks = blocks_;
  launch.weight_dtype = weight_dtype_;
  launch.grad_dtype = grad_dtype_;
  launch.stream = stream;
  launch.hyper = hyper;
  if (const int error = launch_adamw(launch)) return error;
  launch.blocks = size();
  return launch_advance(launch);
}

}  // namespace apollo
