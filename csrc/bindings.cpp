// The border between Python and native code: pointers and sizes come in as integers, checked there.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_bf16.h"
#include "cpu_moments.h"
#include "cpu_sparse.h"
#include "cpu_step.h"
#include "cpu_stream.h"
#include "cpu_tiles.h"
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

const void* at(uintptr_t address) { return reinterpret_cast<const void*>(address); }
float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }
const uint16_t* halves(uintptr_t address) { return reinterpret_cast<const uint16_t*>(address); }

void cpu_project_thin(uintptr_t x, int element, int64_t channels, int64_t k, int64_t ld, bool rows,
                      uintptr_t z, int64_t rank, float scale, uintptr_t r, uintptr_t q,
                      int threads) {
  if (rank > apollo::kThinRank) throw std::invalid_argument("cpu_project_thin: rank beyond 7");
  apollo::cpu_project_thin({at(x), static_cast<apollo::CpuElement>(element), channels, k, ld, rows,
                            halves(z), rank, scale, floats(r), floats(q)},
                           threads);
}

void cpu_project_tiles(uintptr_t x, int element, int64_t channels, int64_t k, int64_t ld, bool rows,
                       uintptr_t z, int64_t rank, int64_t padded, float scale, uintptr_t r,
                       uintptr_t q, int threads) {
  apollo::cpu_project_tiles({at(x), static_cast<apollo::CpuElement>(element), channels, k, ld, rows,
                             halves(z), rank, padded, scale, floats(r), floats(q)},
                            threads);
}

void cpu_project_bf16(uintptr_t x, int64_t channels, int64_t k, int64_t ld, bool rows, uintptr_t z,
                      int64_t rank, int64_t padded, float scale, uintptr_t r, uintptr_t q,
                      int threads) {
  apollo::cpu_project_bf16(
      {halves(x), channels, k, ld, rows, halves(z), rank, padded, scale, floats(r), floats(q)},
      threads);
}

void cpu_project_sparse(uintptr_t x, int element, int64_t channels, int64_t k, int64_t ld,
                        bool rows, uintptr_t places, int64_t rank, uintptr_t r, uintptr_t q,
                        int threads) {
  apollo::cpu_project_sparse(
      {at(x), static_cast<apollo::CpuElement>(element), channels, k, ld, rows,
       reinterpret_cast<const uint32_t*>(places), rank, floats(r), floats(q)},
      threads);
}

float cpu_scale(uintptr_t r, uintptr_t q, uintptr_t m, uintptr_t v, int64_t channels, int64_t rank,
                double beta1, double beta2, double eps, float factor, bool per_channel, uintptr_t s,
                int threads) {
  return apollo::cpu_scale({floats(r), floats(q), floats(m), floats(v), channels, rank, beta1,
                            beta2, eps, factor, per_channel, floats(s)},
                           threads);
}

void cpu_apply(uintptr_t w, uintptr_t x, int element, int64_t outer, int64_t inner, int64_t w_ld,
               int64_t x_ld, uintptr_t coefficient, int64_t apart, bool by_row, double decay,
               int threads) {
  apollo::cpu_apply({reinterpret_cast<void*>(w), at(x), static_cast<apollo::CpuElement>(element),
                     outer, inner, w_ld, x_ld, floats(coefficient), apart, by_row, decay},
                    threads);
}

std::vector<int64_t> cpu_epochs(uintptr_t matrices, int64_t count, int64_t update_proj_gap) {
  const auto* a = reinterpret_cast<const apollo::CpuMatrix*>(matrices);
  std::vector<int64_t> epochs;
  for (int64_t i = 0; i < count; ++i) epochs.push_back(apollo::cpu_epoch(a[i], update_proj_gap));
  return epochs;
}

void cpu_step(uintptr_t matrices, int64_t count, double lr, double beta1, double beta2, double eps,
              double weight_decay, double scale, bool correct_bias, bool per_channel,
              bool scale_front, bool disable_nl, double factor, uintptr_t counters, int threads) {
  apollo::cpu_step(reinterpret_cast<const apollo::CpuMatrix*>(matrices), count,
                   {lr, beta1, beta2, eps, weight_decay, scale, correct_bias, per_channel,
                    scale_front, disable_nl},
                   factor, reinterpret_cast<int64_t*>(counters), threads);
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
  const py::call_guard<py::gil_scoped_release> free;
  module.def("cpu_supported", &apollo::cpu_supported,
             "Whether this processor can run the CPU's passes: it has AVX512.");
  module.def("cpu_tiles_supported", &apollo::cpu_tiles_supported,
             "Whether it can run cpu_project_tiles: it has AMX, and this process may use it.");
  module.def("cpu_bf16_supported", &apollo::cpu_bf16_supported,
             "Whether it can run cpu_project_bf16: it has AVX512-BF16.");
  module.def("cpu_project_thin", &cpu_project_thin, free,
             "R and q for a low rank; the arguments are CpuThin's (cpu_stream.h).");
  module.def("cpu_project_tiles", &cpu_project_tiles, free,
             "R and q; the arguments are CpuTiles' (cpu_tiles.h).");
  module.def("cpu_project_bf16", &cpu_project_bf16, free,
             "R and q of a bf16 matrix; the arguments are CpuBf16's (cpu_bf16.h).");
  module.def("cpu_project_sparse", &cpu_project_sparse, free,
             "R and q by the sparse projection; the arguments are CpuSparse's (cpu_sparse.h).");
  module.def("cpu_scale", &cpu_scale, free,
             "The moments and the scales, and returns u^2; CpuMoments (cpu_moments.h).");
  module.def("cpu_apply", &cpu_apply, free,
             "The update of a matrix; the arguments are CpuApply's (cpu_stream.h).");
  module.attr("CPU_MATRIX_BYTES") = sizeof(apollo::CpuMatrix);
  module.def("cpu_epochs", &cpu_epochs,
             "The epoch of each matrix's projection at its next step (cpu_step.h).");
  module.def("cpu_step", &cpu_step, free,
             "The step of several matrices: a table of CpuMatrix, then CpuHyper (cpu_step.h).");
  apollo::bind_tensor_facts(module);
#if APOLLO_HAS_KERNELS
  apollo::bind_kernels(module);
#endif
}
