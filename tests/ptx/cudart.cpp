// Stands in for the CUDA runtime under launch.cu as nvcc compiled it: a launch goes to the
// interpreter with the kernel's name and the very arguments that a card would get. It refuses what
// a card would refuse: more dynamic shared memory than was asked for, blocks and grids too large.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <string>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

struct Function {
  std::string name;
  int most_shared = 48 * 1024;
};
std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> all;
  return all;
}
struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
} pushed;
cudaError_t last_error = cudaSuccess;
using Launch = int (*)(const char* name, unsigned grid, unsigned block, size_t shared, void** args);
Launch launch = nullptr;

}  // namespace

EXPORTED void set_launch(Launch callback) { launch = callback; }

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  functions()[host].name = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* s) {
  pushed = {grid, block, shared, s};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<void**>(stream) = pushed.stream;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** args, size_t shared,
                             cudaStream_t) {
  const Function& function = functions().at(f);
  const bool flat = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1;
  const bool fits = shared <= size_t(function.most_shared) && block.x <= 1024 && grid.x > 0 &&
                    grid.x <= 0x7FFFFFFFu;
  if (!flat || !fits) return last_error = cudaErrorInvalidValue;
  if (launch(function.name.c_str(), grid.x, block.x, shared, args)) {
    last_error = cudaErrorLaunchFailure;
  }
  return last_error;
}
// What a launch becomes since CUDA 13.
cudaError_t __cudaGetKernel(const void** kernel, const void* f) {
  *kernel = f;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** args,
                               size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, args, shared, stream);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* f) {
  *attributes = {};
  return functions().count(f) ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}
cudaError_t cudaFuncSetAttribute(const void* f, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > 99 * 1024) {
    return cudaErrorInvalidValue;  // 99 KB is what sm_86, 89 and 120 have
  }
  functions().at(f).most_shared = value;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t) { return "refused by the interpreter"; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }

}  // extern "C"
