// Runs every kernel on the emulated device for `make test-sanitizers`: buffers end where their
// tensors end, so that AddressSanitizer sees each read or write beyond; ThreadSanitizer sees
// missing barriers. Prints a sum over all bits of the results: equal for every schedule.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../../csrc/common.cuh"

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

Launch make_launch(int weight_dtype, int grad_dtype, long long* counters) {
  Launch launch{};
  launch.weight_dtype = weight_dtype;
  launch.grad_dtype = grad_dtype;
  Hyper& h = launch.hyper;
  h.counters = counters;
  h.lr = 0.01;
  h.beta1 = 0.9;
  h.beta2 = 0.999;
  h.beta2_float = 0.999f;
  h.keep1 = 0.1f;
  h.keep2 = 0.001f;
  h.eps = 1e-6f;
  h.weight_decay = 0.1;
  h.scale = 1.0;
  h.update_proj_gap = 1;
  h.correct_bias = 1;
  return launch;
}

void low_rank(int64_t channels, int64_t k, int64_t rank, int weight_dtype, int grad_dtype,
              bool by_row, bool signs, bool tensor_scale) {
  const int64_t own = rank < k ? rank : k, outer = by_row ? channels : k;
  const int64_t inner = by_row ? k : channels, ld = inner + 3;
  const Tiling t = tiling(channels, k, own, rank, grad_dtype, by_row);
  const int64_t scale_blocks = (channels + kScaleChannels - 1) / kScaleChannels;
  const int64_t apply_blocks = (outer * ((inner + 7) / 8) + kApplyVectors - 1) / kApplyVectors;
  const int64_t project_blocks = t.channel_tiles * t.rank_tiles * t.chunks;
  Buffer weight = random_buffer((outer - 1) * ld + inner, weight_dtype);
  Buffer grad = random_buffer((outer - 1) * ld + inner, grad_dtype);
  Buffer m(size_t(channels * own) * 4), v(size_t(channels * own) * 4), scalars(8), counters(24);
  Parameter p{};
  p.weight = weight.as<void>();
  p.grad = grad.as<void>();
  p.exp_avg = m.as<float>();
  p.exp_avg_sq = v.as<float>();
  p.update_norm = scalars.as<float>();
  p.step = scalars.as<float>() + 1;
  p.key = 0x123456789ABCDEFu;
  p.channels = channels;
  p.k = k;
  p.rank = own;
  p.weight_ld = p.grad_ld = ld;
  p.by_row = by_row;
  p.chunks = t.chunks;
  p.chunk_length = t.chunk_length;
  p.partial = 0;
  p.sums = p.partial + (t.fused ? 0 : t.chunks * channels * own);
  p.channel = p.sums + (t.fused ? 2 * t.rank_tiles * channels : 0);
  p.parts = p.channel + (1 + t.chunks) * channels;
  Buffer workspace(size_t(p.parts + 3 * scale_blocks + 2) * 4);
  Buffer table(sizeof p);
  std::memcpy(table.as<void>(), &p, sizeof p);
  const auto map_of = [](int64_t blocks) { return Buffer(size_t(blocks) * 4); };
  const Buffer maps[3] = {map_of(project_blocks), map_of(scale_blocks), map_of(apply_blocks)};
  Launch launch = make_launch(weight_dtype, grad_dtype, counters.as<long long>());
  launch.table = table.as<void>();
  launch.workspace = workspace.as<float>();
  launch.rank = int(rank);
  launch.hyper.rademacher = signs;
  launch.hyper.tensor_scale = tensor_scale;
  for (int step = 0; step < 2; ++step) {
    const auto with = [&](int i, int64_t blocks) -> const Launch& {
      launch.map = maps[i].as<int32_t>();
      launch.blocks = blocks;
      return launch;
    };
    project(with(0, project_blocks));
    scale(with(1, scale_blocks));
    limit(with(0, 1));
    apply(with(2, apply_blocks));
  }
  for (const Buffer* b : {&weight, &m, &v, &scalars, &counters}) b->fold();
}

void dense(int64_t count, int weight_dtype, int grad_dtype) {
  Buffer weight = random_buffer(count, weight_dtype), grad = random_buffer(count, grad_dtype);
  Buffer m(size_t(count) * 4), v(size_t(count) * 4), step(4), flag(4), counters(24);
  DenseParameter p{};
  p.weight = weight.as<void>();
  p.grad = grad.as<void>();
  p.exp_avg = m.as<float>();
  p.exp_avg_sq = v.as<float>();
  p.step = step.as<float>();
  p.count = count;
  Buffer table(sizeof p), map(size_t(count / (8 * kApplyVectors) + 1) * 4);
  std::memcpy(table.as<void>(), &p, sizeof p);
  Launch launch = make_launch(weight_dtype, grad_dtype, counters.as<long long>());
  launch.table = table.as<void>();
  launch.map = map.as<int32_t>();
  launch.flags = flag.as<int32_t>();
  for (int i = 0; i < 2; ++i) {
    launch.blocks = (count + 8 * kApplyVectors - 1) / (8 * kApplyVectors);
    adamw(launch);
    launch.blocks = 1;
    advance(launch);
  }
  for (const Buffer* b : {&weight, &m, &v, &step, &counters}) b->fold();
}

}  // namespace

int main(int argc, char**) {
  if (argc > 1) {  // any argument: a few minutes less, for the slow ThreadSanitizer
    for (const int64_t rank : {1, 8}) {
      low_rank(130, 70, rank, kBfloat16, kBfloat16, true, false, rank == 1);
      low_rank(130, 70, rank, kBfloat16, kBfloat16, false, true, rank == 1);
    }
    dense(103, kBfloat16, kBfloat16);
  } else {
    const int pairs[][2] = {{kFloat32, kFloat32}, {kBfloat16, kBfloat16}, {kFloat32, kFloat16}};
    const int64_t shapes[][2] = {{130, 70}, {33, 1100}, {1, 9}};
    for (const auto& pair : pairs) {
      for (const auto& shape : shapes) {
        for (const int64_t rank : {1, 5, 8, 70}) {
          for (const bool by_row : {true, false}) {
            low_rank(shape[0], shape[1], rank, pair[0], pair[1], by_row, rank == 8, rank == 1);
          }
        }
      }
      dense(1003, pair[0], pair[1]);
    }
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(sum));
}
