// The coupling on the CPU. Rows are positions (contiguous) or channels (channels_last), and sums
// have a fixed order.
#include <stdexcept>
#include <vector>

#include "coupling/job.h"

namespace msflow {
namespace {

// Positions processed at a time, so that their terms stay in the L1 cache until they are summed.
constexpr int64_t chunk = 256;

// Copies a row to another element type.
template <class W, class X, class A>
HD void copy_row(const X* from, A* to, int64_t size) {
  INDEPENDENT
  for (int64_t i = 0; i < size; ++i) store(to + i, W(load(from[i])));
}

// ---- contiguous: an item is one channel of one sample, its positions side by side ----

template <bool Atan, class X, class A, class W>
HD void forward_contiguous(const Job<W>& job, int64_t begin, int64_t end) {
  const Clamp<W> k = job.k;
  const W limit = W(job.limit);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / job.channels(), result = item % job.channels();
    const int64_t c = job.source[result], j = c - job.conditioning;
    X* y = job.template result<X>(n, result);
    const W gain = job.gain[c], shift = job.shift[c];
    double sum = 0;
    if (j < 0) {
      const X* x = job.x1.template at<X>(n, c);
      INDEPENDENT
      for (int64_t i = 0; i < job.positions; ++i)
        store(y + i, affine(W(load(x[i])), gain, shift, limit));
    } else {
      const X* x = job.x2.template at<X>(n, j);
      const A* a_s = job.a.template at<A>(n, j);
      const A* a_t = job.a.template at<A>(n, j + job.transformed);
      W s[chunk];
      for (int64_t start = 0; start < job.positions; start += chunk) {
        const int64_t size = std::min(chunk, job.positions - start);
        log_scales<Atan>(k, a_s + start, s, size);
        INDEPENDENT
        for (int64_t i = 0; i < size; ++i) {
          const W u = couple(W(load(x[start + i])), s[i], k.shift * W(load(a_t[start + i])));
          store(y + start + i, affine(u, gain, shift, limit));
        }
        sum += ordered_sum(s, size);
      }
    }
    if (job.copy.data && result < job.split)
      copy_row<W>(y, job.copy.template at<A>(n, result), job.positions);
    job.log_det_parts[item] = sum;
  }
}

template <bool Atan, class X, class A, class W>
HD void inverse_contiguous(const Job<W>& job, int64_t begin, int64_t end) {
  const Clamp<W> k = job.k;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / job.channels(), result = item % job.channels();
    const int64_t c = job.source[result], j = c - job.conditioning;
    double sum = 0;
    if (j >= 0) {
      const X* y = job.template result<X>(n, result);
      X* x = job.x2.template at<X>(n, j);
      const A* a_s = job.a.template at<A>(n, j);
      const A* a_t = job.a.template at<A>(n, j + job.transformed);
      const W gain = job.gain[c], shift = job.shift[c];
      W s[chunk];
      for (int64_t start = 0; start < job.positions; start += chunk) {
        const int64_t size = std::min(chunk, job.positions - start);
        log_scales<Atan>(k, a_s + start, s, size);
        INDEPENDENT
        for (int64_t i = 0; i < size; ++i) {
          const W t = k.shift * W(load(a_t[start + i]));
          store(x + start + i, uncouple(W(load(y[start + i])), s[i], t, gain, shift));
        }
        sum += ordered_sum(s, size);
      }
    }
    job.log_det_parts[item] = sum;
  }
}

