// Resampling on the CPU. An item is one channel of one sample (contiguous) or one row of positions
// (channels_last) of the result, so that the order of every sum is fixed.
#include <stdexcept>
#include <vector>

#include "common/half.h"
#include "common/parallel.h"
#include "resample/formula.h"
#include "resample/resample.h"

namespace msflow {
namespace {

// One output along an axis: the sum of weights[k] times input begin + k.
template <class W>
struct Sum {
  int64_t begin;
  std::vector<W> weights;
};

template <class W>
using Axis = std::vector<Sum<W>>;

// Pooling, upsampling and both derivatives have the form y = x + rows * input * columns.
template <class W>
struct Job : Resample {
  Tensor input, x, y;         // x may be null, or float32 if y has half precision
  int64_t in_width, y_width;  // widths of the input and the result
  Axis<W> rows, columns;
};

// ---- the sums of an axis, for pooling, upsampling and both derivatives ----

template <class W>
Axis<W> pooling(int64_t high, int64_t low) {
  Axis<W> axis;
  for (int64_t i = 0; i < low; ++i) {
    const Range covered = window(i, high, low);
    axis.push_back({covered.begin, std::vector<W>(covered.size(), W(1) / W(covered.size()))});
  }
  return axis;
}

template <class W>
Axis<W> pooling_backward(int64_t high, int64_t low) {
  Axis<W> axis;
  for (int64_t h = 0; h < high; ++h) {
    const Range owners = window(h, low, high);
    Sum<W> sum{owners.begin, {}};
    for (int64_t i = owners.begin; i < owners.end; ++i)
      sum.weights.push_back(W(1) / W(window(i, high, low).size()));
    axis.push_back(sum);
  }
  return axis;
}

template <class W>
Axis<W> upsampling(int64_t high, int64_t low) {
  const Resampling grid = resampling(low, high, true);
  Axis<W> axis;
  for (int64_t h = 0; h < high; ++h) {
    const auto t = tap<W>(grid, h, low);
    axis.push_back(
        {t.low, t.high == t.low ? std::vector<W>{W(1)} : std::vector<W>{1 - t.weight, t.weight}});
  }
  return axis;
}

template <class W>
Axis<W> upsampling_backward(int64_t high, int64_t low) {
  const Resampling grid = resampling(low, high, true);
  Axis<W> axis;
  for (int64_t i = 0; i < low; ++i) {
    const Range reading = readers<W>(grid, i, low, high);
    Sum<W> sum{reading.begin, {}};
    for (int64_t h = reading.begin; h < reading.end; ++h)
      sum.weights.push_back(tap_weight(tap<W>(grid, h, low), i));
    axis.push_back(sum);
  }
  return axis;
}

// ---- the loops ----

// sum[i] += weight * x[i]
template <class X, class W>
HD void accumulate(W* sum, const X* x, int64_t size, W weight) {
  INDEPENDENT
  for (int64_t i = 0; i < size; ++i) sum[i] += weight * W(load(x[i]));
}

template <class X, class Base, class W>
HD void contiguous(const Job<W>& job, int64_t begin, int64_t end) {
  const auto buffer = scratch<W>(job.in_width);
  W* sum = buffer.get();
  const int64_t height = int64_t(job.rows.size());
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / job.channels, c = item % job.channels;
    for (int64_t i = 0; i < height; ++i) {
      const Sum<W>& row = job.rows[i];
      std::fill(sum, sum + job.in_width, W(0));
      for (size_t k = 0; k < row.weights.size(); ++k)
        accumulate(sum, job.input.template at<X>(n, c, (row.begin + int64_t(k)) * job.in_width),
                   job.in_width, row.weights[k]);
      const Base* x = job.x.data ? job.x.template at<Base>(n, c, i * job.y_width) : nullptr;
      X* y = job.y.template at<X>(n, c, i * job.y_width);
      for (int64_t j = 0; j < job.y_width; ++j) {
        const Sum<W>& column = job.columns[j];
        W total = x ? W(load(x[j])) : W(0);
        for (size_t k = 0; k < column.weights.size(); ++k)
          total += column.weights[k] * sum[column.begin + int64_t(k)];
        store(y + j, total);
      }
    }
  }
}

template <class X, class Base, class W>
HD void channels_last(const Job<W>& job, int64_t begin, int64_t end) {
  const auto buffer = scratch<W>(job.channels);
  W* sum = buffer.get();
  const int64_t height = int64_t(job.rows.size());
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / height, i = item % height;
    const Sum<W>& row = job.rows[i];
    for (int64_t j = 0; j < job.y_width; ++j) {
      const Sum<W>& column = job.columns[j];
      std::fill(sum, sum + job.channels, W(0));
      if (job.x.data)
        accumulate(sum, job.x.template at<Base>(n, 0, i * job.y_width + j), job.channels, W(1));
      for (size_t k = 0; k < row.weights.size(); ++k)
        for (size_t l = 0; l < column.weights.size(); ++l) {
          const int64_t p = (row.begin + int64_t(k)) * job.in_width + column.begin + int64_t(l);
          accumulate(sum, job.input.template at<X>(n, 0, p), job.channels,
                     row.weights[k] * column.weights[l]);
        }
      X* y = job.y.template at<X>(n, 0, i * job.y_width + j);
      INDEPENDENT
      for (int64_t c = 0; c < job.channels; ++c) store(y + c, sum[c]);
    }
  }
}

