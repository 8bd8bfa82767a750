// How many normals z(j, k) a GPU draws, the way the kernels draw them: in registers, stored
// nowhere. Prints one line: normals per second, SMs, clock in kHz. Built and run by roofline.py.
#include <cstdio>

#include "../csrc/philox.cuh"

__global__ void draw_blocks(uint32_t blocks, uint32_t* sink) {
  const uint32_t j = blockIdx.x * blockDim.x + threadIdx.x;
  uint32_t folded = 0;
  for (uint32_t b = 0; b < blocks; ++b) {
    const apollo::Words w = apollo::philox4x32({{b, j, 0, apollo::kGaussian}}, 1, 2);
    folded ^= apollo::normal_pair_fast(w.w[0], w.w[1]) ^ apollo::normal_pair_fast(w.w[2], w.w[3]);
  }
  if (folded == 0x12345678u) *sink = folded;  // keeps the loop; hardly ever stores
}

int main() {
  int sms = 0, clock = 0;
  uint32_t* sink = nullptr;
  cudaEvent_t begin, end;
  if (cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0) ||
      cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, 0) ||
      cudaMalloc(reinterpret_cast<void**>(&sink), sizeof *sink) || cudaEventCreate(&begin) ||
      cudaEventCreate(&end)) {
    std::fprintf(stderr, "%s\n", cudaGetErrorString(cudaGetLastError()));
    return 1;
  }
  const uint32_t blocks = 4096, threads = 256, grid = uint32_t(sms) * 8;
  float best = 1e30f;
  for (int i = 0; i < 10; ++i) {
    float ms = 0;
    cudaEventRecord(begin);
    draw_blocks<<<grid, threads>>>(blocks, sink);
    cudaEventRecord(end);
    if (cudaEventSynchronize(end) || cudaEventElapsedTime(&ms, begin, end)) {
      std::fprintf(stderr, "%s\n", cudaGetErrorString(cudaGetLastError()));
      return 1;
    }
    best = ms < best ? ms : best;
  }
  std::printf("%.6g %d %d\n", 4.0 * blocks * threads * grid / (best * 1e-3), sms, clock);
}