template <bool Atan, class X, class A, class W>
HD void backward_contiguous(const Job<W>& job, int64_t begin, int64_t end) {
  const Clamp<W> k = job.k;
  const W limit = W(job.limit);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / job.channels(), result = item % job.channels();
    const int64_t c = job.source[result], j = c - job.conditioning;
    const X* grad_y = job.template result<X>(n, result);
    const W gain = job.gain[c], shift = job.shift[c], grad_s = job.grad_log_det[n];
    double sum_scale = 0, sum_offset = 0;
    const bool copied = job.copy.data && result < job.split;
    W g_y[chunk], gu[chunk], gv[chunk], s[chunk], slope[chunk];
    for (int64_t start = 0; start < job.positions; start += chunk) {
      const int64_t size = std::min(chunk, job.positions - start);
      INDEPENDENT
      for (int64_t i = 0; i < size; ++i) g_y[i] = W(load(grad_y[start + i]));
      if (copied) {
        const A* copy = job.copy.template at<A>(n, result, start);
        INDEPENDENT
        for (int64_t i = 0; i < size; ++i) g_y[i] += W(load(copy[i]));
      }
      if (j < 0) {
        const X* x = job.x1.template at<X>(n, c, start);
        X* grad_x = job.grad_x1.template at<X>(n, c, start);
        INDEPENDENT
        for (int64_t i = 0; i < size; ++i) {
          const auto g = conditioning_gradients(g_y[i], W(load(x[i])), gain, shift, limit);
          gu[i] = g.scale, gv[i] = g.offset;
          store(grad_x + i, g.x);
        }
      } else {
        const X* x = job.x2.template at<X>(n, j, start);
        const A* a_s = job.a.template at<A>(n, j, start);
        const A* a_t = job.a.template at<A>(n, j + job.transformed, start);
        X* grad_x = job.grad_x2.template at<X>(n, j, start);
        A* grad_s_row = job.grad_a.template at<A>(n, j, start);
        A* grad_t_row = job.grad_a.template at<A>(n, j + job.transformed, start);
        log_scales<Atan>(k, a_s, s, size, slope);
        INDEPENDENT
        for (int64_t i = 0; i < size; ++i) {
          const auto g = transformed_gradients(k, g_y[i], grad_s, W(load(x[i])), s[i], slope[i],
                                               W(load(a_t[i])), gain, shift, limit);
          gu[i] = g.scale, gv[i] = g.offset;
          store(grad_x + i, g.x);
          store(grad_s_row + i, g.a_s);
          store(grad_t_row + i, g.a_t);
        }
      }
      sum_scale += ordered_sum(gu, size);
      sum_offset += ordered_sum(gv, size);
    }
    job.grad_parts[(n * 2) * job.channels() + c] = W(sum_scale);
    job.grad_parts[(n * 2 + 1) * job.channels() + c] = W(sum_offset);
  }
}

// ---- channels_last: an item is a block of positions of one sample, with all their channels ----

template <bool Atan, class X, class A, class W>
HD void forward_channels_last(const Job<W>& job, int64_t begin, int64_t end) {
  const Clamp<W> k = job.k;
  const W limit = W(job.limit);
  const int64_t channels = job.channels(), conditioning = job.conditioning,
                transformed = job.transformed;
  const int64_t split = job.split, rest = channels - split;
  const auto buffer = scratch<W>(channels + transformed);
  W* v = buffer.get();
  W* s = v + channels;
  const W* gain = job.gain.data();
  const W* shift = job.shift.data();
  const int32_t* source = job.source.data();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / job.blocks(), first = item % job.blocks() * job.block();
    const int64_t last = std::min(first + job.block(), job.positions);
    W lane[lanes] = {};
    for (int64_t p = first; p < last; ++p) {
      const X* x1 = job.x1.template at<X>(n, 0, p);
      const X* x2 = job.x2.template at<X>(n, 0, p);
      const A* a_s = job.a.template at<A>(n, 0, p);
      const A* a_t = a_s + transformed;
      INDEPENDENT
      for (int64_t c = 0; c < conditioning; ++c)
        v[c] = affine(W(load(x1[c])), gain[c], shift[c], limit);
      log_scales<Atan>(k, a_s, s, transformed);
      INDEPENDENT
      for (int64_t j = 0; j < transformed; ++j) {
        const W u = couple(W(load(x2[j])), s[j], k.shift * W(load(a_t[j])));
        v[conditioning + j] = affine(u, gain[conditioning + j], shift[conditioning + j], limit);
      }
      add_to_lanes(s, transformed, lane);
      X* y1 = job.y1.template at<X>(n, 0, p);
      X* y2 = job.y2.template at<X>(n, 0, p);
      if (job.perm) {
        INDEPENDENT
        for (int64_t i = 0; i < split; ++i) store(y1 + i, v[source[i]]);
        INDEPENDENT
        for (int64_t i = 0; i < rest; ++i) store(y2 + i, v[source[split + i]]);
      } else {
        INDEPENDENT
        for (int64_t i = 0; i < split; ++i) store(y1 + i, v[i]);
        INDEPENDENT
        for (int64_t i = 0; i < rest; ++i) store(y2 + i, v[split + i]);
      }
      if (job.copy.data) copy_row<W>(y1, job.copy.template at<A>(n, 0, p), split);
    }
    job.log_det_parts[item] = sum_lanes(lane);
  }
}

