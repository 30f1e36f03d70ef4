// The channel norm on the CPU. An item is a block of positions, whose channels fit in a near cache.
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "common/half.h"
#include "common/parallel.h"
#include "norm/formula.h"
#include "norm/norm.h"

namespace msflow {
namespace {

// Positions of a block. In contiguous tensors they are whole cache lines of every channel.
constexpr int64_t contiguous_block = 128;
constexpr int64_t channels_last_block = 64;

template <class W>
struct Job : Norm {
  Tensor x, map, y, grad_x, grad_map;  // y: result, or its gradient in the backward
  const W* w;                          // weight
  const W* b;                          // bias
  W floor;                             // of the ReLU, or -infinity
  W* statistics = nullptr;             // (N, P, 2)
  std::unique_ptr<W[]> grad_parts;     // (items, 2, C)

  explicit Job(const Norm& norm)
      : Norm(norm),
        w(static_cast<const W*>(weight)),
        b(static_cast<const W*>(bias)),
        floor(relu ? W(0) : -std::numeric_limits<W>::infinity()) {}

  int64_t block() const {
    return channels_last ? std::min(channels_last_block, std::max<int64_t>(1, 8192 / channels))
                         : contiguous_block;
  }
  int64_t blocks() const { return (positions + block() - 1) / block(); }
};

// ---- contiguous ----

template <class X, class W>
HD void forward_contiguous(const Job<W>& job, int64_t begin, int64_t end) {
  const W floor = job.floor;
  const auto buffer = scratch<W>(job.channels * contiguous_block);
  W* h = buffer.get();
  const W mean_factor = W(1) / W(job.channels);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / job.blocks(), first = item % job.blocks() * contiguous_block;
    const int64_t size = std::min(contiguous_block, job.positions - first);
    W mean[contiguous_block] = {}, inverse[contiguous_block] = {};
    for (int64_t c = 0; c < job.channels; ++c) {
      const X* x = job.x.template at<X>(n, c, first);
      W* row = h + c * contiguous_block;
      INDEPENDENT
      for (int64_t i = 0; i < size; ++i) row[i] = W(load(x[i]));
      if (job.map.data) {
        const W* map = job.map.template at<W>(0, c, first);
        INDEPENDENT
        for (int64_t i = 0; i < size; ++i) row[i] += map[i];
      }
      INDEPENDENT
      for (int64_t i = 0; i < size; ++i) mean[i] += row[i];
    }
    for (int64_t i = 0; i < size; ++i) mean[i] *= mean_factor;
    for (int64_t c = 0; c < job.channels; ++c) {
      W* row = h + c * contiguous_block;
      INDEPENDENT
      for (int64_t i = 0; i < size; ++i) {
        row[i] -= mean[i];
        inverse[i] += row[i] * row[i];
      }
    }
    for (int64_t i = 0; i < size; ++i)
      inverse[i] = 1 / std::sqrt(inverse[i] * mean_factor + W(job.eps));
    for (int64_t c = 0; c < job.channels; ++c) {
      const W* row = h + c * contiguous_block;
      X* y = job.y.template at<X>(n, c, first);
      const W w = job.w[c], b = job.b[c];
      INDEPENDENT
      for (int64_t i = 0; i < size; ++i)
        store(y + i, rectified(row[i] * inverse[i] * w + b, floor));
    }
    if (job.statistics) {
      W* to = job.statistics + (n * job.positions + first) * 2;
      INDEPENDENT
      for (int64_t i = 0; i < size; ++i) to[2 * i] = mean[i], to[2 * i + 1] = inverse[i];
    }
  }
}

// An item is a block of positions of all samples, because grad_map sums over samples.
template <class X, class W>
HD void backward_contiguous(const Job<W>& job, int64_t begin, int64_t end) {
  const W floor = job.floor;
  const auto buffer = scratch<W>(2 * job.channels * contiguous_block);
  W* normal = buffer.get();
  W* grad = normal + job.channels * contiguous_block;
  const W mean_factor = W(1) / W(job.channels);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * contiguous_block;
    const int64_t size = std::min(contiguous_block, job.positions - first);
    W* grad_w = job.grad_parts.get() + item * 2 * job.channels;
    W* grad_b = grad_w + job.channels;
    std::fill(grad_w, grad_w + 2 * job.channels, W(0));
    for (int64_t n = 0; n < job.samples; ++n) {
      W mean[contiguous_block], inverse[contiguous_block], mean_g[contiguous_block] = {},
                                                           mean_gn[contiguous_block] = {};
      const W* from = job.statistics + (n * job.positions + first) * 2;
      for (int64_t i = 0; i < size; ++i) mean[i] = from[2 * i], inverse[i] = from[2 * i + 1];
      for (int64_t c = 0; c < job.channels; ++c) {
        const X* x = job.x.template at<X>(n, c, first);
        const X* grad_y = job.y.template at<X>(n, c, first);
        W* nrow = normal + c * contiguous_block;
        W* grow = grad + c * contiguous_block;
        const W w = job.w[c], b = job.b[c];
        INDEPENDENT
        for (int64_t i = 0; i < size; ++i) nrow[i] = W(load(x[i]));
        if (job.map.data) {
          const W* map = job.map.template at<W>(0, c, first);
          INDEPENDENT
          for (int64_t i = 0; i < size; ++i) nrow[i] += map[i];
        }
        W gw[contiguous_block], gb[contiguous_block];
        INDEPENDENT
        for (int64_t i = 0; i < size; ++i) {
          nrow[i] = (nrow[i] - mean[i]) * inverse[i];
          gb[i] = relu_gradient(W(load(grad_y[i])), nrow[i], w, b, floor);
          gw[i] = gb[i] * nrow[i];
          grow[i] = gb[i] * w;
          mean_g[i] += grow[i];
          mean_gn[i] += grow[i] * nrow[i];
        }
        grad_w[c] += W(ordered_sum(gw, size));
        grad_b[c] += W(ordered_sum(gb, size));
      }
      for (int64_t i = 0; i < size; ++i) mean_g[i] *= mean_factor, mean_gn[i] *= mean_factor;
      for (int64_t c = 0; c < job.channels; ++c) {
        const W* nrow = normal + c * contiguous_block;
        W* grow = grad + c * contiguous_block;
        X* grad_x = job.grad_x.template at<X>(n, c, first);
        INDEPENDENT
        for (int64_t i = 0; i < size; ++i) {
          grow[i] = norm_gradient(grow[i], nrow[i], inverse[i], mean_g[i], mean_gn[i]);
          store(grad_x + i, grow[i]);
        }
        if (job.grad_map.data) {
          W* grad_map = job.grad_map.template at<W>(0, c, first);
          INDEPENDENT
          for (int64_t i = 0; i < size; ++i) grad_map[i] = n ? grad_map[i] + grow[i] : grow[i];
        }
      }
    }
  }
}

