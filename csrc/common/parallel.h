// Loops over torch's threads, and sums in a fixed order. Results do not depend on the number of
// threads, because each item writes only its own memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <stdexcept>

#include "common/host_device.h"

namespace msflow {

using Body = void (*)(int64_t begin, int64_t end, void* context);

// torch_parallel_for of libtorch's stable C interface. If it is null, one thread runs everything.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body, void* context);
inline ParallelFor torch_parallel_for = nullptr;

constexpr int64_t elements_per_task = 16384;

// The tasks of a loop on several threads. They keep the first exception of a body, because none may
// pass through torch's C interface, which would reduce it to an error code.
struct Tasks {
  Body body;
  void* context;
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  static void run(int64_t begin, int64_t end, void* tasks) noexcept {
    auto& t = *static_cast<Tasks*>(tasks);
    if (t.failed) return;
    try {
      t.body(begin, end, t.context);
    } catch (...) {
      if (!t.failed.exchange(true)) t.error = std::current_exception();
    }
  }
};

// Runs body over [0, items). An item handles about `elements` numbers. Throws what a body throws.
template <class Context>
void parallel_for(int64_t items, int64_t elements, Body body, Context& context) {
  if (items <= 0) return;
  const int64_t grain = std::max<int64_t>(1, elements_per_task / std::max<int64_t>(1, elements));
  if (!torch_parallel_for || items <= grain) return body(0, items, &context);
  Tasks tasks{body, &context, {}, {}};
  const int32_t status = torch_parallel_for(0, items, grain, &Tasks::run, &tasks);
  if (tasks.error) std::rethrow_exception(tasks.error);
  if (status != 0) throw std::runtime_error("torch_parallel_for failed: its threads did not start");
}

// Returns uninitialised memory.
template <class T>
std::unique_ptr<T[]> scratch(int64_t size) {
  return std::unique_ptr<T[]>(new T[std::max<int64_t>(1, size)]);
}

constexpr int lanes = 16;

// Adds x[i] to lane[i % lanes]. The order is the same on every machine, and the loop vectorises.
template <class W>
HD void add_to_lanes(const W* x, int64_t size, W (&lane)[lanes]) {
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes)
    for (int l = 0; l < lanes; ++l) lane[l] += x[i + l];
  for (int l = 0; i < size; ++i, ++l) lane[l] += x[i];
}

// Adds halves to each other, so that few additions depend on each other.
template <class W>
HD double sum_lanes(const W (&lane)[lanes]) {
  W sum[lanes / 2];
  for (int l = 0; l < lanes / 2; ++l) sum[l] = lane[l] + lane[l + lanes / 2];
  for (int width = lanes / 4; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) sum[l] += sum[l + width];
  return double(sum[0]);
}

template <class W>
HD double ordered_sum(const W* x, int64_t size) {
  W lane[lanes] = {};
  add_to_lanes(x, size, lane);
  return sum_lanes(lane);
}

}  // namespace msflow
