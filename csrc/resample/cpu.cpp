// Resampling on the CPU: an item is one channel of one sample (planar) or one row of positions
// (interleaved) of what is written, so that every sum has one fixed order.
#include <stdexcept>

#include "common/half.h"
#include "common/parallel.h"
#include "resample/formula.h"
#include "resample/resample.h"

namespace msflow {
namespace {

template <class W>
struct Job : Resample {
  Tensor x, low, y;                                // results, or their gradients
  Axis<W> rows, columns;                           // where upsampling reads
  std::vector<Range> column_windows, row_windows;  // of the low map's positions
  std::vector<Range> column_owners, row_owners;    // the windows that hold a position

  explicit Job(const Resample& r)
      : Resample(r), rows(low_height, height, true), columns(low_width, width, true) {
    for (int64_t i = 0; i < low_height; ++i) row_windows.push_back(window(i, height, low_height));
    for (int64_t i = 0; i < low_width; ++i) column_windows.push_back(window(i, width, low_width));
    for (int64_t i = 0; i < height; ++i) row_owners.push_back(window(i, low_height, height));
    for (int64_t i = 0; i < width; ++i) column_owners.push_back(window(i, low_width, width));
  }
};

// sum[i] += factor * x[i]
template <class X, class W>
HD void accumulate(W* sum, const X* x, int64_t size, W factor) {
  INDEPENDENT
  for (int64_t i = 0; i < size; ++i) sum[i] += factor * W(load(x[i]));
}

template <class X, class W>
HD void store_scaled(X* to, const W* x, int64_t size, W factor) {
  INDEPENDENT
  for (int64_t i = 0; i < size; ++i) store(to + i, x[i] * factor);
}

// ---- planar ----

template <class X, class W>
HD void pool_forward_planar(const Job<W>& job, int64_t begin, int64_t end) {
  const auto buffer = scratch<W>(job.width);
  W* sum = buffer.get();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / job.channels, c = item % job.channels;
    X* low = job.low.template at<X>(n, c);
    for (int64_t i = 0; i < job.low_height; ++i) {
      const Range rows = job.row_windows[i];
      std::fill(sum, sum + job.width, W(0));
      for (int64_t h = rows.begin; h < rows.end; ++h)
        accumulate(sum, job.x.template at<X>(n, c, h * job.width), job.width, W(1));
      for (int64_t j = 0; j < job.low_width; ++j) {
        const Range columns = job.column_windows[j];
        W total = 0;
        for (int64_t w = columns.begin; w < columns.end; ++w) total += sum[w];
        store(low + i * job.low_width + j, total / W(rows.size() * columns.size()));
      }
    }
  }
}

template <class X, class W>
HD void pool_backward_planar(const Job<W>& job, int64_t begin, int64_t end) {
  const auto buffer = scratch<W>(job.low_width);
  W* sum = buffer.get();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / job.channels, c = item % job.channels;
    for (int64_t h = 0; h < job.height; ++h) {
      const Range rows = job.row_owners[h];
      std::fill(sum, sum + job.low_width, W(0));
      for (int64_t i = rows.begin; i < rows.end; ++i)
        accumulate(sum, job.low.template at<X>(n, c, i * job.low_width), job.low_width,
                   W(1) / W(job.row_windows[i].size()));
      for (int64_t j = 0; j < job.low_width; ++j) sum[j] /= W(job.column_windows[j].size());
      X* x = job.x.template at<X>(n, c, h * job.width);
      for (int64_t w = 0; w < job.width; ++w) {
        const Range columns = job.column_owners[w];
        W total = 0;
        for (int64_t j = columns.begin; j < columns.end; ++j) total += sum[j];
        store(x + w, total);
      }
    }
  }
}

