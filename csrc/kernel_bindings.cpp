// Kernels for Python: addresses, sizes and the stream come in as integers; apollo_kernels/cuda.py
// has checked dtypes, devices, shapes and strides before.
#include "kernel_bindings.h"

#include <array>
#include <stdexcept>
#include <string>

#include "apollo.h"

namespace py = pybind11;

namespace apollo {
namespace {

void check(int error, const char* what) {
  if (error == 0) return;
  throw std::runtime_error(std::string("CUDA error in ") + what + ": " + error_name(error));
}

// Makes a device current, and the former one again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : wanted_(device) {
    check(current_device(&before_), "cudaGetDevice");
    if (before_ != wanted_) check(use_device(wanted_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (before_ != wanted_) use_device(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0, wanted_;
};

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Hyper make_hyper(uintptr_t lr_tensor, uintptr_t grad_scale, uintptr_t found_inf, uintptr_t counters,
                 double lr, double beta1, double beta2, double eps, double weight_decay,
                 double scale, int64_t update_proj_gap, bool correct_bias, bool maximize,
                 bool tensor_scale, bool scale_front, bool disable_nl, bool rademacher,
                 bool stochastic_rounding) {
  Hyper h{};
  h.lr_tensor = pointer<const float>(lr_tensor);
  h.grad_scale = pointer<const float>(grad_scale);
  h.found_inf = pointer<const float>(found_inf);
  h.counters = pointer<long long>(counters);
  h.lr = lr;
  h.beta1 = beta1;
  h.beta2 = beta2;
  h.weight_decay = weight_decay;
  h.scale = scale;
  h.beta2_float = float(beta2);
  h.keep1 = float(1.0 - beta1);
  h.keep2 = float(1.0 - beta2);
  h.eps = float(eps);
  h.update_proj_gap = update_proj_gap;
  h.correct_bias = correct_bias;
  h.maximize = maximize;
  h.tensor_scale = tensor_scale;
  h.scale_front = scale_front;
  h.disable_nl = disable_nl;
  h.rademacher = rademacher;
  h.stochastic_rounding = stochastic_rounding;
  return h;
}

Launch make_launch(uintptr_t table, int weight_dtype, int grad_dtype, const Hyper& hyper,
                   uintptr_t stream) {
  Launch launch{};
  launch.table = pointer<const void>(table);
  launch.weight_dtype = weight_dtype;
  launch.grad_dtype = grad_dtype;
  launch.hyper = hyper;
  launch.stream = pointer<void>(stream);
  return launch;
}

// The four launches of a group; maps and blocks are of project, scale and apply. `only` picks some
// of them by bits, in this order, for benchmarks.
void step_low_rank(uintptr_t table, std::array<uintptr_t, 3> maps, std::array<int64_t, 3> blocks,
                   int64_t count, uintptr_t workspace, int weight_dtype, int grad_dtype, int rank,
                   const Hyper& hyper, int device, uintptr_t stream, unsigned only) {
  DeviceGuard guard(device);
  Launch launch = make_launch(table, weight_dtype, grad_dtype, hyper, stream);
  launch.workspace = pointer<float>(workspace);
  launch.rank = rank;
  const auto with = [&launch](uintptr_t map, int64_t size) -> const Launch& {
    launch.map = pointer<const int32_t>(map);
    launch.blocks = size;
    return launch;
  };
  if (only & 1) check(project(with(maps[0], blocks[0])), "project");
  if (only & 2) check(scale(with(maps[1], blocks[1])), "scale");
  if (only & 4) check(limit(with(0, count)), "limit");
  if (only & 8) check(apply(with(maps[2], blocks[2])), "apply");
}

void step_dense(uintptr_t table, uintptr_t map, int64_t blocks, int64_t count, uintptr_t flags,
                int weight_dtype, int grad_dtype, const Hyper& hyper, int device,
                uintptr_t stream) {
  DeviceGuard guard(device);
  Launch launch = make_launch(table, weight_dtype, grad_dtype, hyper, stream);
  launch.map = pointer<const int32_t>(map);
  launch.flags = pointer<int32_t>(flags);
  launch.blocks = blocks;
  check(adamw(launch), "adamw");
  launch.blocks = count;
  check(advance(launch), "advance");
}

// Why the driver or the card cannot run the kernels; empty if they can. Loads one of them.
std::string probe_device(int device) {
  try {
    DeviceGuard guard(device);
    check(probe(), "loading a kernel");
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

py::tuple tiling_tuple(int64_t channels, int64_t k, int64_t rank, int64_t group_rank,
                       int grad_dtype, bool by_row) {
  const Tiling t = tiling(channels, k, rank, group_rank, grad_dtype, by_row);
  return py::make_tuple(t.channel_tiles, t.rank_tiles, t.chunks, t.chunk_length, bool(t.fused));
}

}  // namespace

void bind_kernels(py::module_& module) {
  py::class_<Hyper>(module, "Hyper", py::module_local(),
                    "What a parameter group asks for (csrc/apollo.h).")
      .def(py::init(&make_hyper));
  module.def("tiling", &tiling_tuple,
             "(channel tiles, rank tiles, chunks of K, chunk length, fused) of `project`.");
  module.def("probe", &probe_device, "Why a device cannot run the kernels; empty if it can.");
  module.def("step_low_rank", &step_low_rank, py::arg("table"), py::arg("maps"), py::arg("blocks"),
             py::arg("count"), py::arg("workspace"), py::arg("weight_dtype"), py::arg("grad_dtype"),
             py::arg("rank"), py::arg("hyper"), py::arg("device"), py::arg("stream"),
             py::arg("only") = 15u, py::call_guard<py::gil_scoped_release>(),
             "project, scale, limit and apply of one group.");
  module.def("step_dense", &step_dense, py::call_guard<py::gil_scoped_release>(),
             "adamw and advance of one group.");
  module.attr("PARAMETER_FIELDS") = kParameterFields;
  module.attr("DENSE_FIELDS") = kDenseFields;
  module.attr("SCALE_CHANNELS") = kScaleChannels;
  module.attr("APPLY_VECTORS") = kApplyVectors;
}

}  // namespace apollo
