// The border between Python and native code: pointers and sizes come in as integers, checked there.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "cpu_bf16.h"
#include "cpu_sparse.h"
#include "kernel_bindings.h"
#include "philox.cuh"
#include "tensor_facts.h"

namespace py = pybind11;

namespace {

py::object text_or_none(const char* text) {
  if (*text == '\0') return py::none();
  return py::str(text);
}

py::dict build_info() {
  py::dict info;
  info["version"] = APOLLO_VERSION;
  info["compiler"] = APOLLO_COMPILER;
  info["cpp_standard"] = static_cast<long>(__cplusplus);
  info["build_type"] = APOLLO_BUILD_TYPE;
  info["cuda"] = *APOLLO_CUDA_TOOLKIT != '\0';
  info["cuda_toolkit"] = text_or_none(APOLLO_CUDA_TOOLKIT);
  info["cuda_architectures"] = APOLLO_CUDA_ARCHITECTURES;
  info["cuda_missing"] = text_or_none(APOLLO_CUDA_MISSING);
  return info;
}

std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key,
                                   int rounds) {
  apollo::Words words{{counter[0], counter[1], counter[2], counter[3]}};
  words = apollo::philox4x32(words, key[0], key[1], rounds);
  return {words.w[0], words.w[1], words.w[2], words.w[3]};
}

void draw(uintptr_t out, uint64_t key, uint32_t epoch, int64_t rank, int64_t dim, int64_t start,
          int distribution) {
  const auto kind = static_cast<apollo::Distribution>(distribution);
  apollo::draw(reinterpret_cast<uint16_t*>(out), key, epoch, rank, dim, start, kind);
}

void sparse(uintptr_t row, uintptr_t sign, uint64_t key, uint32_t epoch, int64_t rank, int64_t dim,
            int64_t start) {
  apollo::sparse(reinterpret_cast<int64_t*>(row), reinterpret_cast<int8_t*>(sign), key, epoch, rank,
                 dim, start);
}

void cpu_project(uintptr_t x, int64_t channels, int64_t k, int64_t ld, bool rows, uintptr_t z,
                 int64_t rank, int64_t padded, float scale, uintptr_t r, uintptr_t q, int threads) {
  apollo::cpu_project({reinterpret_cast<const uint16_t*>(x), channels, k, ld, rows,
                       reinterpret_cast<const uint16_t*>(z), rank, padded, scale,
                       reinterpret_cast<float*>(r), reinterpret_cast<float*>(q)},
                      threads);
}

void cpu_project_sparse(uintptr_t x, int element, int64_t channels, int64_t k, int64_t ld,
                        bool rows, uintptr_t places, int64_t rank, uintptr_t r, uintptr_t q,
                        int threads) {
  apollo::cpu_project_sparse(
      {reinterpret_cast<const void*>(x), static_cast<apollo::CpuElement>(element), channels, k, ld,
       rows, reinterpret_cast<const uint32_t*>(places), rank, reinterpret_cast<float*>(r),
       reinterpret_cast<float*>(q)},
      threads);
}

void cpu_apply(uintptr_t w, uintptr_t x, int64_t outer, int64_t inner, int64_t w_ld, int64_t x_ld,
               uintptr_t coefficient, bool by_row, double decay, int threads) {
  apollo::cpu_apply({reinterpret_cast<uint16_t*>(w), reinterpret_cast<const uint16_t*>(x), outer,
                     inner, w_ld, x_ld, reinterpret_cast<const float*>(coefficient), by_row, decay},
                    threads);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native part of apollo_kernels: links neither libtorch nor a CUDA library.";
  module.def("build_info", &build_info, "How this module was built, as a dict.");
  module.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"),
             py::arg("rounds") = apollo::kRounds, "The four words of a counter under a key.");
  module.def("draw", &draw, py::arg("out"), py::arg("key"), py::arg("epoch"), py::arg("rank"),
             py::arg("dim"), py::arg("start"), py::arg("distribution"),
             py::call_guard<py::gil_scoped_release>(),
             "Writes z [rank, dim] (bf16 bits, row-major) for k from start to the address out; "
             "distribution 0 is gaussian, 1 rademacher.");
  module.def("sparse", &sparse, py::arg("row"), py::arg("sign"), py::arg("key"), py::arg("epoch"),
             py::arg("rank"), py::arg("dim"), py::arg("start"),
             py::call_guard<py::gil_scoped_release>(),
             "Writes the row (int64) and the sign (int8) of each column of the sparse projection.");
  module.def("cpu_bf16_supported", &apollo::cpu_bf16_supported,
             "Whether this processor can run cpu_project and cpu_apply.");
  module.def("cpu_project", &cpu_project, py::call_guard<py::gil_scoped_release>(),
             "R and q of a bf16 matrix; the arguments are CpuProject's (cpu_bf16.h).");
  module.def("cpu_apply", &cpu_apply, py::call_guard<py::gil_scoped_release>(),
             "The update of a bf16 matrix; the arguments are CpuApply's (cpu_bf16.h).");
  module.def("cpu_sparse_supported", &apollo::cpu_sparse_supported,
             "Whether this processor can run cpu_project_sparse.");
  module.def("cpu_project_sparse", &cpu_project_sparse, py::call_guard<py::gil_scoped_release>(),
             "R and q by the sparse projection; the arguments are CpuSparse's (cpu_sparse.h).");
  apollo::bind_tensor_facts(module);
#if APOLLO_HAS_KERNELS
  apollo::bind_kernels(module);
#endif
}
