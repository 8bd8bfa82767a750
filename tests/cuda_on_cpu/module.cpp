// The kernels' Python module of the tests: csrc/launch.cu over the emulated device.
#include "../../csrc/kernel_bindings.h"

PYBIND11_MODULE(apollo_emulated, module) { apollo::bind_kernels(module); }
