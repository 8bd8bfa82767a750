#include "cpu_tiles.h"

#if APOLLO_CPU_PASSES && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu_parallel.h"

#define APOLLO_AMX __attribute__((target("avx512f,avx512bw,avx512vl,fma,amx-tile,amx-bf16")))

namespace apollo {
namespace {

constexpr int64_t kPanel = 64;  // channels that are packed together
constexpr int64_t kSteps = 16;  // k tiles in a run: 512 k, whose sums start at 0
constexpr int64_t kTile = 512;  // bf16 in a tile of 16 rows of 64 bytes
constexpr int64_t kRun = 32 * kSteps;

struct alignas(64) Line {
  uint16_t bf16[32];
};

// The compiler does not know what of memory the instructions for tiles read and write.
inline void fence() { asm volatile("" ::: "memory"); }

// The tile registers are shaped for the length of a pass, and whoever used them before finds them
// as they were: oneDNN remembers what it has loaded.
class Shape {
 public:
  APOLLO_AMX Shape() {
    _tile_storeconfig(before_);
    Config all{};
    all.palette = 1;
    for (int i = 0; i < 8; ++i) all.bytes[i] = 64, all.rows[i] = 16;
    fence();
    _tile_loadconfig(&all);
  }
  APOLLO_AMX ~Shape() {
    fence();
    _tile_loadconfig(before_);
  }
  Shape(const Shape&) = delete;
  Shape& operator=(const Shape&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  alignas(64) uint8_t before_[64];
};

// Takes the next bf16 piece off x: what is left is exact, and after three pieces of a float32 it is
// 0. Cut, not rounded, so that a piece of a finite x is finite; a NaN or Inf leaves a NaN.
APOLLO_AVX512 inline __m512i take_piece(__m512& x) {
  const __m512i high =
      _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(int32_t(0xFFFF0000u)));
  x = _mm512_sub_ps(x, _mm512_castsi512_ps(high));
  return high;
}

// One run of a panel as tiles, [PIECES][kSteps][kPanel / 16][16 channels][32 k], and its squares.
template <class Element, int PIECES>
APOLLO_AVX512 void pack_rows(const CpuTiles& a, int64_t c, int64_t k, Line* panel, float* squares) {
  const int64_t count = std::min(kPanel, a.channels - c), end = std::min(a.k, k + kRun);
  for (int64_t i = 0; i < count; ++i) {
    const auto* x = static_cast<const typename Element::Stored*>(a.x) + (c + i) * a.ld;
    Line* line = panel + i;
    __m512 square = _mm512_setzero_ps();
    for (int64_t at = k; at < end; at += 32, line += kPanel) {
      prefetch(x + at, kPanel * a.ld * int64_t(sizeof *x));
      if (sizeof *x == 4) prefetch(x + at + 16, kPanel * a.ld * int64_t(sizeof *x));
      __m512 v[2] = {Element::load(x + at, mask16(end - at)), _mm512_setzero_ps()};
      if (at + 16 < end) v[1] = Element::load(x + at + 16, mask16(end - at - 16));
      for (auto& lanes : v) square = _mm512_fmadd_ps(lanes, lanes, square);
      for (int piece = 0; piece < PIECES; ++piece) {
        for (int half = 0; half < 2; ++half) {
          const __m256i bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32(take_piece(v[half]), 16));
          _mm256_store_si256(
              reinterpret_cast<__m256i*>(line[piece * kSteps * kPanel].bf16 + 16 * half), bits);
        }
      }
    }
    squares[i] += _mm512_reduce_add_ps(square);
  }
}

// The same where channels are columns, [PIECES][kSteps][kPanel / 16][16 pairs of k][16
// channels][2].
template <class Element, int PIECES>
APOLLO_AVX512 void pack_columns(const CpuTiles& a, int64_t c, int64_t k, Line* panel,
                                float* squares) {
  const auto* x = static_cast<const typename Element::Stored*>(a.x) + c;
  const int64_t count = std::min(kPanel, a.channels - c), end = std::min(a.k, k + kRun);
  for (int64_t at = k; at < k + (end - k + 31) / 32 * 32; at += 2) {
    const int64_t pair = (at - k) / 2, even = std::min(at, end - 1),
                  odd = std::min(at + 1, end - 1);
    for (int64_t i = 0; i < count; i += kLanes) {
      const __mmask16 mask = mask16(count - i);
      prefetch(x + even * a.ld + i, 16 * a.ld * int64_t(sizeof *x));
      prefetch(x + odd * a.ld + i, 16 * a.ld * int64_t(sizeof *x));
      __m512 v[2] = {Element::load(x + even * a.ld + i, at < end ? mask : __mmask16(0)),
                     Element::load(x + odd * a.ld + i, at + 1 < end ? mask : __mmask16(0))};
      __m512 square = _mm512_loadu_ps(squares + i);
      for (auto& lanes : v) square = _mm512_fmadd_ps(lanes, lanes, square);
      _mm512_storeu_ps(squares + i, square);
      Line* line = panel + pair / 16 * kPanel + i + pair % 16;
      for (int piece = 0; piece < PIECES; ++piece) {
        const __m512i low = _mm512_srli_epi32(take_piece(v[0]), 16);
        _mm512_store_si512(line + piece * kSteps * kPanel, _mm512_or_si512(low, take_piece(v[1])));
      }
    }
  }
}

// 32 channels times 32 rank rows over one run: sums [2][2][16][16], the left operand's rows first.
// X is the left operand where channels are rows, else z is.
template <int PIECES, bool X_LEFT>
APOLLO_AMX void multiply(const Line* panel, const uint16_t* z, int64_t z_step, int64_t steps,
                         float* sums) {
  fence();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step, panel += kPanel, z += z_step) {
    if (X_LEFT) {
      _tile_loadd(6, z, 64);
      _tile_loadd(7, z + kTile, 64);
    } else {
      _tile_loadd(4, z, 64);
      _tile_loadd(5, z + kTile, 64);
    }
    for (int piece = PIECES - 1; piece >= 0; --piece) {  // the small ones first
      const Line* x = panel + piece * kSteps * kPanel;
      if (X_LEFT) {
        _tile_loadd(4, x, 64);
        _tile_loadd(5, x + 16, 64);
      } else {
        _tile_loadd(6, x, 64);
        _tile_loadd(7, x + 16, 64);
      }
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
  fence();
}

// Adds four tiles to a block of a matrix of `width` columns.
APOLLO_AVX512 void add_tiles(const float* tiles, float* sums, int64_t width) {
  for (int64_t i = 0; i < 32; ++i) {
    for (int64_t half = 0; half < 2; ++half) {
      float* to = sums + i * width + 16 * half;
      const float* from = tiles + (i / 16 * 2 + half) * 256 + i % 16 * 16;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_loadu_ps(from)));
    }
  }
}

