// Plans for Python, by keyword: addresses, sizes and the stream come in as integers, the rest under
// the names of apollo.h. apollo_kernels/cuda.py has checked dtypes, devices and strides before.
#include "kernel_bindings.h"

#include <stdexcept>
#include <string>

#include "plan.h"

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

Hyper make_hyper(uintptr_t counters, double lr, double beta1, double beta2, double eps,
                 double weight_decay, bool correct_bias, bool maximize, double scale,
                 int64_t update_proj_gap, int distribution, bool tensor_scale, bool scale_front,
                 bool disable_nl, bool stochastic_rounding, uintptr_t lr_tensor,
                 uintptr_t grad_scale, uintptr_t found_inf, uintptr_t clip) {
  Hyper h{};
  h.lr_tensor = pointer<const float>(lr_tensor);
  h.grad_scale = pointer<const float>(grad_scale);
  h.found_inf = pointer<const float>(found_inf);
  h.clip = pointer<const float>(clip);
  h.counters = pointer<long long>(counters);
  h.lr = lr;
  h.beta1 = beta1;
  h.beta2 = beta2;
  h.weight_decay = weight_decay;
  h.scale = scale;
  h.beta1_float = float(beta1);
  h.beta2_float = float(beta2);
  h.keep1 = float(1.0 - beta1);
  h.keep2 = float(1.0 - beta2);
  h.eps = float(eps);
  h.update_proj_gap = update_proj_gap;
  h.distribution = distribution;
  h.correct_bias = correct_bias;
  h.maximize = maximize;
  h.tensor_scale = tensor_scale;
  h.scale_front = scale_front;
  h.disable_nl = disable_nl;
  h.stochastic_rounding = stochastic_rounding;
  return h;
}

// A plan and the device that it was placed on.
template <class Plan>
struct Placed : Plan {
  using Plan::Plan;
  int device = -1;  // none yet

  void put(uintptr_t table, uintptr_t maps, uintptr_t workspace, int on_device) {
    this->place(
        {pointer<const void>(table), pointer<const int32_t>(maps), pointer<void>(workspace)});
    if (device == on_device) return;
    DeviceGuard guard(on_device);
    check(this->load(), "loading the kernels");
    device = on_device;
  }
};
using PlacedLowRank = Placed<LowRankPlan>;
using PlacedDense = Placed<DensePlan>;

void add_matrix(PlacedLowRank& plan, uintptr_t weight, uintptr_t grad, uintptr_t exp_avg,
                uintptr_t exp_avg_sq, uintptr_t update_norm, uintptr_t step, uint64_t key,
                int64_t channels, int64_t k, int64_t rank, int64_t weight_ld, int64_t grad_ld,
                bool by_row, bool row_major, bool leads, uintptr_t grid) {
  Matrix m{};
  m.weight = pointer<void>(weight);
  m.grid = pointer<int32_t>(grid);
  m.grad = pointer<const void>(grad);
  m.exp_avg = pointer<float>(exp_avg);
  m.exp_avg_sq = pointer<float>(exp_avg_sq);
  m.update_norm = pointer<float>(update_norm);
  m.step = pointer<int64_t>(step);
  m.key = key;
  m.channels = channels;
  m.k = k;
  m.rank = rank;
  m.weight_ld = weight_ld;
  m.grad_ld = grad_ld;
  m.flags = kByRow * by_row | kRowMajor * row_major | kLeads * leads;
  plan.add(m);
}

void add_dense(PlacedDense& plan, uintptr_t weight, uintptr_t grad, uintptr_t exp_avg,
               uintptr_t exp_avg_sq, uintptr_t step, int64_t count, uintptr_t grid, uint64_t key,
               int64_t columns, uintptr_t exp_avg_unit, uintptr_t exp_avg_sq_unit) {
  DenseRow row{};
  row.weight = pointer<void>(weight);
  row.grid = pointer<int32_t>(grid);
  row.key = key;
  row.columns = columns;
  row.grad = pointer<const void>(grad);
  row.exp_avg = pointer<void>(exp_avg);
  row.exp_avg_sq = pointer<void>(exp_avg_sq);
  row.exp_avg_unit = pointer<float>(exp_avg_unit);
  row.exp_avg_sq_unit = pointer<float>(exp_avg_sq_unit);
  row.step = pointer<int64_t>(step);
  row.count = count;
  plan.add(row);
}

// A verb of a plan as Python's method (hyper, stream).
template <class Plan, class Base>
auto verb(int (Base::*call)(const Hyper&, void*) const, const char* name) {
  return [call, name](const Plan& plan, const Hyper& hyper, uintptr_t stream) {
    DeviceGuard guard(plan.device);
    check((plan.*call)(hyper, pointer<void>(stream)), name);
  };
}

