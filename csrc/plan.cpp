#include "plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "philox.cuh"
#include "sparse_share.h"

namespace apollo {
namespace {

constexpr int64_t kDoubleFloats = sizeof(double) / sizeof(float);

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

// In how many chunks K is cut, for blocks enough where a matrix is alone in its launch. It is a
// rule of the shape, so that the bits depend neither on the device nor on what else is in the
// launch, and it has to serve a launch of hundreds of matrices, too. A cut costs bytes: R no longer
// stays in registers, but is written and read per chunk, 8 chunks rank bytes per channel, where a
// step of bf16 moves 8 k: chunks rank / k of the whole. So many blocks are made where that is at
// most 1/64, and a few where a matrix has hardly any tiles. At rank 128 a matrix of 4096 x 4096
// would lose 25 % by 8 chunks. float32 sums take 65536 k at most.
int64_t chunks_of(int64_t tiles, int64_t k, int64_t rank) {
  constexpr int64_t kMany = 264, kFew = 8;  // blocks; the first is two per SM of the largest cards
  tiles = std::max<int64_t>(1, tiles);
  const int64_t cheap = std::min({kMany / tiles, k / 512, k / (64 * std::max<int64_t>(1, rank))});
  const int64_t few = std::min(kFew / tiles, k / 1024);
  return std::max({int64_t{1}, cheap, few, ceil_div(k, 65536)});
}

// A chunk holds whole blocks of r, and eight of them at least.
Tiling sparse_tiling(int64_t channels, int64_t k, int64_t rank, int grad_dtype, bool by_row) {
  const auto r = uint32_t(rank);
  Tiling t{};
  t.channel_tiles = ceil_div(channels, sparse_channels(grad_dtype, r, by_row));
  t.rank_tiles =
      share_ranks(r, uint32_t(sparse_unit(grad_dtype, r, by_row)), by_row ? 32 : 8).tiles;
  const int64_t shortest = ceil_div(k, chunks_of(t.channel_tiles * t.rank_tiles, k, rank));
  t.chunk_length = ceil_div(std::max(shortest, 8 * rank), rank) * rank;
  t.chunks = k > 0 ? ceil_div(k, t.chunk_length) : 1;
  return t;
}

// The rows of a matrix in memory, `vectors` long, as tiles of `apply`: 2^shift vectors wide, as
// many as a block has threads or, where rows are shorter or the last tile of a row would leave more
// than a ninth of the threads idle, a half, a quarter and so on of it, but no less than a warp's,
// nor than `least`: a group of int8 weights.
struct ApplyTiling {
  int64_t shift, across, down;
};
ApplyTiling apply_tiling(int64_t rows, int64_t vectors, int64_t least) {
  int64_t width = kStreamThreads, shift = 0;
  const auto wasteful = [&] { return 8 * ceil_div(vectors, width) * width > 9 * vectors; };
  while (width > least && (width / 2 >= vectors || (width > 32 && wasteful()))) width /= 2;
  while (int64_t{1} << shift < width) ++shift;
  const int64_t rows_down = kStreamVectors * kStreamThreads / width;
  return {shift, std::max<int64_t>(1, ceil_div(vectors, width)), ceil_div(rows, rows_down)};
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
  // A chunk holds whole runs of signs.
  const int64_t chunks = chunks_of(t.channel_tiles * t.rank_tiles, k, rank);
  t.chunk_length = ceil_div(ceil_div(k, chunks), 512) * 512;
  t.chunks = k > 0 ? ceil_div(k, t.chunk_length) : 1;
  return t;
}

LowRankPlan::LowRankPlan(int weight_dtype, int grad_dtype, bool separate, int64_t owners)
    : weight_dtype_(weight_dtype),
      grad_dtype_(grad_dtype),
      separate_(separate || owners > 1),
      owners_(owners) {}

void LowRankPlan::add(Matrix m, int64_t own_channels) {
  constexpr int64_t kMost = int64_t{1} << 31;
  const int64_t least_k = shares() ? 0 : m.rank;  // a part of K may be shorter than the rank
  if (m.channels < 0 || m.k < least_k || m.rank < 0 || m.channels >= kMost || m.k_first < 0 ||
      m.k_first + m.k >= kMost || m.row + m.column >= 2 * kMost || own_channels > share_of(m)) {
    throw std::invalid_argument("add: rank " + std::to_string(m.rank) + " of X [" +
                                std::to_string(m.channels) + ", " + std::to_string(m.k) +
                                "] from k " + std::to_string(m.k_first) + " on, moments of " +
                                std::to_string(own_channels) + " channels");
  }
  const RankClass ranks = rank_class(m.rank);
  if (size() > 0 && rank_class(rows().front().rank) != ranks) {
    throw std::invalid_argument("add: rank " + std::to_string(m.rank) +
                                " is of another class than the plan's first matrix");
  }
  const bool by_row = (m.flags & kByRow) != 0;
  const int64_t outer = by_row ? m.channels : m.k, inner = by_row ? m.k : m.channels;
  if (outer <= 1) m.weight_ld = m.grad_ld = 0;  // no second row; and 0 never spoils an alignment

  // Every matrix has a block of `scale`, which counts its step, and the one that leads has one of
  // `apply`, which stores it; an empty one has no others.
  const int64_t vector = apply_vector(weight_dtype_, grad_dtype_);
  const ApplyTiling tiles =
      apply_tiling(outer, ceil_div(inner, vector), weight_dtype_ == kInt8 ? kGroup / vector : 1);
  m.apply_shift = tiles.shift;
  m.apply_across = tiles.across;
  m.first_apply = apply_blocks_;
  apply_blocks_ += inner > 0 ? tiles.across * tiles.down : 0;
  if (m.flags & kLeads) apply_blocks_ = std::max(apply_blocks_, m.first_apply + 1);

  m.parts = parts_size_;
  m.s = s_size_;
  const int64_t most = scale_blocks(m.channels, scale_shift(m.rank, true));  // in either layout
  parts_size_ += 3 * kDoubleFloats * most;
  s_size_ += vectors(m.channels);
  m.share = share_of(m);
  m.sent_r = own_.r_size;
  m.sent_q = own_.q_size;  // after R of all
  for (Layout& layout : layouts_) add(layout, m);
  if (shares()) add_own(m, own_channels);
}

void LowRankPlan::add(Layout& layout, Matrix m) {
  const RankClass ranks = rank_class(m.rank);
  const bool by_row = (m.flags & kByRow) != 0, of_sparse = &layout == &layouts_[1];
  const bool sparse = of_sparse && uses_sparse_kernel(ranks);
  // The kernels begin with a block of numbers.
  const int64_t block = sparse ? m.rank : kStep;
  m.k_end = m.k_first + m.k;
  m.k_begin = std::min(ceil_div(m.k_first, block) * block, m.k_end);
  const int64_t body = m.k_end - m.k_begin, heads = m.k_begin > m.k_first;
  const Tiling t = tiling(m.channels, body, m.rank, grad_dtype_, by_row, of_sparse);
  const int64_t chunks = body > 0 ? t.chunks : 0;
  // Tiles update moments by pairs of neighbours.
  const bool pairs = m.rank % 2 == 0 && (reinterpret_cast<uintptr_t>(m.exp_avg) % 8 == 0) &&
                     (reinterpret_cast<uintptr_t>(m.exp_avg_sq) % 8 == 0);
  const bool later = uses_dots(ranks) || !pairs;
  const bool summed = separate_ || (later && !sparse) || t.chunks > 1;
  if (summed) m.flags |= kSummed;
  m.chunks = chunks + heads;
  m.chunk_length = t.chunk_length;
  m.rank_tiles = t.rank_tiles;
  // Rank tiles of the dense kernels each see the whole of X, those of the sparse one a part of it.
  m.q_rows = chunks * (sparse ? t.rank_tiles : 1) + heads;
  m.first_project = layout.project_blocks;
  m.first_scale = layout.scale_blocks;
  m.first_head = layout.head_blocks;
  layout.project_blocks += t.channel_tiles * t.rank_tiles * chunks;
  layout.head_blocks += heads * ceil_div(m.channels, kHeadChannels);
  layout.scale_blocks += scale_blocks(m.channels, scale_shift(m.rank, summed));
  m.q = layout.q_size;
  m.r = layout.r_size;
  layout.q_size += m.q_rows * m.channels;
  layout.r_size += vectors(summed ? m.chunks * m.channels * m.rank : 2 * t.rank_tiles * m.channels);
  layout.rows.push_back(m);
}

// As an owner is sent it: sums of one chunk, every matrix with its whole share of channels.
void LowRankPlan::add_own(Matrix m, int64_t channels) {
  m.flags |= kSummed;
  m.channels = channels;
  m.chunks = m.q_rows = 1;
  m.first_scale = own_.scale_blocks;
  own_.scale_blocks += scale_blocks(channels, scale_shift(m.rank, true));
  m.r = own_.r_size;
  m.q = own_.q_size;
  m.s = own_.s_size;
  own_.r_size += m.share * m.rank;
  own_.q_size += m.share;
  own_.s_size += m.share;
  own_.rows.push_back(m);
}

int64_t LowRankPlan::scratch_floats() const {
  if (!shares()) return 0;
  int64_t most = 0;
  for (const Layout& layout : layouts_) {
    most = std::max(most, vectors(layout.q_size) + layout.r_size);
  }
  return most;
}

void LowRankPlan::write_scale_order(int64_t* order) const {
  for (size_t i = 0; i < own_.rows.size(); ++i) {
    const Matrix &all = rows()[i], &own = own_.rows[i];
    for (int64_t c = 0; c < vectors(all.channels); ++c) {
      const int64_t there = c < all.channels ? c : 0;
      *order++ =
          all.channels == 0 ? 0 : there / own.share * own_.s_size + own.s + there % own.share;
    }
  }
}

int64_t LowRankPlan::map_begin(int distribution) const {
  return apply_blocks_ + (is_sparse(distribution) ? layouts_[0].map_size() : 0);
}

bool LowRankPlan::is_sparse(int distribution) { return distribution == kSparse; }

void LowRankPlan::set_gradients(const std::vector<uintptr_t>& addresses) {
  for (Layout& layout : layouts_) move_gradients(layout.rows, addresses);
  if (shares()) move_gradients(own_.rows, addresses);
}

void LowRankPlan::write_table(void* table) const {
  auto* to = static_cast<unsigned char*>(table);
  const auto write = [&](const Layout& layout, int64_t q, int64_t s, int64_t r) {
    for (Matrix m : layout.rows) {
      const int64_t stride = m.flags & kByRow ? 1 : m.grad_ld;
      m.x = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(m.grad) -
                                          uintptr_t(m.k_first * stride * size_of(grad_dtype_)));
      m.sent_q += sent_r();
      m.parts += parts_begin();
      m.q += q;
      m.s += s;
      m.r += r;
      std::memcpy(to, &m, sizeof m);
      to += sizeof m;
    }
  };
  for (const Layout& layout : layouts_) {
    const bool elsewhere = shares();
    write(layout, elsewhere ? 0 : q_begin(), s_begin(),
          elsewhere ? vectors(layout.q_size) : r_begin());
  }
  write(own_, q_begin(), own_s_begin(), r_begin());
}

void LowRankPlan::write_maps(int32_t* maps) const {
  maps = write_map(rows(), &Matrix::first_apply, apply_blocks_, maps);
  for (const Layout& layout : layouts_) {
    maps = write_map(layout.rows, &Matrix::first_project, layout.project_blocks, maps);
    maps = write_map(layout.rows, &Matrix::first_scale, layout.scale_blocks, maps);
    maps = write_map(layout.rows, &Matrix::first_head, layout.head_blocks, maps);
  }
  write_map(own_.rows, &Matrix::first_scale, own_.scale_blocks, maps);
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
  launch.owners = owners_;
  launch.sent_floats = sent_floats();
  launch.stream = stream;
  launch.hyper = hyper;
  return launch;
}

int LowRankPlan::load() const { return load_low_rank(launch(Hyper{}, nullptr, 0, 0)); }

int LowRankPlan::project(const Hyper& hyper, void* stream, void* scratch) const {
  const Layout& of = layout(hyper.distribution);
  const int64_t map = map_begin(hyper.distribution);
  Launch body = launch(hyper, stream, map, of.project_blocks);
  Launch heads = launch(hyper, stream, map + of.project_blocks + of.scale_blocks, of.head_blocks);
  if (shares()) body.workspace = heads.workspace = static_cast<float*>(scratch);
  if (const int error = launch_project(body)) return error;
  return launch_heads(heads);
}

int LowRankPlan::send(const Hyper& hyper, void* stream, void* scratch, float* to) const {
  const Layout& of = layout(hyper.distribution);
  Launch launch = this->launch(hyper, stream, map_begin(hyper.distribution) + of.project_blocks,
                               of.scale_blocks);
  launch.workspace = static_cast<float*>(scratch);
  launch.sent = to;
  return launch_send(launch);
}

Launch LowRankPlan::launch_of_scale(const Hyper& hyper, void* stream) const {
  if (hyper.clip != nullptr && !separate_) {
    throw std::invalid_argument("scale: clip comes too late where project updates the moments");
  }
  const Layout& of = layout(hyper.distribution);
  if (!shares()) {
    const int64_t map = map_begin(hyper.distribution) + of.project_blocks;
    return launch(hyper, stream, map, of.scale_blocks);
  }
  Launch launch = this->launch(hyper, stream, map_size() - own_.scale_blocks, own_.scale_blocks);
  launch.table = static_cast<const Matrix*>(memory_.table) + 2 * size();
  return launch;
}

int LowRankPlan::scale(const Hyper& hyper, void* stream) const {
  return launch_scale(launch_of_scale(hyper, stream));
}

int LowRankPlan::scale_parts(const Hyper& hyper, void* stream, double* norms) const {
  Launch launch = launch_of_scale(hyper, stream);
  launch.norms = norms;
  return launch_scale_parts(launch);
}

int LowRankPlan::limit(const Hyper& hyper, void* stream, double* norms) const {
  Launch launch = this->launch(hyper, stream, 0, size());
  launch.norms = norms;
  return launch_limit(launch);
}

int LowRankPlan::apply(const Hyper& hyper, void* stream) const {
  return launch_apply(launch(hyper, stream, 0, apply_blocks_));
}

DensePlan::DensePlan(int weight_dtype, int grad_dtype, int moments_dtype)
    : weight_dtype_(weight_dtype), grad_dtype_(grad_dtype), moments_dtype_(moments_dtype) {}

void DensePlan::add(DenseRow row) {
  if (row.count < 0) throw std::invalid_argument("add: count " + std::to_string(row.count));
  row.first_block = blocks_;
  blocks_ += ceil_div(row.count, kDenseElements);
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

Launch DensePlan::launch() const {
  Launch launch{};
  launch.weight_dtype = weight_dtype_;
  launch.grad_dtype = grad_dtype_;
  launch.moments_dtype = moments_dtype_;
  return launch;
}

int DensePlan::load() const { return load_dense(launch()); }

int DensePlan::adamw(const Hyper& hyper, void* stream) const {
  Launch launch = this->launch();
  launch.table = memory_.table;
  launch.map = memory_.maps;
  launch.bad = static_cast<int32_t*>(memory_.workspace);
  launch.blocks = blocks_;
  launch.stream = stream;
  launch.hyper = hyper;
  if (const int error = launch_adamw(launch)) return error;
  launch.blocks = size();
  return launch_advance(launch);
}

}  // namespace apollo