template <class Element, int PIECES, bool X_LEFT>
void project(const CpuTiles& a, int64_t begin, int64_t end) {
  const Shape shape;
  const std::unique_ptr<Line[]> panel(new Line[size_t(PIECES * kSteps * kPanel)]);
  std::vector<float> sums(static_cast<size_t>(kPanel * a.padded));
  alignas(64) float tiles[4 * 256], squares[kPanel];
  const int64_t z_step = a.padded / 16 * kTile, width = X_LEFT ? a.padded : kPanel;
  for (int64_t c = begin; c < end; c += kPanel) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    std::fill(squares, squares + kPanel, 0.0f);
    for (int64_t k = 0; k < a.k; k += kRun) {
      const int64_t steps = std::min(kSteps, (a.k - k + 31) / 32);
      X_LEFT ? pack_rows<Element, PIECES>(a, c, k, panel.get(), squares)
             : pack_columns<Element, PIECES>(a, c, k, panel.get(), squares);
      for (int64_t j = 0; j < a.padded; j += 32) {
        for (int64_t i = 0; i < kPanel; i += 32) {
          multiply<PIECES, X_LEFT>(panel.get() + i, a.z + k / 32 * z_step + j / 16 * kTile, z_step,
                                   steps, tiles);
          add_tiles(tiles, sums.data() + (X_LEFT ? i * width + j : j * width + i), width);
        }
      }
    }
    const int64_t count = std::min(kPanel, a.channels - c);
    for (int64_t i = 0; i < count; ++i) {
      const float* from = sums.data() + (X_LEFT ? i * width : i);
      float* to = a.r + (c + i) * a.rank;
      for (int64_t j = 0; j < a.rank; ++j) to[j] = a.scale * from[X_LEFT ? j : j * width];
    }
    std::copy(squares, squares + count, a.q + c);
  }
}

template <class Element>
constexpr int kPieces = 3;
template <>
constexpr int kPieces<Bfloat16> = 1;
template <>
constexpr int kPieces<Float16> = 2;

}  // namespace

bool cpu_tiles_supported() {
  static const bool supported = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool known = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, for the process
    return has_avx512() && known && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return supported;
}

void cpu_project_tiles(const CpuTiles& a, int threads) {
  if (a.channels * a.k < (1 << 17)) threads = 1;  // a thread costs microseconds
  with_element(a.element, [&a, threads](auto element) {
    using Element = decltype(element);
    parallel(a.channels, kPanel, threads, [&a](int64_t begin, int64_t end) {
      a.rows ? project<Element, kPieces<Element>, true>(a, begin, end)
             : project<Element, kPieces<Element>, false>(a, begin, end);
    });
  });
}

}  // namespace apollo

#else

namespace apollo {
bool cpu_tiles_supported() { return false; }
void cpu_project_tiles(const CpuTiles&, int) {}
}  // namespace apollo

#endif