// Returns both results at one position in the order of their source channels, from channel `begin`
// on. If there is a copy, it is added to the first result. y and v are buffers for all channels;
// the returned pointer points into one of them.
template <class X, class A, class W>
HD const W* undo_permutation(const Job<W>& job, int64_t n, int64_t p, int64_t begin, W* y, W* v) {
  const X* y1 = job.y1.template at<X>(n, 0, p);
  const X* y2 = job.y2.template at<X>(n, 0, p);
  const int64_t split = job.split, channels = job.channels();
  INDEPENDENT
  for (int64_t i = 0; i < split; ++i) y[i] = W(load(y1[i]));
  INDEPENDENT
  for (int64_t i = split; i < channels; ++i) y[i] = W(load(y2[i - split]));
  if (job.copy.data) {
    const A* copy = job.copy.template at<A>(n, 0, p);
    INDEPENDENT
    for (int64_t i = 0; i < split; ++i) y[i] += W(load(copy[i]));
  }
  if (!job.perm) return y + begin;
  const int32_t* destination = job.destination.data();
  INDEPENDENT
  for (int64_t c = begin; c < channels; ++c) v[c] = y[destination[c]];
  return v + begin;
}

template <bool Atan, class X, class A, class W>
HD void inverse_channels_last(const Job<W>& job, int64_t begin, int64_t end) {
  const Clamp<W> k = job.k;
  const int64_t channels = job.channels(), conditioning = job.conditioning,
                transformed = job.transformed;
  const auto buffer = scratch<W>(2 * channels + transformed);
  W* y = buffer.get();
  W* v = y + channels;
  W* s = v + channels;
  const W* gain = job.gain.data() + conditioning;
  const W* shift = job.shift.data() + conditioning;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / job.blocks(), first = item % job.blocks() * job.block();
    const int64_t last = std::min(first + job.block(), job.positions);
    W lane[lanes] = {};
    for (int64_t p = first; p < last; ++p) {
      const W* u = undo_permutation<X, A>(job, n, p, conditioning, y, v);
      const A* a_s = job.a.template at<A>(n, 0, p);
      const A* a_t = a_s + transformed;
      X* x2 = job.x2.template at<X>(n, 0, p);
      log_scales<Atan>(k, a_s, s, transformed);
      INDEPENDENT
      for (int64_t j = 0; j < transformed; ++j)
        store(x2 + j, uncouple(u[j], s[j], k.shift * W(load(a_t[j])), gain[j], shift[j]));
      add_to_lanes(s, transformed, lane);
    }
    job.log_det_parts[item] = sum_lanes(lane);
  }
}

template <bool Atan, class X, class A, class W>
HD void backward_channels_last(const Job<W>& job, int64_t begin, int64_t end) {
  const Clamp<W> k = job.k;
  const W limit = W(job.limit);
  const int64_t channels = job.channels(), conditioning = job.conditioning,
                transformed = job.transformed;
  const auto buffer = scratch<W>(2 * channels + 2 * transformed);
  W* y = buffer.get();
  W* v = y + channels;
  W* s = v + channels;
  W* slope = s + transformed;
  const W* gain = job.gain.data();
  const W* shift = job.shift.data();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / job.blocks(), first = item % job.blocks() * job.block();
    const int64_t last = std::min(first + job.block(), job.positions);
    W* sum_scale = job.grad_parts.get() + item * 2 * channels;
    W* sum_offset = sum_scale + channels;
    std::fill(sum_scale, sum_scale + 2 * channels, W(0));
    const W grad_s = job.grad_log_det[n];
    for (int64_t p = first; p < last; ++p) {
      const W* grad = undo_permutation<X, A>(job, n, p, 0, y, v);
      const X* x1 = job.x1.template at<X>(n, 0, p);
      const X* x2 = job.x2.template at<X>(n, 0, p);
      const A* a_s = job.a.template at<A>(n, 0, p);
      const A* a_t = a_s + transformed;
      X* grad_x1 = job.grad_x1.template at<X>(n, 0, p);
      X* grad_x2 = job.grad_x2.template at<X>(n, 0, p);
      A* grad_a_s = job.grad_a.template at<A>(n, 0, p);
      A* grad_a_t = grad_a_s + transformed;
      INDEPENDENT
      for (int64_t c = 0; c < conditioning; ++c) {
        const auto g = conditioning_gradients(grad[c], W(load(x1[c])), gain[c], shift[c], limit);
        sum_scale[c] += g.scale;
        sum_offset[c] += g.offset;
        store(grad_x1 + c, g.x);
      }
      log_scales<Atan>(k, a_s, s, transformed, slope);
      INDEPENDENT
      for (int64_t j = 0; j < transformed; ++j) {
        const int64_t c = conditioning + j;
        const auto g = transformed_gradients(k, grad[c], grad_s, W(load(x2[j])), s[j], slope[j],
                                             W(load(a_t[j])), gain[c], shift[c], limit);
        sum_scale[c] += g.scale;
        sum_offset[c] += g.offset;
        store(grad_x2 + j, g.x);
        store(grad_a_s + j, g.a_s);
        store(grad_a_t + j, g.a_t);
      }
    }
  }
}

