// What decides a kernel's accesses, read from many tensors at once.
#pragma once

#include <pybind11/pybind11.h>

namespace apollo {

void bind_tensor_facts(pybind11::module_& module);

}  // namespace apollo
