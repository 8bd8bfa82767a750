// The kernels' Python module over the interpreter: csrc's plans and launches as they are.
#include "../../csrc/kernel_bindings.h"

PYBIND11_MODULE(apollo_ptx, module) { apollo::bind_kernels(module); }
