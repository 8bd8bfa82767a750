#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace apollo {
// Adds Hyper and the two plans to a module: of _C, and of the tests' emulated one.
void bind_kernels(pybind11::module_& module);
}  // namespace apollo
