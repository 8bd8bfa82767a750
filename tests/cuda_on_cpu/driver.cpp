// Runs every kernel on the emulated device for `make test-sanitizers`: buffers end where their
// tensors end, so that AddressSanitizer sees each read or write beyond; ThreadSanitizer sees
// missing barriers. Prints a sum over all bits of the results: equal for every schedule.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../../csrc/common.cuh"
#include "../../csrc/philox.cuh"
#include "../../csrc/plan.h"

namespace {

using namespace apollo;

uint64_t sum = 0;
uint32_t random_state = 1;

float random_value() {
  random_state = random_state * 1664525u + 1013904223u;
  return float(int32_t(random_state)) * 0x1p-31f;
}

struct Buffer {  // of exactly this size
  explicit Buffer(size_t bytes) : bytes(bytes), data(new unsigned char[bytes]()) {}
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data.get());
  }
  void fold() const {
    for (size_t i = 0; i < bytes; ++i) sum = sum * 1099511628211u + data[i];
  }
  size_t bytes;
  std::unique_ptr<unsigned char[]> data;
};

int size_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

Buffer random_buffer(int64_t count, int dtype) {
  Buffer buffer(size_t(count) * size_of(dtype));
  for (int64_t i = 0; i < count; ++i) {
    const float x = random_value();
    if (dtype == kFloat32) buffer.as<float>()[i] = x;
    if (dtype == kBfloat16) from_float(x, buffer.as<bfloat16>()[i]);
    if (dtype == kFloat16) from_float(x, buffer.as<float16>()[i]);
  }
  return buffer;
}

// Where a plan's table, maps and workspace lie, each of exactly its size.
template <class Plan>
struct Placed {
  explicit Placed(Plan& plan)
      : table(size_t(plan.table_words()) * 8),
        maps(size_t(plan.map_size()) * 4),
        workspace(size_t(plan.workspace_floats()) * 4) {
    plan.write_table(table.as<void>());
    plan.write_maps(maps.as<int32_t>());
    plan.place({table.as<void>(), maps.as<int32_t>(), workspace.as<void>()});
  }
  Buffer table, maps, workspace;
};

Hyper make_hyper(long long* counters, const float* clip) {
  Hyper h{};
  h.counters = counters;
  h.clip = clip;
  h.lr = 0.01;
  h.beta1 = 0.9;
  h.beta2 = 0.999;
  h.beta1_float = 0.9f;
  h.beta2_float = 0.999f;
  h.keep1 = 0.1f;
  h.keep2 = 0.001f;
  h.eps = 1e-6f;
  h.weight_decay = 0.1;
  h.scale = 1.0;
  h.update_proj_gap = 1;
  h.correct_bias = 1;
  return h;
}

struct Options {
  bool by_row;
  Distribution distribution;
  bool tensor_scale, separate;
  int64_t owners = 1, k_first = 0;  // of parts of the contracted side
};

// As the first of several owners, whom the others send zeros.
void step_part(const LowRankPlan& plan, const Hyper& hyper, float* workspace, int64_t owners) {
  const Buffer scratch(size_t(plan.scratch_floats()) * 4), norms(size_t(plan.size()) * 24);
  const Buffer sent(size_t(owners * plan.sent_floats()) * 4);
  Buffer order(size_t(plan.s_end() - plan.s_begin()) * 8);
  plan.write_scale_order(order.as<int64_t>());
  plan.project(hyper, nullptr, scratch.as<void>());
  plan.send(hyper, nullptr, scratch.as<void>(), sent.as<float>());
  const float *r = sent.as<float>(), *q = r + plan.sent_r(), *end = r + plan.sent_floats();
  std::copy(r, q, workspace + plan.own_r_begin());
  std::copy(q, end, workspace + plan.q_begin());
  plan.scale_parts(hyper, nullptr, norms.as<double>());
  plan.limit(hyper, nullptr, norms.as<double>());
  for (const Buffer* b : {&sent, &norms}) b->fold();
  order.fold();
}

// Three matrices, an empty one among them, that share a step which the last one advances.
void low_rank(int64_t channels, int64_t k, int64_t rank, int weight_dtype, int grad_dtype,
              Options options) {
  LowRankPlan plan(weight_dtype, grad_dtype, options.separate, options.owners);
  const int64_t own = rank < k ? rank : k;
  Buffer step(8), counters(24), clip(4);
  *clip.as<float>() = 0.5f;
  std::vector<Buffer> kept;  // of every matrix; moments, weights and norms are folded
  for (const int64_t matrix_channels : {channels, int64_t{0}, channels}) {
    const int64_t outer = options.by_row ? matrix_channels : k;
    const int64_t inner = options.by_row ? k : matrix_channels;
    const int64_t ld = inner + (inner % 8 == 0 ? 8 : 3);  // rows aligned or askew
    const int64_t elements = outer * inner > 0 ? (outer - 1) * ld + inner : 0;
    const int64_t own_channels = (matrix_channels + options.owners - 1) / options.owners;
    const size_t moments = size_t(own_channels * own) * 4;
    kept.push_back(random_buffer(elements, weight_dtype));
    kept.push_back(random_buffer(elements, grad_dtype));
    for (const size_t bytes : {moments, moments, size_t{4}}) kept.emplace_back(bytes);
    const Buffer* own_buffers = &kept[kept.size() - 5];
    Matrix m{};
    m.weight = own_buffers[0].as<void>();
    m.grad = own_buffers[1].as<void>();
    m.exp_avg = own_buffers[2].as<float>();
    m.exp_avg_sq = own_buffers[3].as<float>();
    m.update_norm = own_buffers[4].as<float>();
    m.step = step.as<int64_t>();
    m.key = 0x123456789ABCDEFu + uint64_t(kept.size());
    m.channels = matrix_channels;
    m.k = k;
    m.k_first = m.column = options.k_first;
    m.rank = own;
    m.weight_ld = m.grad_ld = ld;
    const bool row_major = (channels >= k) == options.by_row;
    m.flags = kByRow * options.by_row | kRowMajor * row_major | kLeads * (plan.size() == 2);
    plan.add(m, own_channels);
  }
  const Placed placed(plan);
  const float* clipped = options.separate ? clip.as<float>() : nullptr;
  Hyper hyper = make_hyper(counters.as<long long>(), clipped);
  hyper.distribution = options.distribution;
  hyper.tensor_scale = options.tensor_scale;
  hyper.stochastic_rounding = 1;
  for (int i = 0; i < 2; ++i) {
    if (options.owners > 1) {
      step_part(plan, hyper, placed.workspace.as<float>(), options.owners);
    } else {
      plan.project(hyper, nullptr);
      plan.scale(hyper, nullptr);
    }
    plan.apply(hyper, nullptr);
  }
  for (const Buffer& b : kept) b.fold();
  for (const Buffer* b : {&step, &counters}) b->fold();
}