BODIES(forward)
BODIES(inverse)
BODIES(backward)

}  // namespace

void coupling_forward_cpu(const Coupling& coupling, Tensor x1, Tensor x2, Tensor a, Tensor y1,
                          Tensor y2, Tensor copy, void* log_det) {
  const auto run = [&](auto zero, Body body) {
    Job<decltype(zero)> job(coupling);
    job.x1 = x1, job.x2 = x2, job.a = a, job.y1 = y1, job.y2 = y2, job.copy = copy;
    job.log_det_parts = scratch<double>(job.items());
    parallel_for(job.items(), job.item_size(), body, job);
    if (log_det) job.sum_log_det(log_det, 1);
  };
  DISPATCH(forward, x2.dtype, a.dtype, run)
}

void coupling_inverse_cpu(const Coupling& coupling, Tensor y1, Tensor y2, Tensor a, Tensor x2,
                          void* log_det) {
  const auto run = [&](auto zero, Body body) {
    Job<decltype(zero)> job(coupling);
    job.y1 = y1, job.y2 = y2, job.a = a, job.x2 = x2;
    job.log_det_parts = scratch<double>(job.items());
    parallel_for(job.items(), job.item_size(), body, job);
    job.sum_log_det(log_det, -1);
  };
  DISPATCH(inverse, x2.dtype, a.dtype, run)
}

void coupling_backward_cpu(const Coupling& coupling, Tensor grad_y1, Tensor grad_y2,
                           Tensor grad_copy, const void* grad_log_det, Tensor x1, Tensor x2,
                           Tensor a, Tensor grad_x1, Tensor grad_x2, Tensor grad_a,
                           void* grad_scale, void* grad_offset) {
  const auto run = [&](auto zero, Body body) {
    using W = decltype(zero);
    Job<W> job(coupling);
    job.y1 = grad_y1, job.y2 = grad_y2, job.copy = grad_copy, job.x1 = x1, job.x2 = x2, job.a = a;
    job.grad_x1 = grad_x1, job.grad_x2 = grad_x2, job.grad_a = grad_a;
    job.grad_log_det = static_cast<const W*>(grad_log_det);
    const int64_t channels = job.allocated_channels();
    const int64_t parts = job.channels_last ? job.items() : std::min(job.samples, job.items());
    job.grad_parts = scratch<W>(parts * 2 * channels);
    parallel_for(job.items(), job.item_size(), body, job);
    if (!grad_scale && !grad_offset) return;
    double grad_constant = 0;
    for (int64_t n = 0; n < job.samples; ++n) grad_constant += double(job.grad_log_det[n]);
    std::vector<double> sum(2 * channels);
    for (int64_t i = 0; i < parts; ++i)
      for (int64_t c = 0; c < 2 * channels; ++c)
        sum[c] += double(job.grad_parts[i * 2 * channels + c]);
    for (int64_t c = 0; c < channels; ++c) {
      if (grad_scale)
        static_cast<W*>(grad_scale)[c] =
            W(sum[c] + grad_constant * double(job.positions) / double(job.gain[c]));
      if (grad_offset) static_cast<W*>(grad_offset)[c] = W(sum[channels + c]);
    }
  };
  DISPATCH(backward, x2.dtype, a.dtype, run)
}

}  // namespace msflow
