// One step of whole matrices on the CPU: its passes, one matrix after the other, without Python in
// between. A gradient is still in the caches when the weights are updated, and R leaves them only
// where one scale serves all channels.
#pragma once

#include <cstdint>

namespace apollo {

// How z lies (cpu.py's `arrange`), and so which pass projects.
enum class CpuForm : int64_t { kThin = 0, kTiles = 1, kBf16 = 2, kSparse = 3 };

// A matrix as one row of a table of int64. X and W [channels, k] have one memory order: channels
// are rows (ld apart) or columns of k rows (ld apart).
struct CpuMatrix {
  void* w;
  const void* x;
  int64_t element;  // a CpuElement
  int64_t channels, k, w_ld, x_ld, rows;
  float* m;  // moments [channels, rank], in place
  float* v;
  int64_t rank;
  float* update_norm;  // [1]
  int64_t* step;       // [1]; `leads` says who advances what several matrices share
  int64_t leads;
  CpuForm form;
  const void* z;
  int64_t padded;  // of z, as its form has it
  float* s;        // [channels] or [1], written
};

// What one parameter group asks for: batch.py's Hyper.
struct CpuHyper {
  double lr, beta1, beta2, eps, weight_decay, scale;
  bool correct_bias, per_channel, scale_front, disable_nl;
};

// The epoch of the projection at the next step of a matrix: see DESIGN.md, "Random numbers".
inline int64_t cpu_epoch(const CpuMatrix& a, int64_t update_proj_gap) {
  return *a.step / update_proj_gap % (int64_t(1) << 32);
}

// The step of `count` matrices; `factor` multiplies their gradients. counters, [3]: updates,
// limited, not finite.
void cpu_step(const CpuMatrix* matrices, int64_t count, const CpuHyper& hyper, double factor,
              int64_t* counters, int threads);

}  // namespace apollo
