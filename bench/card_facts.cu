// What a GPU does that no CPU can tell, one "name value" per line (built and run by card_facts.py):
// how fast it draws normals, whether its fast logarithm keeps its promise for every u1 that there
// is, how many normals fall to bf16's other neighbour, and what narrow rows cost a stream.
#include <cstdio>
#include <cstdlib>

#include "../csrc/common.cuh"
#include "../csrc/philox.cuh"

namespace {

using namespace apollo;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

// The best of ten, in seconds.
template <class CALL>
double seconds(CALL call) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  float best = 1e30f;
  for (int i = 0; i < 10; ++i) {
    float ms = 0;
    check(cudaEventRecord(begin));
    call();
    check(cudaGetLastError());
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    check(cudaEventElapsedTime(&ms, begin, end));
    best = ms < best ? ms : best;
  }
  return best * 1e-3;
}

// Normals the way the kernels draw them: in registers, stored nowhere.
__global__ void draw_blocks(uint32_t blocks, uint32_t* sink) {
  const uint32_t j = blockIdx.x * blockDim.x + threadIdx.x;
  uint32_t folded = 0;
  for (uint32_t b = 0; b < blocks; ++b) {
    const Words w = philox4x32({{b, j, 0, kGaussian}}, 1, 2);
    folded ^= normal_pair_fast(w.w[0], w.w[1]) ^ normal_pair_fast(w.w[2], w.w[3]);
  }
  if (folded == 0x12345678u) *sink = folded;  // keeps the loop; hardly ever stores
}

struct Normals {
  unsigned long long positive_logs, bad_normals, flips, wrong_normals;
  unsigned long long worst_log, largest_far;  // the bits of doubles that are not negative
};

__device__ uint32_t nearest_bf16(double x) {
  const float f = float(x);  // rounding twice moves 1 in 2^29 of them
  return pack_bf16(f, 0.0f) & 0xFFFFu;
}

// Each of the 2^23 values of u1, with an angle that depends on it.
__global__ void all_logarithms(Normals* found) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t w0 = i << 9, w1 = i * 0x9E3779B9u;
  const float u1 = __uint_as_float((w0 >> 9) | 0x3F800000u) - 0x1.fffffep-1f;
  const double exact = log2((i + 0.5) * 0x1p-23), fast = approx_log2(u1);
  if (fast > 0.0) atomicAdd(&found->positive_logs, 1ull);
  const double error = fabs(fast - exact) / fmax(1.0, fabs(exact));  // as PTX promises it
  atomicMax(&found->worst_log, static_cast<unsigned long long>(__double_as_longlong(error)));
  const uint32_t pair = normal_pair_fast(w0, w1);
  const double rho = sqrt(-2.0 * 0.6931471805599453 * exact);
  const double angle = double(w1 >> 9) * 0x1p-23 * 6.283185307179586;
  for (int half = 0; half < 2; ++half) {
    const uint32_t bits = half ? pair >> 16 : pair & 0xFFFFu;
    const double z = rho * (half ? sin(angle) : cos(angle));
    const double f = __uint_as_float(bits << 16);
    const uint32_t wanted = nearest_bf16(z);
    if (!(fabs(f) < 8.0)) atomicAdd(&found->bad_normals, 1ull);
    const int apart = abs(int(bits) - int(wanted));
    if (apart != 0) atomicAdd(&found->flips, 1ull);
    // Half of bf16's step; the absolute error of sin and cos with that of the angle; and what 2^-22
    // of the logarithm, from 1/2 on absolute, makes of a small radius.
    const double log_error = 1.39 * 0x1p-22;
    const double radius = fmin(sqrt(log_error), log_error / (2.0 * rho));
    const double tolerance = 0x1p-8 * fmax(fabs(f), fabs(z)) + 0x1p-20 * rho + radius;
    if (!(fabs(f - z) <= tolerance)) atomicAdd(&found->wrong_normals, 1ull);
    if (apart > 1) {
      atomicMax(&found->largest_far,
                static_cast<unsigned long long>(__double_as_longlong(fabs(z))));
    }
  }
}

// A stream over rows of 4096 bf16 as `project` walks them: a stage takes ROW_BYTES of each row.
template <int ROW_BYTES>
__global__ void __launch_bounds__(512) read_rows(const unsigned char* from, uint32_t* sink) {
  constexpr int kThreads = ROW_BYTES / 16, kRows = 512 / kThreads, kRow = 8192;
  const int row = int(threadIdx.x) / kThreads, chunk = int(threadIdx.x) % kThreads;
  const unsigned char* at = from + (int64_t(blockIdx.x) * kRows + row) * kRow + 16 * chunk;
  uint32_t folded = 0;
#pragma unroll 4
  for (int k = 0; k < kRow; k += ROW_BYTES) {
    const uint4 x = load16(at + k);
    folded ^= x.x ^ x.y ^ x.z ^ x.w;
  }
  if (folded == 0x12345678u) *sink = folded;
}

}  // namespace

int main() {
  int sms = 0, clock = 0;
  check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  check(cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, 0));
  uint32_t* sink = nullptr;
  check(cudaMalloc(reinterpret_cast<void**>(&sink), sizeof *sink));

  const uint32_t blocks = 4096, threads = 256, grid = uint32_t(sms) * 8;
  const double draw = seconds([&] { draw_blocks<<<grid, threads>>>(blocks, sink); });
  const double normals = 4.0 * blocks * threads * grid / draw;

  Normals* found = nullptr;
  check(cudaMalloc(reinterpret_cast<void**>(&found), sizeof *found));
  check(cudaMemset(found, 0, sizeof *found));
  all_logarithms<<<(1 << 23) / 256, 256>>>(found);
  check(cudaGetLastError());
  check(cudaDeviceSynchronize());
  Normals seen;
  check(cudaMemcpy(&seen, found, sizeof seen, cudaMemcpyDeviceToHost));
  double worst = 0, largest_far = 0;
  std::memcpy(&worst, &seen.worst_log, sizeof worst);
  std::memcpy(&largest_far, &seen.largest_far, sizeof largest_far);

  const int64_t size = int64_t{1} << 30;
  unsigned char* rows = nullptr;
  check(cudaMalloc(reinterpret_cast<void**>(&rows), size_t(size)));
  check(cudaMemset(rows, 1, size_t(size)));
  const double narrow = seconds([&] { read_rows<64><<<size / 8192 / 128, 512>>>(rows, sink); });
  const double wide = seconds([&] { read_rows<128><<<size / 8192 / 64, 512>>>(rows, sink); });

  std::printf("normals_per_second %.6g\n", normals);
  std::printf("normals_per_sm_and_clock %.6g\n", normals / sms / clock / 1e3);
  std::printf("positive_logarithms %llu\n", seen.positive_logs);
  std::printf("worst_logarithm_error %.6g\n", worst);
  std::printf("bad_normals %llu\n", seen.bad_normals);
  std::printf("flipped_normals_share %.6g\n", double(seen.flips) / (1 << 24));
  std::printf("normals_beyond_tolerance %llu\n", seen.wrong_normals);
  std::printf("largest_normal_two_steps_off %.6g\n", largest_far);
  std::printf("rows_of_64_bytes_per_second %.6g\n", double(size) / narrow);
  std::printf("rows_of_128_bytes_per_second %.6g\n", double(size) / wide);
  return 0;
}
