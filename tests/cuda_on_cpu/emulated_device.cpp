// Fibers, barriers and collectives of emulated_device.h.
#include "emulated_device.h"

#include <sys/mman.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATED_ASAN 1
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define EMULATED_TSAN 1
extern "C" {
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#endif
// The machinery itself is no subject of the sanitizers: only kernels are.
#define UNCHECKED __attribute__((no_sanitize_thread, no_sanitize_address, noinline))

#undef threadIdx
#undef blockIdx

namespace emulated {
namespace {

enum Wait { kRuns, kAtBarrier, kInWarp };

struct Block;
struct Fiber : Thread {
  Block* owner = nullptr;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  size_t stack_size = 0;
  bool done = true;
  Wait wait = kRuns;
  Operation operation = kShuffle;
  int source = 0;
  alignas(16) unsigned char in[48], out[16];
  void* fake_stack = nullptr;
  void* tsan = nullptr;
};

// Where threads wait for each other. Who resumes late must not see what the early ones have done
// since, up to their next meeting: so meetings take their tags in turn.
struct Meeting {
  int arrived = 0;
  unsigned turn = 0;
  char tags[2] = {};
};

struct Block {  // what one worker runs
  std::vector<Fiber*> fibers;
  std::vector<Meeting> warps;  // of each warp, in a collective
  std::vector<unsigned char> shared;
  Fiber main;
  const std::function<void()>* body = nullptr;
  unsigned size = 0, live = 0;
  Meeting barrier;
  int barrier_line = 0;
  uint64_t random = 0;
  char start_tag = 0, done_tag = 0;
  std::string error;
};

thread_local Block* current = nullptr;
Fiber* fiber() { return static_cast<Fiber*>(self); }

extern "C" void emulated_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(.text
.globl emulated_switch
.type emulated_switch,@function
emulated_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi); movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret
.size emulated_switch,.-emulated_switch
)");
#else
#error "the emulated device switches stacks on x86-64 only"
#endif

UNCHECKED void go(Fiber& from, Fiber& to) {
  self = &to;
#if defined(EMULATED_ASAN)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_size);
#endif
#if defined(EMULATED_TSAN)
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);  // only barriers order anything
#endif
  emulated_switch(&from.stack_pointer, to.stack_pointer);
#if defined(EMULATED_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

UNCHECKED void rest(Wait why) {
  Fiber* f = fiber();
  f->wait = why;
  go(*f, f->owner->main);
}

UNCHECKED void happens_before(void* tag) {
  (void)tag;
#if defined(EMULATED_TSAN)
  __tsan_release(tag);
#endif
}
UNCHECKED void happens_after(void* tag) {
  (void)tag;
#if defined(EMULATED_TSAN)
  __tsan_acquire(tag);
#endif
}

UNCHECKED void release_barrier(Block& b) {
  b.barrier.arrived = 0;
  ++b.barrier.turn;
  for (unsigned i = 0; i < b.size; ++i) {
    if (!b.fibers[i]->done && b.fibers[i]->wait == kAtBarrier) b.fibers[i]->wait = kRuns;
  }
}

float bf16_value(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

// mma.m16n8k16, from the fragments of the PTX ISA and back.
UNCHECKED void multiply(Fiber** lanes) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    uint16_t ha[8], hb[4];
    float hc[4];
    std::memcpy(ha, lanes[lane]->in, 16);
    std::memcpy(hb, lanes[lane]->in + 16, 8);
    std::memcpy(hc, lanes[lane]->in + 24, 16);
    for (int i = 0; i < 8; ++i) {
      a[g + 8 * (i / 2 % 2)][2 * t + i % 2 + 8 * (i / 4)] = bf16_value(ha[i]);
    }
    for (int i = 0; i < 4; ++i) {
      b[2 * t + i % 2 + 8 * (i / 2)][g] = bf16_value(hb[i]);
      c[g + 8 * (i / 2)][2 * t + i % 2] = hc[i];
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float hc[4];
    for (int i = 0; i < 4; ++i) hc[i] = c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
    std::memcpy(lanes[lane]->out, hc, 16);
  }
}

UNCHECKED void fiber_main() {
  Fiber* f = fiber();
#if defined(EMULATED_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  for (;;) {
    Block& b = *f->owner;
    happens_after(&b.start_tag);
    (*b.body)();
    happens_before(&b.done_tag);
    f->done = true;
    --b.live;
    if (b.live > 0 && unsigned(b.barrier.arrived) == b.live) release_barrier(b);
    go(*f, b.main);
  }
}

UNCHECKED Fiber* make_fiber(Block* owner, unsigned linear) {
  auto* f = new Fiber;
  f->owner = owner;
  f->linear = linear;
  f->stack_size = 256 << 10;
  const size_t guard = 4096;  // a stack that is too deep faults there
  f->stack = static_cast<char*>(mmap(nullptr, f->stack_size + guard, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  mprotect(f->stack, guard, PROT_NONE);
  f->stack += guard;
  void** top = reinterpret_cast<void**>(f->stack + f->stack_size);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f->stack_pointer = top;
#if defined(EMULATED_TSAN)
  f->tsan = __tsan_create_fiber(0);
#endif
  return f;
}

// EMULATED_ORDER: in which order ready fibers run. 0 upward, 1 downward, and blocks as well, more:
// from a random one on.
int order() {
  const char* wanted = std::getenv("EMULATED_ORDER");
  return wanted ? std::atoi(wanted) : 0;
}

UNCHECKED unsigned next_fiber(const Block& b, int order, unsigned turn, unsigned offset) {
  if (order == 0) return turn;
  return order == 1 ? b.size - 1 - turn : (turn + offset) % b.size;
}

UNCHECKED void run_block(Block& b, dim3 at, dim3 shape, int order) {
  b.live = b.size;
  b.barrier.arrived = 0;
  if (!b.shared.empty()) std::memset(b.shared.data(), 0xFF, b.shared.size());  // NaN
  for (Meeting& warp : b.warps) warp.arrived = 0;
  for (unsigned i = 0; i < b.size; ++i) {
    Fiber* f = b.fibers[i];
    f->done = false;
    f->wait = kRuns;
    f->block = at;
    f->thread = dim3(i % shape.x, i / shape.x % shape.y, i / (shape.x * shape.y));
  }
  happens_before(&b.start_tag);
  while (b.live > 0) {
    bool moved = false;
    b.random = b.random * 6364136223846793005u + 1442695040888963407u;
    const auto offset = unsigned((b.random >> 33) % b.size);
    for (unsigned turn = 0; turn < b.size; ++turn) {
      Fiber* f = b.fibers[next_fiber(b, order, turn, offset)];
      if (f->done || f->wait != kRuns) continue;
      moved = true;
      go(b.main, *f);
      if (!b.error.empty()) return;
    }
    if (!moved) {
      unsigned barrier = 0, warp = 0;
      for (unsigned i = 0; i < b.size; ++i) {
        barrier += !b.fibers[i]->done && b.fibers[i]->wait == kAtBarrier;
        warp += !b.fibers[i]->done && b.fibers[i]->wait == kInWarp;
      }
      b.error = "deadlock in block " + std::to_string(at.x) + ": " + std::to_string(barrier) +
                " threads wait at __syncthreads, " + std::to_string(warp) +
                " in a warp's collective, " + std::to_string(b.size - b.live) + " ended";
      return;
    }
  }
  happens_after(&b.done_tag);
  for (unsigned i = 0; i < b.size; ++i) {
    if (!b.fibers[i]->copies.empty()) b.error = "a block ends, and nobody has waited for a copy";
  }
}

UNCHECKED void prepare(Block& b, unsigned size, size_t shared, const std::function<void()>& body) {
  b.body = &body;
  b.size = size;
  b.shared.assign(shared, 0);
  b.error.clear();
  b.warps.resize((size + kWarp - 1) / kWarp);
  while (b.fibers.size() < size) b.fibers.push_back(make_fiber(&b, unsigned(b.fibers.size())));
  b.main.owner = &b;
#if defined(EMULATED_TSAN)
  b.main.tsan = __tsan_get_current_fiber();
#endif
#if defined(EMULATED_ASAN)
  pthread_attr_t attributes;
  void* low;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &low, &b.main.stack_size);
  b.main.stack = static_cast<char*>(low);
  pthread_attr_destroy(&attributes);
#endif
}

}  // namespace

thread_local Thread* self = nullptr;

unsigned char* dynamic_shared() { return current->shared.data(); }

UNCHECKED void block_barrier(int line) {
  Fiber* f = fiber();
  Block& b = *f->owner;
  char* tag = &b.barrier.tags[b.barrier.turn % 2];
  happens_before(tag);
  if (b.barrier.arrived == 0) {
    b.barrier_line = line;
  } else if (line != b.barrier_line) {
    b.error = "threads of a block wait at different __syncthreads: lines " +
              std::to_string(b.barrier_line) + " and " + std::to_string(line);
    rest(kAtBarrier);
  }
  if (unsigned(++b.barrier.arrived) == b.live) {
    release_barrier(b);
  } else {
    rest(kAtBarrier);
  }
  happens_after(tag);
}

UNCHECKED void collective(Operation operation, int source, const void* in, size_t in_size,
                          void* out, size_t out_size) {
  Fiber* f = fiber();
  Block& b = *f->owner;
  const unsigned warp = f->linear / kWarp;
  f->operation = operation;
  f->source = source;
  std::memcpy(f->in, in, in_size);
  Meeting& meeting = b.warps[warp];
  char* tag = &meeting.tags[meeting.turn % 2];
  happens_before(tag);
  if (++meeting.arrived < kWarp) {
    rest(kInWarp);
  } else {
    meeting.arrived = 0;
    ++meeting.turn;
    Fiber** lanes = &b.fibers[warp * kWarp];
    for (int i = 0; i < kWarp; ++i) {
      if (lanes[i]->operation != operation) {
        b.error = "the lanes of a warp meet in different collectives";
        rest(kInWarp);
      }
      lanes[i]->wait = kRuns;
    }
    if (operation == kMultiply) {
      multiply(lanes);
    } else {
      for (int i = 0; i < kWarp; ++i) std::memcpy(lanes[i]->out, lanes[lanes[i]->source]->in, 16);
    }
  }
  happens_after(tag);
  std::memcpy(out, f->out, out_size);
}

std::atomic<int64_t> launches_{0}, watched_bytes_{0};
std::atomic<uintptr_t> watched_begin_{0}, watched_end_{0};

void count_load(const void* from) {
  const auto address = reinterpret_cast<uintptr_t>(from);
  if (address >= watched_begin_ && address < watched_end_) watched_bytes_ += 16;
}
void watch(uintptr_t begin, size_t size) {
  watched_begin_ = begin;
  watched_end_ = begin + size;
  watched_bytes_ = 0;
}
int64_t watched_bytes() { return watched_bytes_; }
int64_t launches() { return launches_; }

// EMULATED_WORKERS: OS threads that run blocks side by side.
void launch(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body) {
  const unsigned size = block.x * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (size == 0 || size > 1024 || size % kWarp != 0 || blocks == 0 || grid.x > 0x7FFFFFFFu ||
      grid.y > 65535 || grid.z > 65535 || shared > 99 * 1024) {
    throw std::runtime_error("invalid launch: a device would refuse it");
  }
  ++launches_;
  const int wanted_order = order();
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  std::string error;
  auto work = [&](bool temporary) {
    static thread_local Block* mine = nullptr;
    if (mine == nullptr) mine = new Block;
    Thread* before = self;
    current = mine;
    prepare(*mine, size, shared, body);
    for (uint64_t turn; !failed && (turn = next.fetch_add(1)) < blocks;) {
      const uint64_t i = wanted_order == 1 ? blocks - 1 - turn : turn;
      const dim3 at(unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
                    unsigned(i / (uint64_t{grid.x} * grid.y)));
      run_block(*mine, at, block, wanted_order);
      if (!mine->error.empty()) {
        if (!failed.exchange(true)) error = mine->error;
        mine->fibers.clear();  // they wait for ever
      }
    }
    self = before;
    if (temporary) {
      for (Fiber* f : mine->fibers) {
        munmap(f->stack - 4096, f->stack_size + 4096);
        delete f;
      }
      delete mine;
      mine = nullptr;
    }
  };
#if defined(EMULATED_STATIC_SHARED)
  const int workers = 1;
#else
  const char* wanted = std::getenv("EMULATED_WORKERS");
  const int workers = wanted ? std::atoi(wanted) : 1;
#endif
  if (workers <= 1) {
    work(false);
  } else {
    std::vector<std::thread> threads;
    for (int i = 0; i < workers; ++i) threads.emplace_back(work, true);
    for (auto& thread : threads) thread.join();
  }
  if (failed) throw std::runtime_error("emulated kernel: " + error);
}

}  // namespace emulated
