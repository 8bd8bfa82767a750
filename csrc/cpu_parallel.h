// Work on several threads for the CPU's passes.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// PyTorch's own OpenMP threads, where PyTorch has loaded them: they spin between its operators, and
// threads of ours would have to share their cores. Weak, so that nothing is linked for it.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);

namespace apollo {

// Calls work(begin, end) for parts of [0, size), each a multiple of `grain` but the last.
template <class Work>
void parallel(int64_t size, int64_t grain, int threads, const Work& work) {
  const int64_t grains = (size + grain - 1) / grain;
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>(threads, grains));
  const int64_t part = (grains + count - 1) / count * grain;
  std::atomic<int64_t> next{0};
  auto drain = [&] {
    for (int64_t begin; (begin = next.fetch_add(part)) < size;) {
      work(begin, std::min(size, begin + part));
    }
  };
  if (count == 1) {
    drain();
  } else if (GOMP_parallel != nullptr) {
    auto call = [](void* self) { (*static_cast<decltype(drain)*>(self))(); };
    GOMP_parallel(call, &drain, unsigned(count), 0);
  } else {
    std::vector<std::thread> others;
    for (int64_t i = 1; i < count; ++i) others.emplace_back(drain);
    drain();
    for (auto& other : others) other.join();
  }
}

}  // namespace apollo
