// Emulates CUDA in one CPU thread, so that tests and sanitizers check indexing and reductions
// without a GPU. Kernels run unmodified, each thread as a fiber. It does not show races.
//
// Threads run one after the other until each waits at a barrier or a shuffle. Their order is set by
// MSFLOW_EXT_EMULATED_ORDER: forward, reverse or shuffled. If not all threads reach a barrier or
// shuffle, the process aborts with a message.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorNotSupported };
using cudaStream_t = void*;
struct cudaFuncAttributes {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorNotSupported ? "emulated kernels serve the CPU"
                                        : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return cudaErrorNotSupported;
}

namespace emulator {

constexpr unsigned warp = 32, max_threads = 1024, stack_bytes = 128 * 1024;
constexpr size_t max_shared = 48 * 1024;
enum class State { ready, at_barrier, at_shuffle, done };

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  std::unique_ptr<unsigned char[]> stack;
  State state = State::done;
  uint64_t slot[2] = {};  // values it gives its warp, in this shuffle and the previous one
  unsigned shuffles = 0;
  void* fake_stack = nullptr;
};

inline Fiber scheduler;
inline std::vector<Fiber> fibers;
inline Fiber* current = nullptr;
inline std::function<void()> kernel;
inline std::vector<unsigned char> shared;  // the block's dynamic shared memory
inline const void* main_stack = nullptr;
inline size_t main_stack_bytes = 0;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda emulator: %s (block %u)\n", what, blockIdx.x);
  std::abort();
}

#if defined(__x86_64__)
__attribute__((naked, noinline)) inline void swap_stacks(void**, void*) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

inline void switch_to(Fiber& from, Fiber& to) {
  current = &to;
#if defined(__SANITIZE_ADDRESS__)
  const bool home = &to == &scheduler;
  __sanitizer_start_switch_fiber(&from.fake_stack, home ? main_stack : to.stack.get(),
                                 home ? main_stack_bytes : stack_bytes);
#endif
#if defined(__x86_64__)
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(from.fake_stack, &bottom, &size);
  if (&from != &scheduler) main_stack = bottom, main_stack_bytes = size;
#endif
}

// The main function of a fiber: runs the kernel, once per block.
inline void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes);
#endif
  for (;;) {
    kernel();
    Fiber& self = *current;
    self.state = State::done;
    switch_to(self, scheduler);
  }
}

inline void make(Fiber& fiber) {
  fiber.stack.reset(new unsigned char[stack_bytes]);
#if defined(__x86_64__)
  auto* top = reinterpret_cast<void**>(fiber.stack.get() + stack_bytes - 64) + 1;
  *top = nullptr;  // return address of run_fiber(), 8 beyond a multiple of 16
  *--top = reinterpret_cast<void*>(&run_fiber);  // return address of the first switch
  fiber.stack_pointer = top - 6;                 // six registers
  std::memset(fiber.stack_pointer, 0, 6 * sizeof(void*));
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = stack_bytes;
  makecontext(&fiber.context, &run_fiber, 0);
#endif
}

inline void wait(State at) {
  Fiber& self = *current;
  self.state = at;
  switch_to(self, scheduler);
}

// Releases each warp whose 32 lanes all wait at a shuffle, or the block if all wait at the barrier.
inline void release(unsigned size) {
  bool any = false;
  const auto all = [&](unsigned begin, unsigned end, State state) {
    return std::all_of(&fibers[begin], &fibers[0] + end,
                       [state](const Fiber& f) { return f.state == state; });
  };
  const auto free = [&](unsigned begin, unsigned end) {
    for (unsigned t = begin; t < end; ++t) fibers[t].state = State::ready;
    any = true;
  };
  for (unsigned w = 0; w < size; w += warp)
    if (all(w, std::min(w + warp, size), State::at_shuffle)) free(w, std::min(w + warp, size));
  if (any) return;
  if (all(0, size, State::at_barrier)) return free(0, size);
  fail("threads wait for others that do not come");
}

inline void run_block(const std::vector<unsigned>& order) {
  std::fill(shared.begin(), shared.end(), 0xff);  // NaN, so that tests see reads before writes
  const auto size = unsigned(order.size());
  for (unsigned t = 0; t < size; ++t) fibers[t].state = State::ready;
  for (;;) {
    for (unsigned t : order) {
      if (fibers[t].state != State::ready) continue;
      threadIdx = {t, 0, 0};
      switch_to(scheduler, fibers[t]);
    }
    if (std::all_of(&fibers[0], &fibers[0] + size,
                    [](const Fiber& f) { return f.state == State::done; }))
      return;
    release(size);
  }
}

inline void run(unsigned blocks, unsigned size) {
  fibers.reserve(max_threads);
  while (fibers.size() < max_threads) make(fibers.emplace_back());
  std::vector<unsigned> order(size);
  std::iota(order.begin(), order.end(), 0u);
  const char* name = std::getenv("MSFLOW_EXT_EMULATED_ORDER");
  const std::string schedule = name ? name : "forward";
  std::mt19937 random(0);
  if (schedule == "reverse") std::reverse(order.begin(), order.end());
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx = {schedule == "reverse" ? blocks - 1 - b : b, 0, 0};
    if (schedule == "shuffled") std::shuffle(order.begin(), order.end(), random);
    run_block(order);
  }
}

inline void* shared_memory() { return shared.data(); }

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::at_barrier); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  using namespace emulator;
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) fail("a shuffle of less than a warp");
  const unsigned turn = current->shuffles++ % 2;
  std::memcpy(&fibers[threadIdx.x].slot[turn], &value, sizeof value);
  wait(State::at_shuffle);
  std::memcpy(&value, &fibers[threadIdx.x ^ unsigned(offset)].slot[turn], sizeof value);
  return value;
}

template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

// Number of launches. Tests look it up by this name.
extern "C" {
__attribute__((visibility("default"))) inline uint64_t emulated_launches = 0;
}

#ifdef MSFLOW_EXT_PTX
#include "launch.h"  // tests/ptx
#endif

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "more than a kernel's parameters may take");
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y * grid.z != 1 || block.x == 0 ||
      block.x > emulator::max_threads || block.x % emulator::warp || block.y * block.z != 1 ||
      config->dynamicSmemBytes > emulator::max_shared)
    return cudaErrorInvalidConfiguration;
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  gridDim = grid, blockDim = block;
#ifdef MSFLOW_EXT_PTX
  ptx::run(kernel, grid.x, block.x, config->dynamicSmemBytes, Parameters(arguments)...);
#else
  emulator::shared.assign(config->dynamicSmemBytes, 0xff);
  emulator::kernel = [&] { kernel(Parameters(arguments)...); };
  emulator::run(grid.x, block.x);
#endif
  ++emulated_launches;
  return cudaSuccess;
}
