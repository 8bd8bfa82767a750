// A functional model of a CUDA device on the host, so that tests run the kernels without a GPU:
// csrc's sources are compiled by g++ against this header, with one fiber per CUDA thread. What it
// knows is what csrc uses. Blocks run one after the other, or on EMULATED_WORKERS threads; a fiber
// runs until it waits for its block or its warp. Not modelled: speed, caches, and the tensor cores'
// own rounding.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__ static
#define __launch_bounds__(...)
// One copy per worker. Under a sanitizer one worker runs, and real globals get red zones.
#if defined(EMULATED_STATIC_SHARED)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif
#define APOLLO_SHARED(name) unsigned char* name = emulated::dynamic_shared()
#define APOLLO_LAUNCH(kernel, grid, block, shared, stream, ...) \
  emulated::launch(grid, block, shared, [=] { (kernel)(__VA_ARGS__); })

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulated {

constexpr int kWarp = 32;
enum Operation { kShuffle = 1, kMultiply };

struct Copy {
  void* to;
  const void* from;
};
struct Thread {  // what a fiber knows of itself
  dim3 thread, block;
  unsigned linear;
  std::vector<Copy> copies;  // 16 bytes each, on their way
};
extern thread_local Thread* self;

void launch(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body);
unsigned char* dynamic_shared();
void block_barrier(int line);
// All lanes of a warp hand in `in` and get `out`; the last to arrive computes it for all.
void collective(Operation operation, int source, const void* in, size_t in_size, void* out,
                size_t out_size);

template <class T>
T shuffle(T value, int source) {
  static_assert(sizeof(T) <= 16);
  T result;
  collective(kShuffle, source, &value, sizeof value, &result, sizeof result);
  return result;
}

// What tests count: launches, and the bytes that 16-byte loads read from one stretch of memory.
int64_t launches();
void watch(uintptr_t begin, size_t size);
int64_t watched_bytes();
void count_load(const void* from);

}  // namespace emulated

#define threadIdx (emulated::self->thread)
#define blockIdx (emulated::self->block)

inline void __syncthreads(int line = __builtin_LINE()) { emulated::block_barrier(line); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated::shuffle(value, int(emulated::self->linear % emulated::kWarp) ^ mask);
}
inline uint32_t __reduce_max_sync(unsigned members, uint32_t value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const uint32_t other = __shfl_xor_sync(members, value, lanes);
    value = other > value ? other : value;
  }
  return value;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) {
    picked |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  }
  return picked;
}
inline float __fdiv_rn(float x, float y) { return x / y; }
inline int __float2int_rn(float x) {
  if (std::isnan(x)) return 0;
  return x < -0x1p31f ? INT32_MIN : x >= 0x1p31f ? INT32_MAX : int(std::nearbyint(x));
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) {
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
// Counts to `last`, then from 0 on.
inline unsigned atomicInc(unsigned* p, unsigned last) {
  unsigned before = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &before, before >= last ? 0 : before + 1, false,
                                      __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return before;
}
inline void __threadfence() {}  // atomicInc orders all that was written before it
template <class T>
T __ldcg(const T* from) {
  return *from;
}
inline int atomicExch(int* p, int v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }

namespace apollo {

inline float approx_log2(float x) { return std::log2(x); }
inline float approx_sqrt(float x) { return std::sqrt(x); }
inline float approx_root(float x) { return std::sqrt(x); }
inline float approx_reciprocal(float x) { return 1.0f / x; }
inline float approx_sin(float x) { return std::sin(x); }
inline float approx_cos(float x) { return std::cos(x); }
inline void sine_and_cosine_of_turns(double turns, double& sine, double& cosine) {
  sine = std::sin(6.283185307179586476925 * turns);
  cosine = std::cos(6.283185307179586476925 * turns);
}

inline int made_again(int x) { return x; }
inline int thread_again() { return int(threadIdx.x); }
template <class T>
T* global(T* address) {
  return address;
}
inline uint4 load16(const void* from) {
  emulated::count_load(from);
  return *static_cast<const uint4*>(from);
}
// A copy lands when its thread waits for it, no earlier.
inline void copy16(void* to, const void* from) {
  emulated::count_load(from);
  emulated::self->copies.push_back({to, from});
}
inline void commit_copies() {}
inline void wait_for_copies() {
  for (const auto& copy : emulated::self->copies) std::memcpy(copy.to, copy.from, 16);
  emulated::self->copies.clear();
}
inline void store16(void* to, const uint4& x) { *static_cast<uint4*>(to) = x; }

inline void load_word(uint4& word, const uint4* from) { word = load16(from); }
inline void store_word(uint4* to, const uint4& word) { store16(to, word); }
inline void load_word(uint2& word, const uint2* from) { word = *from; }
inline void store_word(uint2* to, const uint2& word) { *to = word; }
inline void load_word(uint32_t& word, const uint32_t* from) { word = *from; }
inline void store_word(uint32_t* to, uint32_t word) { *to = word; }

inline uint32_t bf16_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFFu;
  return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}
inline uint32_t pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }

inline float half_to_float(uint16_t bits) {
  const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                     : exponent     ? std::ldexp(float(1024 + mantissa), int(exponent) - 25)
                                    : std::ldexp(float(mantissa), -24);
  return bits & 0x8000 ? -size : size;
}
inline uint16_t float_to_half(float x) {
  const uint16_t sign = uint16_t(__float_as_uint(x) >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7E00;
  if (size >= 65520.0f) return sign | 0x7C00;
  if (size < 0x1p-14f) return sign | uint16_t(std::nearbyint(size * 0x1p24f));
  int exponent;
  const float fraction = std::frexp(size, &exponent);  // size = fraction 2^exponent, in [1/2, 1)
  const auto mantissa = uint32_t(std::nearbyint(fraction * 2048.0f));  // 1024 to 2048
  return uint16_t(sign + ((exponent + 13) << 10) + mantissa);  // a carry moves into the exponent
}

template <bool TRANSPOSED>
void load_matrices(uint32_t (&r)[4], const void* row) {
  const int lane = int(emulated::self->linear % emulated::kWarp);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int i = TRANSPOSED ? 2 * (lane % 4) + e : lane / 4;
      const int j = TRANSPOSED ? lane / 4 : 2 * (lane % 4) + e;
      const void* from = emulated::shuffle(row, 8 * matrix + i);
      pair[e] = static_cast<const uint16_t*>(from)[j];
    }
    r[matrix] = pair[0] | uint32_t{pair[1]} << 16;
  }
}

inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  unsigned char in[40];
  std::memcpy(in, a, 16);
  std::memcpy(in + 16, &b0, 4);
  std::memcpy(in + 20, &b1, 4);
  std::memcpy(in + 24, d, 16);
  emulated::collective(emulated::kMultiply, 0, in, sizeof in, d, sizeof d);
}

}  // namespace apollo
