// The factor 1 - lr wd that is left of a weight, for kernels and for the CPU's passes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "device.h"

namespace apollo {

// keep = 1 - decay as two floats that multiply a weight: a float32 keep would lose a decay of 1e-7.
// The high part lies below keep, so that both have one sign and an infinite weight stays as it is:
// Inf high + Inf low. At keep = 1 that gives back every weight, low being 2^-24; no branch is
// taken.
struct Keep {
  float high, low;

  APOLLO_HOST_DEVICE static Keep after(double decay) {
    const double keep = 1.0 - decay;
    float high = float(keep);
    if (!(keep > 0.0)) return {high, 0.0f};
    if (double(high) >= keep) {  // the float below
      uint32_t bits;
      memcpy(&bits, &high, sizeof bits);
      --bits;
      memcpy(&high, &bits, sizeof high);
    }
    return {high, float(keep - double(high))};
  }
  APOLLO_HOST_DEVICE float times(float w) const { return fmaf(w, high, w * low); }
};

}  // namespace apollo
