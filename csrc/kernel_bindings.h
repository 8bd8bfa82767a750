#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace apollo {
// Adds Hyper, tiling, step_low_rank and step_dense to a module: of _C, and of the tests' emulated
// one.
void bind_kernels(pybind11::module_& module);
}  // namespace apollo
