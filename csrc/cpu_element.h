// How the CPU's passes read and write the elements of a matrix: 16 at a time, as float32.
#pragma once

#include <cstdint>

// The intrinsics want x86 and a compiler that knows them; elsewhere, and on Windows, PyTorch runs.
#if defined(__x86_64__) && !defined(_WIN32) && (defined(__clang__) || __GNUC__ >= 10)
#define APOLLO_CPU_PASSES 1
#include <immintrin.h>
#define APOLLO_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,fma")))
#else
#define APOLLO_CPU_PASSES 0
#endif

namespace apollo {

enum class CpuElement { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

#if APOLLO_CPU_PASSES

inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

constexpr int64_t kLanes = 16;
constexpr __mmask16 kAll = 0xFFFF;

APOLLO_AVX512 inline __mmask16 mask16(int64_t n) {
  return n >= kLanes ? kAll : __mmask16((1u << n) - 1);
}

// Asks for what will be read soon. One core hides more of memory's latency so than by the
// processor's own guesses, which end at a page. An address beyond the matrix does no harm.
APOLLO_AVX512 inline void prefetch(const void* place, int64_t bytes = 16384) {
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(place) + bytes),
               _MM_HINT_T1);
}

struct Float32 {
  using Stored = float;
  APOLLO_AVX512 static __m512 load(const float* x, __mmask16 mask) {
    return _mm512_maskz_loadu_ps(mask, x);
  }
  APOLLO_AVX512 static void store(float* x, __mmask16 mask, __m512 value) {
    _mm512_mask_storeu_ps(x, mask, value);
  }
};

struct Bfloat16 {
  using Stored = uint16_t;
  APOLLO_AVX512 static __m512 load(const uint16_t* x, __mmask16 mask) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  // To nearest even. A NaN stays one: made from bf16 values, its low half is zero and carries
  // nothing. (The processor's own conversion would flush what is denormal.)
  APOLLO_AVX512 static void store(uint16_t* x, __mmask16 mask, __m512 value) {
    const __m512i bits = _mm512_castps_si512(value), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    _mm256_mask_storeu_epi16(x, mask, _mm512_cvtepi32_epi16(rounded));
  }
};

struct Float16 {
  using Stored = uint16_t;
  APOLLO_AVX512 static __m512 load(const uint16_t* x, __mmask16 mask) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x));
  }
  APOLLO_AVX512 static void store(uint16_t* x, __mmask16 mask, __m512 value) {
    _mm256_mask_storeu_epi16(x, mask, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
};

// Bytes of an element in memory.
inline int64_t size_of(CpuElement element) { return element == CpuElement::kFloat32 ? 4 : 2; }

// Calls pass(Float32{}) or its like for the element at hand.
template <class Pass>
void with_element(CpuElement element, const Pass& pass) {
  switch (element) {
    case CpuElement::kFloat32:
      return pass(Float32{});
    case CpuElement::kBfloat16:
      return pass(Bfloat16{});
    case CpuElement::kFloat16:
      return pass(Float16{});
  }
}

#endif

}  // namespace apollo