template <class X, class W>
HD void upsample_forward_planar(const Job<W>& job, int64_t begin, int64_t end) {
  const auto buffer = scratch<W>(job.low_width);
  W* row = buffer.get();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / job.channels, c = item % job.channels;
    for (int64_t h = 0; h < job.height; ++h) {
      const Tap<W> t = job.rows[h];
      std::fill(row, row + job.low_width, W(0));
      accumulate(row, job.low.template at<X>(n, c, t.low * job.low_width), job.low_width,
                 1 - t.weight);
      accumulate(row, job.low.template at<X>(n, c, t.high * job.low_width), job.low_width,
                 t.weight);
      const X* x = job.x.template at<X>(n, c, h * job.width);
      X* y = job.y.template at<X>(n, c, h * job.width);
      for (int64_t w = 0; w < job.width; ++w) {
        const Tap<W> u = job.columns[w];
        store(y + w, W(load(x[w])) + (1 - u.weight) * row[u.low] + u.weight * row[u.high]);
      }
    }
  }
}

template <class X, class W>
HD void upsample_backward_planar(const Job<W>& job, int64_t begin, int64_t end) {
  const auto buffer = scratch<W>(job.width);
  W* sum = buffer.get();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / job.channels, c = item % job.channels;
    X* low = job.low.template at<X>(n, c);
    for (int64_t i = 0; i < job.low_height; ++i) {
      const Range rows = readers(i, job.low_height, job.height);
      std::fill(sum, sum + job.width, W(0));
      for (int64_t h = rows.begin; h < rows.end; ++h)
        accumulate(sum, job.y.template at<X>(n, c, h * job.width), job.width,
                   share(job.rows[h], i));
      for (int64_t j = 0; j < job.low_width; ++j) {
        const Range columns = readers(j, job.low_width, job.width);
        W total = 0;
        for (int64_t w = columns.begin; w < columns.end; ++w)
          total += share(job.columns[w], j) * sum[w];
        store(low + i * job.low_width + j, total);
      }
    }
  }
}

// ---- interleaved: the same sums, of all channels of a position at once ----

template <class X, class W>
HD void pool_forward_interleaved(const Job<W>& job, int64_t begin, int64_t end) {
  const auto buffer = scratch<W>(job.channels);
  W* sum = buffer.get();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / job.low_height, i = item % job.low_height;
    const Range rows = job.row_windows[i];
    for (int64_t j = 0; j < job.low_width; ++j) {
      const Range columns = job.column_windows[j];
      std::fill(sum, sum + job.channels, W(0));
      for (int64_t h = rows.begin; h < rows.end; ++h)
        for (int64_t w = columns.begin; w < columns.end; ++w)
          accumulate(sum, job.x.template at<X>(n, 0, h * job.width + w), job.channels, W(1));
      store_scaled(job.low.template at<X>(n, 0, i * job.low_width + j), sum, job.channels,
                   W(1) / W(rows.size() * columns.size()));
    }
  }
}

template <class X, class W>
HD void pool_backward_interleaved(const Job<W>& job, int64_t begin, int64_t end) {
  const auto buffer = scratch<W>(job.channels);
  W* sum = buffer.get();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / job.height, h = item % job.height;
    const Range rows = job.row_owners[h];
    for (int64_t w = 0; w < job.width; ++w) {
      const Range columns = job.column_owners[w];
      std::fill(sum, sum + job.channels, W(0));
      for (int64_t i = rows.begin; i < rows.end; ++i)
        for (int64_t j = columns.begin; j < columns.end; ++j)
          accumulate(sum, job.low.template at<X>(n, 0, i * job.low_width + j), job.channels,
                     W(1) / W(job.row_windows[i].size() * job.column_windows[j].size()));
      store_scaled(job.x.template at<X>(n, 0, h * job.width + w), sum, job.channels, W(1));
    }
  }
}