// What both plans have.
template <class Plan, class Class>
void define_common(Class& plan) {
  plan.def_property_readonly("size", &Plan::size, "Parameters.")
      .def_property_readonly("table_words", &Plan::table_words, "int64 of the table.")
      .def_property_readonly("map_size", &Plan::map_size, "int32 of all maps.")
      .def_property_readonly("workspace_floats", &Plan::workspace_floats,
                             "float32 of the workspace, which has to be zero at first.")
      .def("set_gradients", &Plan::set_gradients, py::arg("addresses"),
           "Gradients that have moved; the table has to be written again.")
      .def("write_table", [](const Plan& p, uintptr_t to) { p.write_table(pointer<void>(to)); })
      .def("write_maps", [](const Plan& p, uintptr_t to) { p.write_maps(pointer<int32_t>(to)); })
      .def("place", &Plan::put, py::kw_only(), py::arg("table"), py::arg("maps"),
           py::arg("workspace"), py::arg("device"),
           "Where table, maps and workspace lie on the device; loads the kernels there.");
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

py::tuple tiling_tuple(int64_t channels, int64_t k, int64_t rank, int grad_dtype, bool by_row,
                       bool sparse) {
  const Tiling t = tiling(channels, k, rank, grad_dtype, by_row, sparse);
  return py::make_tuple(t.channel_tiles, t.rank_tiles, t.chunks, t.chunk_length);
}

}  // namespace

void bind_kernels(py::module_& module) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<Hyper>(module, "Hyper", py::module_local(),
                    "What a parameter group asks for (csrc/apollo.h).")
      .def(py::init(&make_hyper), py::kw_only(), py::arg("counters"), py::arg("lr"),
           py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
           py::arg("correct_bias"), py::arg("maximize"), py::arg("scale"),
           py::arg("update_proj_gap"), py::arg("distribution"), py::arg("tensor_scale"),
           py::arg("scale_front"), py::arg("disable_nl"), py::arg("stochastic_rounding"),
           py::arg("lr_tensor") = 0, py::arg("grad_scale") = 0, py::arg("found_inf") = 0,
           py::arg("clip") = 0);

  py::class_<PlacedLowRank> low_rank(module, "LowRankPlan", py::module_local(),
                                     "Low-rank matrices of one family (csrc/plan.h).");
  low_rank
      .def(py::init<int, int, bool>(), py::kw_only(), py::arg("weight_dtype"),
           py::arg("grad_dtype"), py::arg("separate"))
      .def("add", &add_matrix, py::kw_only(), py::arg("weight"), py::arg("grad"),
           py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("update_norm"), py::arg("step"),
           py::arg("key"), py::arg("channels"), py::arg("k"), py::arg("rank"), py::arg("weight_ld"),
           py::arg("grad_ld"), py::arg("by_row"), py::arg("row_major"), py::arg("leads"),
           py::arg("grid") = 0)
      .def(
          "q",
          [](const PlacedLowRank& p, int distribution) {
            return py::make_tuple(p.q_begin(), p.q_end(distribution));
          },
          py::arg("distribution"), "Begin and end of all squared channel norms in the workspace.")
      .def(
          "s",
          [](const PlacedLowRank& p, size_t matrix) {
            return py::make_tuple(p.s_begin(matrix), p.s_end(matrix));
          },
          py::arg("matrix"), "Begin and end of a matrix's scales in the workspace.")
      .def("project", verb<PlacedLowRank>(&LowRankPlan::project, "project"), unlocked)
      .def("scale", verb<PlacedLowRank>(&LowRankPlan::scale, "scale"), unlocked)
      .def("apply", verb<PlacedLowRank>(&LowRankPlan::apply, "apply"), unlocked);
  define_common<PlacedLowRank>(low_rank);

  py::class_<PlacedDense> dense(module, "DensePlan", py::module_local(),
                                "Dense parameters of one family (csrc/plan.h).");
  dense
      .def(py::init<int, int, int>(), py::kw_only(), py::arg("weight_dtype"), py::arg("grad_dtype"),
           py::arg("moments_dtype"))
      .def("add", &add_dense, py::kw_only(), py::arg("weight"), py::arg("grad"), py::arg("exp_avg"),
           py::arg("exp_avg_sq"), py::arg("step"), py::arg("count"), py::arg("grid") = 0,
           py::arg("key") = 0, py::arg("columns") = 0, py::arg("exp_avg_unit") = 0,
           py::arg("exp_avg_sq_unit") = 0)
      .def("adamw", verb<PlacedDense>(&DensePlan::adamw, "adamw"), unlocked);
  define_common<PlacedDense>(dense);

  module.def(
      "rank_class", [](int64_t rank) { return int(rank_class(rank)); },
      "Matrices of one plan are of one class.");
  module.def("tiling", &tiling_tuple, py::kw_only(), py::arg("channels"), py::arg("k"),
             py::arg("rank"), py::arg("grad_dtype"), py::arg("by_row"), py::arg("sparse") = false,
             "(channel tiles, rank tiles, chunks of K, chunk length) of `project`.");
  module.attr("NORM_GROWTH") = kNormGrowth;
  module.attr("TINY") = kTiny;
  module.def("probe", &probe_device, "Why a device cannot run the kernels; empty if it can.");
}

}  // namespace apollo