#define BODY(X, Base)                                                               \
  MSFLOW_CLONES void body_##X##_##Base(int64_t begin, int64_t end, void* context) { \
    const auto& job = *static_cast<const Job<accumulation_t<X>>*>(context);         \
    job.channels_last ? channels_last<X, Base>(job, begin, end)                     \
                      : contiguous<X, Base>(job, begin, end);                       \
  }
BODY(float, float)
BODY(double, double)
BODY(bfloat16, bfloat16)
BODY(bfloat16, float)

template <class W>
void run(Job<W>& job, Body body) {
  const int64_t height = int64_t(job.rows.size());
  const int64_t items = job.channels_last ? height : job.channels;
  if (items == 0) return;
  parallel_for(job.samples * items, job.channels * job.height * job.width / items, body, job);
}

// to_low: whether the result is the low map. axis<W>(high, low) returns the sums of an axis.
#define RUN(resample, input, x, y, to_low, axis)                                       \
  if ((resample).samples == 0) return; /* other sizes may be huge */                   \
  const auto run_as = [&](auto zero, Body body) {                                      \
    using W = decltype(zero);                                                          \
    Job<W> job{resample,                                                               \
               input,                                                                  \
               x,                                                                      \
               y,                                                                      \
               to_low ? (resample).width : (resample).low_width,                       \
               to_low ? (resample).low_width : (resample).width,                       \
               axis<W>((resample).height, (resample).low_height),                      \
               axis<W>((resample).width, (resample).low_width)};                       \
    run(job, body);                                                                    \
  };                                                                                   \
  const bool float_base = (x).data && (x).dtype != (y).dtype;                          \
  if ((y).dtype == DType::float32) return run_as(float(), body_float_float);           \
  if ((y).dtype == DType::float64) return run_as(double(), body_double_double);        \
  if ((y).dtype == DType::bfloat16)                                                    \
    return run_as(float(), float_base ? body_bfloat16_float : body_bfloat16_bfloat16); \
  throw std::invalid_argument("resample: no kernel for this element type")

}  // namespace

void pool_forward_cpu(const Resample& r, Tensor x, Tensor low) {
  RUN(r, x, Tensor(), low, true, pooling);
}

void pool_backward_cpu(const Resample& r, Tensor grad_low, Tensor grad_x) {
  RUN(r, grad_low, Tensor(), grad_x, false, pooling_backward);
}

void upsample_forward_cpu(const Resample& r, Tensor x, Tensor low, Tensor y) {
  RUN(r, low, x, y, false, upsampling);
}

void upsample_backward_cpu(const Resample& r, Tensor grad_y, Tensor grad_low) {
  RUN(r, grad_y, Tensor(), grad_low, true, upsampling_backward);
}

}  // namespace msflow
