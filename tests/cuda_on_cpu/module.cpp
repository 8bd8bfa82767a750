// The kernels' Python module of the tests: csrc/launch.cu over the emulated device.
#include "../../csrc/kernel_bindings.h"
#include "emulated_device.h"

PYBIND11_MODULE(apollo_emulated, module) {
  apollo::bind_kernels(module);
  module.def("launches", &emulated::launches, "Launches since the module was loaded.");
  module.def("watch", &emulated::watch, pybind11::arg("address"), pybind11::arg("size"),
             "Counts from now on the bytes that 16-byte loads read from there.");
  module.def("watched_bytes", &emulated::watched_bytes);
}