// ---- channels_last ----

// Each step handles all positions of a block, so that their dependent sums overlap.
template <class X, class W>
HD void forward_channels_last(const Job<W>& job, int64_t begin, int64_t end) {
  const W floor = job.floor;
  const int64_t channels = job.channels;
  const auto buffer = scratch<W>(job.block() * channels);
  W* const h = buffer.get();
  const W* w = job.w;
  const W* b = job.b;
  const W mean_factor = W(1) / W(channels);
  W mean[channels_last_block], inverse[channels_last_block];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / job.blocks(), first = item % job.blocks() * job.block();
    const int64_t size = std::min(job.block(), job.positions - first);
    for (int64_t i = 0; i < size; ++i) {
      const X* x = job.x.template at<X>(n, 0, first + i);
      W* row = h + i * channels;
      INDEPENDENT
      for (int64_t c = 0; c < channels; ++c) row[c] = W(load(x[c]));
      if (job.map.data) {
        const W* map = job.map.template at<W>(0, 0, first + i);
        INDEPENDENT
        for (int64_t c = 0; c < channels; ++c) row[c] += map[c];
      }
      mean[i] = W(ordered_sum(row, channels)) * mean_factor;
    }
    for (int64_t i = 0; i < size; ++i) {
      const W* row = h + i * channels;
      W lane[lanes] = {};
      int64_t c = 0;
      for (; c + lanes <= channels; c += lanes)
        for (int l = 0; l < lanes; ++l) lane[l] += (row[c + l] - mean[i]) * (row[c + l] - mean[i]);
      for (int l = 0; c < channels; ++c, ++l) lane[l] += (row[c] - mean[i]) * (row[c] - mean[i]);
      inverse[i] = W(sum_lanes(lane));
    }
    for (int64_t i = 0; i < size; ++i)
      inverse[i] = 1 / std::sqrt(inverse[i] * mean_factor + W(job.eps));
    for (int64_t i = 0; i < size; ++i) {
      const W* row = h + i * channels;
      X* y = job.y.template at<X>(n, 0, first + i);
      const W m = mean[i], scale = inverse[i];
      INDEPENDENT
      for (int64_t c = 0; c < channels; ++c)
        store(y + c, rectified((row[c] - m) * scale * w[c] + b[c], floor));
    }
    if (job.statistics) {
      W* to = job.statistics + (n * job.positions + first) * 2;
      INDEPENDENT
      for (int64_t i = 0; i < size; ++i) to[2 * i] = mean[i], to[2 * i + 1] = inverse[i];
    }
  }
}

