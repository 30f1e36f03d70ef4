// A coupling call on the CPU: its operands, how they are split into items, how log_det is summed.
#pragma once

#include <cmath>
#include <stdexcept>
#include <vector>

#include "common/half.h"
#include "common/parallel.h"
#include "coupling/coupling.h"

namespace msflow {
namespace {

// Most positions of an item that holds all channels of its positions.
constexpr int64_t max_block_positions = 64;

// Operands of all directions. Each direction uses some of them.
template <class W>
struct Job : Coupling {
  Tensor x1, x2, a, y1, y2;          // y1, y2: results, or their gradients in the backward
  Tensor copy;                       // y1 in the subnet's dtype, or its gradient; may be null
  Tensor grad_x1, grad_x2, grad_a;   // backward
  Clamp<W> k;                        // the soft clamp's constants
  std::vector<W> gain, shift;        // scale and offset, or 1 and 0 if they are null
  std::vector<int32_t> source;       // result k is computed from channel source[k]
  std::vector<int32_t> destination;  // channel c gives result destination[c]
  const W* grad_log_det = nullptr;   // (N,)
  W* likelihoods = nullptr;          // (N, P)
  std::unique_ptr<double[]> log_det_parts;  // (items,)
  std::unique_ptr<W[]> grad_parts;  // (items, 2, C) if channels_last, (N, 2, C) if contiguous
  bool by_position;                 // an item is all channels of some positions, not one channel

  explicit Job(const Coupling& c)
      : Coupling(c),
        k(make_clamp<W>(c.form, c.clamp)),
        gain(allocated_channels(), W(1)),
        shift(allocated_channels(), W(0)),
        source(allocated_channels()),
        destination(allocated_channels()),
        by_position(c.channels_last) {
    const int64_t size = allocated_channels();
    if (scale) gain.assign(static_cast<const W*>(scale), static_cast<const W*>(scale) + size);
    if (offset) shift.assign(static_cast<const W*>(offset), static_cast<const W*>(offset) + size);
    std::vector<bool> seen(size);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t from = perm ? perm[i] : i;
      if (from < 0 || from >= size || seen[from])
        throw std::invalid_argument("coupling: perm must hold every channel once, but does not");
      seen[from] = true;
      source[i] = int32_t(from);
      destination[from] = int32_t(i);
    }
  }

  // Length of the per-channel tables. An empty tensor may claim any number of channels, which must
  // not cost memory.
  int64_t allocated_channels() const {
    return (samples && positions) || scale || offset || perm ? channels() : 0;
  }

  // Positions of an item that holds all channels. In channels_last they are few enough for the
  // cache. The number does not depend on the batch size or the number of threads.
  int64_t block() const {
    if (!channels_last) return max_block_positions;
    const int64_t fitting = 16384 / std::max<int64_t>(1, channels());
    return std::min(max_block_positions, std::max<int64_t>(1, fitting));
  }
  int64_t blocks() const { return (positions + block() - 1) / block(); }
  int64_t items() const { return samples * (by_position ? blocks() : positions ? channels() : 0); }
  int64_t item_size() const { return by_position ? block() * channels() : positions; }

  template <class X>
  X* result(int64_t n, int64_t channel, int64_t p = 0) const {
    return channel < split ? y1.at<X>(n, channel, p) : y2.at<X>(n, channel - split, p);
  }

  double log_det_of_scale() const {
    double sum = 0;
    if (scale)
      for (W g : gain) sum += std::log(double(g));
    return sum * double(positions);
  }

  // Writes the log-determinant of each sample: its parts in order, plus that of the global scale.
  void sum_log_det(void* to, double sign) const {
    const int64_t per_sample = items() / std::max<int64_t>(1, samples);
    const double constant = log_det_of_scale();
    for (int64_t n = 0; n < samples; ++n) {
      double sum = constant;
      for (int64_t i = 0; i < per_sample; ++i) sum += log_det_parts[n * per_sample + i];
      static_cast<W*>(to)[n] = W(sign * sum);
    }
  }
};

// Computes only the log-scales. If the exponential followed in the same loop, the two long chains
// of dependent instructions would keep the processor from overlapping two vectors.
template <bool Atan, class A, class W>
HD void log_scales(const Clamp<W>& k, const A* a_s, W* s, int64_t size) {
  INDEPENDENT
  for (int64_t i = 0; i < size; ++i) s[i] = log_scale<Atan>(k, W(load(a_s[i])));
}

template <bool Atan, class A, class W>
HD void log_scales(const Clamp<W>& k, const A* a_s, W* s, int64_t size, W* slope) {
  INDEPENDENT
  for (int64_t i = 0; i < size; ++i) s[i] = log_scale<Atan>(k, W(load(a_s[i])), slope[i]);
}

// ---- one body per direction and pair of element types, compiled for several instruction sets ----

#define BODY(direction, X, A)                                                           \
  MSFLOW_CLONES void direction##_##X##_##A(int64_t begin, int64_t end, void* context) { \
    const auto& job = *static_cast<const Job<accumulation_t<X>>*>(context);             \
    const bool atan = job.form == ClampForm::atan;                                      \
    if (job.channels_last) {                                                            \
      atan ? direction##_channels_last<true, X, A>(job, begin, end)                     \
           : direction##_channels_last<false, X, A>(job, begin, end);                   \
    } else {                                                                            \
      atan ? direction##_contiguous<true, X, A>(job, begin, end)                        \
           : direction##_contiguous<false, X, A>(job, begin, end);                      \
    }                                                                                   \
  }
#define BODIES(direction)             \
  BODY(direction, float, float)       \
  BODY(direction, double, double)     \
  BODY(direction, bfloat16, bfloat16) \
  BODY(direction, float, bfloat16)

// Calls run(0, body): a value of the accumulation dtype, and the body for the element types of the
// data and the subnet's output.
#define DISPATCH(direction, x, a, run)                                                             \
  if (x == DType::float32 && a == DType::float32) return run(float(), direction##_float_float);    \
  if (x == DType::float64 && a == DType::float64) return run(double(), direction##_double_double); \
  if (x == DType::bfloat16 && a == DType::bfloat16)                                                \
    return run(float(), direction##_bfloat16_bfloat16);                                            \
  if (x == DType::float32 && a == DType::bfloat16)                                                 \
    return run(float(), direction##_float_bfloat16);                                               \
  throw std::invalid_argument("coupling: no kernel for these element types");

}  // namespace
}  // namespace msflow