template <class X, class W>
HD void upsample_forward_interleaved(const Job<W>& job, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / job.height, h = item % job.height;
    const Tap<W> t = job.rows[h];
    for (int64_t w = 0; w < job.width; ++w) {
      const Tap<W> u = job.columns[w];
      const int64_t upper = t.low * job.low_width, lower = t.high * job.low_width;
      const X* p00 = job.low.template at<X>(n, 0, upper + u.low);
      const X* p01 = job.low.template at<X>(n, 0, upper + u.high);
      const X* p10 = job.low.template at<X>(n, 0, lower + u.low);
      const X* p11 = job.low.template at<X>(n, 0, lower + u.high);
      const W w00 = (1 - t.weight) * (1 - u.weight), w01 = (1 - t.weight) * u.weight;
      const W w10 = t.weight * (1 - u.weight), w11 = t.weight * u.weight;
      const X* x = job.x.template at<X>(n, 0, h * job.width + w);
      X* y = job.y.template at<X>(n, 0, h * job.width + w);
      INDEPENDENT
      for (int64_t c = 0; c < job.channels; ++c)
        store(y + c, W(load(x[c])) + w00 * W(load(p00[c])) + w01 * W(load(p01[c])) +
                         w10 * W(load(p10[c])) + w11 * W(load(p11[c])));
    }
  }
}

template <class X, class W>
HD void upsample_backward_interleaved(const Job<W>& job, int64_t begin, int64_t end) {
  const auto buffer = scratch<W>(job.channels);
  W* sum = buffer.get();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / job.low_height, i = item % job.low_height;
    const Range rows = readers(i, job.low_height, job.height);
    for (int64_t j = 0; j < job.low_width; ++j) {
      const Range columns = readers(j, job.low_width, job.width);
      std::fill(sum, sum + job.channels, W(0));
      for (int64_t h = rows.begin; h < rows.end; ++h) {
        const W of_row = share(job.rows[h], i);
        for (int64_t w = columns.begin; w < columns.end; ++w) {
          const W weight = of_row * share(job.columns[w], j);
          if (weight != 0)
            accumulate(sum, job.y.template at<X>(n, 0, h * job.width + w), job.channels, weight);
        }
      }
      store_scaled(job.low.template at<X>(n, 0, i * job.low_width + j), sum, job.channels, W(1));
    }
  }
}

#define BODY(direction, X)                                                        \
  MSFLOW_CLONES void direction##_##X(int64_t begin, int64_t end, void* context) { \
    const auto& job = *static_cast<const Job<wide_t<X>>*>(context);               \
    job.interleaved ? direction##_interleaved<X>(job, begin, end)                 \
                    : direction##_planar<X>(job, begin, end);                     \
  }
#define BODIES(direction) \
  BODY(direction, float)  \
  BODY(direction, double) \
  BODY(direction, bfloat16)

BODIES(pool_forward)
BODIES(pool_backward)
BODIES(upsample_forward)
BODIES(upsample_backward)

// Runs a body over what it writes: maps of so many rows.
template <class W>
void run(const Resample& resample, Tensor x, Tensor low, Tensor y, int64_t rows, Body body) {
  Job<W> job(resample);
  job.x = x, job.low = low, job.y = y;
  const int64_t per_sample = job.interleaved ? rows : job.channels;
  if (per_sample == 0) return;
  const int64_t size = job.channels * job.height * job.width / per_sample;
  parallel_for(job.samples * per_sample, size, body, job);
}

#define RUN(direction, resample, dtype, ...)                                                    \
  if (dtype == DType::float32) return run<float>(resample, __VA_ARGS__, direction##_float);     \
  if (dtype == DType::float64) return run<double>(resample, __VA_ARGS__, direction##_double);   \
  if (dtype == DType::bfloat16) return run<float>(resample, __VA_ARGS__, direction##_bfloat16); \
  throw std::invalid_argument("resample: no kernel for this element type")

}  // namespace

void pool_forward_cpu(const Resample& r, Tensor x, Tensor low) {
  RUN(pool_forward, r, x.dtype, x, low, {}, r.low_height);
}

void pool_backward_cpu(const Resample& r, Tensor grad_low, Tensor grad_x) {
  RUN(pool_backward, r, grad_x.dtype, grad_x, grad_low, {}, r.height);
}

void upsample_forward_cpu(const Resample& r, Tensor x, Tensor low, Tensor y) {
  RUN(upsample_forward, r, x.dtype, x, low, y, r.height);
}

void upsample_backward_cpu(const Resample& r, Tensor grad_y, Tensor grad_low) {
  RUN(upsample_backward, r, grad_y.dtype, {}, grad_low, grad_y, r.low_height);
}

}  // namespace msflow