template <class X, class W>
HD void backward_channels_last(const Job<W>& job, int64_t begin, int64_t end) {
  const W floor = job.floor;
  const int64_t channels = job.channels;
  const auto buffer = scratch<W>(3 * channels);
  W* normal = buffer.get();
  W* grad = normal + channels;
  W* product = grad + channels;
  const W* w = job.w;
  const W* b = job.b;
  const W mean_factor = W(1) / W(channels);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * job.block(), last = std::min(first + job.block(), job.positions);
    W* grad_w = job.grad_parts.get() + item * 2 * channels;
    W* grad_b = grad_w + channels;
    std::fill(grad_w, grad_w + 2 * channels, W(0));
    for (int64_t n = 0; n < job.samples; ++n) {
      for (int64_t p = first; p < last; ++p) {
        const X* x = job.x.template at<X>(n, 0, p);
        const X* grad_y = job.y.template at<X>(n, 0, p);
        X* grad_x = job.grad_x.template at<X>(n, 0, p);
        const W mean = job.statistics[(n * job.positions + p) * 2];
        const W inverse = job.statistics[(n * job.positions + p) * 2 + 1];
        INDEPENDENT
        for (int64_t c = 0; c < channels; ++c) normal[c] = W(load(x[c]));
        if (job.map.data) {
          const W* map = job.map.template at<W>(0, 0, p);
          INDEPENDENT
          for (int64_t c = 0; c < channels; ++c) normal[c] += map[c];
        }
        INDEPENDENT
        for (int64_t c = 0; c < channels; ++c) {
          normal[c] = (normal[c] - mean) * inverse;
          const W g = relu_gradient(W(load(grad_y[c])), normal[c], w[c], b[c], floor);
          grad_w[c] += g * normal[c];
          grad_b[c] += g;
          grad[c] = g * w[c];
          product[c] = grad[c] * normal[c];
        }
        const W mean_g = W(ordered_sum(grad, channels)) * mean_factor;
        const W mean_gn = W(ordered_sum(product, channels)) * mean_factor;
        INDEPENDENT
        for (int64_t c = 0; c < channels; ++c) {
          grad[c] = norm_gradient(grad[c], normal[c], inverse, mean_g, mean_gn);
          store(grad_x + c, grad[c]);
        }
        if (job.grad_map.data) {
          W* grad_map = job.grad_map.template at<W>(0, 0, p);
          if (n == 0) std::fill(grad_map, grad_map + channels, W(0));
          INDEPENDENT
          for (int64_t c = 0; c < channels; ++c) grad_map[c] += grad[c];
        }
      }
    }
  }
}

#define BODY(direction, X)                                                        \
  MSFLOW_CLONES void direction##_##X(int64_t begin, int64_t end, void* context) { \
    const auto& job = *static_cast<const Job<accumulation_t<X>>*>(context);       \
    job.channels_last ? direction##_channels_last<X>(job, begin, end)             \
                      : direction##_contiguous<X>(job, begin, end);               \
  }
BODY(forward, float)
BODY(forward, double)
BODY(forward, bfloat16)
BODY(backward, float)
BODY(backward, double)
BODY(backward, bfloat16)

#define DISPATCH(direction, x, run)                                    \
  if (x == DType::float32) return run(float(), direction##_float);     \
  if (x == DType::float64) return run(double(), direction##_double);   \
  if (x == DType::bfloat16) return run(float(), direction##_bfloat16); \
  throw std::invalid_argument("channel_norm: no kernel for this element type");

}  // namespace

void norm_forward_cpu(const Norm& norm, Tensor x, Tensor bias_map, Tensor y, void* statistics) {
  const auto run = [&](auto zero, Body body) {
    Job<decltype(zero)> job(norm);
    job.x = x, job.map = bias_map, job.y = y;
    job.statistics = static_cast<decltype(zero)*>(statistics);
    parallel_for(job.samples * job.blocks(), job.block() * job.channels, body, job);
  };
  DISPATCH(forward, x.dtype, run)
}

void norm_backward_cpu(const Norm& norm, Tensor grad_y, Tensor x, Tensor bias_map,
                       const void* statistics, Tensor grad_x, Tensor grad_map, void* grad_weight,
                       void* grad_bias) {
  const auto run = [&](auto zero, Body body) {
    using W = decltype(zero);
    Job<W> job(norm);
    job.y = grad_y, job.x = x, job.map = bias_map, job.grad_x = grad_x, job.grad_map = grad_map;
    job.statistics = const_cast<W*>(static_cast<const W*>(statistics));
    const int64_t size = 2 * job.channels;
    job.grad_parts = scratch<W>(job.blocks() * size);
    parallel_for(job.blocks(), job.block() * job.channels * job.samples, body, job);
    std::vector<double> sum(size);
    for (int64_t i = 0; i < job.blocks(); ++i)
      for (int64_t c = 0; c < size; ++c) sum[c] += double(job.grad_parts[i * size + c]);
    for (int64_t c = 0; c < job.channels; ++c) {
      static_cast<W*>(grad_weight)[c] = W(sum[c]);
      static_cast<W*>(grad_bias)[c] = W(sum[job.channels + c]);
    }
  };
  DISPATCH(backward, x.dtype, run)
}

}  // namespace msflow
