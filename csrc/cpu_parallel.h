// Work on several threads for the CPU's passes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

// PyTorch's own OpenMP threads, where PyTorch has loaded them: they spin between its operators, and
// threads of ours would have to share their cores. Weak, so that nothing is linked for it.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
extern "C" __attribute__((weak)) int omp_get_thread_num();
extern "C" __attribute__((weak)) int omp_get_num_threads();

namespace apollo {

// Calls work(begin, end) for parts of [0, size), each a multiple of `grain` but the last. A part has
// the same place in every call of that size, so that a thread finds in its caches what it had there.
template <class Work>
void parallel(int64_t size, int64_t grain, int threads, const Work& work) {
  const int64_t grains = (size + grain - 1) / grain;
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>(threads, grains));
  const int64_t part = (grains + count - 1) / count * grain;
  auto some = [&](int64_t first, int64_t step) {  // every step-th part, fewer threads may come
    for (int64_t begin = first * part; begin < size; begin += step * part) {
      work(begin, std::min(size, begin + part));
    }
  };
  if (count == 1) {
    some(0, 1);
  } else if (GOMP_parallel != nullptr) {
    auto call = [](void* self) {
      (*static_cast<decltype(some)*>(self))(omp_get_thread_num(), omp_get_num_threads());
    };
    GOMP_parallel(call, &some, unsigned(count), 0);
  } else {
    std::vector<std::thread> others;
    for (int64_t i = 1; i < count; ++i) others.emplace_back(some, i, count);
    some(0, count);
    for (auto& other : others) other.join();
  }
}

}  // namespace apollo
