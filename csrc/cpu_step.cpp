#include "cpu_step.h"

#include "cpu_element.h"

#if APOLLO_CPU_PASSES

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu_bf16.h"
#include "cpu_moments.h"
#include "cpu_parallel.h"
#include "cpu_sparse.h"
#include "cpu_stream.h"
#include "cpu_tiles.h"

namespace apollo {
namespace {

constexpr double kTiny = 1e-8, kNormGrowth = 1.01;  // batch.py's
constexpr int64_t kPanel = 64;                      // channels that a pass likes to have together
constexpr int64_t kHeld = 32768;                    // floats of R that stay in the second cache

// R and q of channels [begin, end), on this thread.
void project(const CpuMatrix& a, int64_t begin, int64_t end, float* r, float* q) {
  const auto element = static_cast<CpuElement>(a.element);
  const int64_t apart = (a.rows ? a.x_ld : 1) * size_of(element);
  const auto* x = static_cast<const char*>(a.x) + begin * apart;
  const auto* z = static_cast<const uint16_t*>(a.z);
  const float root = float(1 / std::sqrt(double(a.rank)));
  const int64_t count = end - begin;
  const bool rows = a.rows != 0;
  switch (a.form) {
    case CpuForm::kThin:
      return cpu_project_thin({x, element, count, a.k, a.x_ld, rows, z, a.rank, root, r, q}, 1);
    case CpuForm::kTiles:
      return cpu_project_tiles(
          {x, element, count, a.k, a.x_ld, rows, z, a.rank, a.padded, root, r, q}, 1);
    case CpuForm::kBf16:
      return cpu_project_bf16({reinterpret_cast<const uint16_t*>(x), count, a.k, a.x_ld, rows, z,
                               a.rank, a.padded, root, r, q},
                              1);
    case CpuForm::kSparse:
      return cpu_project_sparse(
          {x, element, count, a.k, a.x_ld, rows, static_cast<const uint32_t*>(a.z), a.rank, r, q},
          1);
  }
}

// Moments and s; returns u^2.
float project_and_scale(const CpuMatrix& a, const CpuHyper& h, float factor, int threads) {
  std::vector<float> q(static_cast<size_t>(a.channels));
  CpuMoments all{nullptr, q.data(), a.m,   a.v,    a.channels,    a.rank,
                 h.beta1, h.beta2,  h.eps, factor, h.per_channel, a.s};
  const int64_t grain = a.rows && a.form != CpuForm::kTiles ? 8 : kPanel;
  if (!h.per_channel) {
    std::vector<float> r(static_cast<size_t>(a.channels * a.rank));
    all.r = r.data();
    parallel(a.channels, grain, threads, [&](int64_t begin, int64_t end) {
      project(a, begin, end, r.data() + begin * a.rank, q.data() + begin);
    });
    return cpu_scale(all, threads);
  }
  parallel(a.channels, grain, threads, [&](int64_t begin, int64_t end) {
    const int64_t most = std::max(kPanel, kHeld / a.rank / kPanel * kPanel);
    const int64_t block = std::min(most, end - begin);
    std::vector<float> r(static_cast<size_t>(block * a.rank));
    for (int64_t c = begin; c < end; c += block) {
      const int64_t count = std::min(block, end - c);
      project(a, c, c + count, r.data(), q.data() + c);
      CpuMoments some = all;
      some.r = r.data(), some.m += c * a.rank, some.v += c * a.rank, some.s += c;
      some.channels = count;
      cpu_scale_channels(some);
    }
  });
  return cpu_square_norm(all);
}

double one_minus_power(double beta, int64_t step) {
  return beta > 0 ? -std::expm1(double(step) * std::log(beta)) : 1.0;
}

// lr times Adam's bias correction.
double step_size(const CpuHyper& h, int64_t step) {
  if (!h.correct_bias) return h.lr;
  return h.lr * std::sqrt(one_minus_power(h.beta2, step)) / one_minus_power(h.beta1, step);
}

// reference.py's `limit`: the factor on an update of norm u.
double growth_factor(double u, double previous) {
  return previous < kTiny ? 1.0 : 1.0 / std::max(u / (previous + kTiny) / kNormGrowth, 1.0);
}

void step(const CpuMatrix& a, const CpuHyper& h, double factor, int64_t* counters, int threads) {
  if (a.channels * a.k < (1 << 17)) threads = 1;  // a thread costs microseconds
  if (a.leads) ++*a.step;
  const double alpha = std::sqrt(h.scale);
  const double u = std::sqrt(double(project_and_scale(a, h, float(factor), threads))) *
                   (h.scale_front ? alpha : 1.0);
  if (!std::isfinite(u)) {
    ++counters[2];
    return;
  }
  double growth = 1.0;
  if (!h.disable_nl) {
    growth = growth_factor(u, double(*a.update_norm));
    *a.update_norm = float(u * growth);
  }
  const auto times = float(step_size(h, *a.step) * alpha * growth * factor);
  std::vector<float> coefficient(size_t(h.per_channel ? a.channels : 1));
  for (size_t c = 0; c < coefficient.size(); ++c) coefficient[c] = a.s[c] * times;
  const int64_t outer = a.rows ? a.channels : a.k, inner = a.rows ? a.k : a.channels;
  cpu_apply({a.w, a.x, static_cast<CpuElement>(a.element), outer, inner, a.w_ld, a.x_ld,
             coefficient.data(), h.per_channel, a.rows || !h.per_channel, h.lr * h.weight_decay},
            threads);
  ++counters[0];
  if (growth < 1) ++counters[1];
}

}  // namespace

void cpu_step(const CpuMatrix* matrices, int64_t count, const CpuHyper& hyper, double factor,
              int64_t* counters, int threads) {
  for (int64_t i = 0; i < count; ++i) step(matrices[i], hyper, factor, counters, threads);
}

}  // namespace apollo

#else

namespace apollo {
void cpu_step(const CpuMatrix*, int64_t, const CpuHyper&, double, int64_t*, int) {}
}  // namespace apollo

#endif