void dense(int64_t count, int weight_dtype, int grad_dtype, int moments_dtype = kFloat32) {
  Buffer weight = random_buffer(count, weight_dtype), grad = random_buffer(count, grad_dtype);
  const size_t bytes = size_t(count * size_of(moments_dtype));
  const size_t blocks = size_t((count + kBlock - 1) / kBlock);  // with a unit each
  Buffer m(bytes), v(bytes), m_units(4 * blocks), v_units(4 * blocks), step(8), counters(24);
  DensePlan plan(weight_dtype, grad_dtype, moments_dtype);
  DenseRow row{};
  row.weight = weight.as<void>();
  row.grad = grad.as<void>();
  row.exp_avg = m.as<void>();
  row.exp_avg_sq = v.as<void>();
  row.exp_avg_unit = m_units.as<float>();
  row.exp_avg_sq_unit = v_units.as<float>();
  row.step = step.as<int64_t>();
  row.count = count;
  plan.add(row);
  const Placed placed(plan);
  const Hyper hyper = make_hyper(counters.as<long long>(), nullptr);
  for (int i = 0; i < 2; ++i) plan.adamw(hyper, nullptr);
  for (const Buffer* b : {&weight, &m, &v, &m_units, &v_units, &step, &counters}) b->fold();
}

}  // namespace

int main(int argc, char**) {
  if (argc > 1) {  // any argument: a few minutes less, for the slow ThreadSanitizer
    for (const int64_t rank : {1, 8}) {
      const bool one = rank == 1;
      low_rank(130, 70, rank, kBfloat16, kBfloat16, {true, kGaussian, one, false});
      low_rank(130, 70, rank, kBfloat16, kBfloat16, {false, kRademacher, one, false});
      low_rank(300, 1100, rank, kBfloat16, kBfloat16, {true, kRademacher, !one, true});
    }
    low_rank(130, 70, 8, kFloat32, kFloat32, {true, kRademacher, false, false});
    low_rank(130, 70, 2, kBfloat16, kBfloat16, {false, kGaussian, false, false});
    low_rank(34, 1024, 1, kBfloat16, kBfloat16, {true, kRademacher, false, false});
    for (const bool by_row : {true, false}) {
      low_rank(300, 70, 8, kBfloat16, kBfloat16, {by_row, kSparse, by_row, false});
      low_rank(300, 70, 20, kBfloat16, kBfloat16, {by_row, kSparse, by_row, true});
    }
    low_rank(33, 70, 8, kBfloat16, kBfloat16, {true, kSparse, false, true, 2, 21});
    low_rank(9, 70, 70, kBfloat16, kBfloat16, {false, kGaussian, false, true, 2, 21});
    for (const int moments : {kFloat32, kInt8}) dense(103, kBfloat16, kBfloat16, moments);
  } else {
    const int pairs[][2] = {{kFloat32, kFloat32}, {kBfloat16, kBfloat16}, {kFloat32, kFloat16}};
    const int64_t shapes[][2] = {{130, 70}, {33, 1100}, {1, 9}, {34, 1024}};
    for (const auto& pair : pairs) {
      for (const auto& shape : shapes) {
        for (const int64_t rank : {1, 5, 8, 70}) {
          for (const bool by_row : {true, false}) {
            const bool separate = (rank == 8) == by_row;
            low_rank(shape[0], shape[1], rank, pair[0], pair[1],
                     {by_row, rank == 8 ? kRademacher : kGaussian, rank == 1, separate});
          }
        }
        for (const int64_t rank : {1, 3, 8, 64, 70, 264}) {
          for (const bool by_row : {true, false}) {
            const bool separate = (rank == 8) == by_row;
            low_rank(shape[0], shape[1], rank, pair[0], pair[1],
                     {by_row, kSparse, rank == 1, separate});
          }
        }
      }
      for (const auto& of : {kGaussian, kRademacher, kSparse}) {
        for (const int64_t rank : {1, 5, 8, 70}) {
          for (const bool by_row : {true, false}) {
            const int64_t k = by_row == (rank % 2 == 0) ? 9 : 100;
            low_rank(70, k, rank, pair[0], pair[1],
                     {by_row, of, rank == 1, rank == 8, 3, by_row ? 500 : 40});
          }
        }
      }
      for (const int moments : {kFloat32, kBfloat16, kInt8}) {
        for (const int64_t count : {1003, 8 * 1024 + 4}) dense(count, pair[0], pair[1], moments);
      }
    }
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(sum));
}
