// The coupling on CUDA: one pass over the data, then a small kernel that adds up the blocks' sums.
#include "coupling/job.cuh"
#include "coupling/stage.cuh"

namespace msflow {
namespace {

// ---- contiguous: a block is some rows of results, or a piece of one row ----

template <class J>
__global__ void __launch_bounds__(threads, J::sm_blocks)
    forward_contiguous(const __grid_constant__ J job) {
  using X = typename J::X;
  using W = typename J::W;
  constexpr int V = J::V;
  const ContiguousPlace at(job.contiguous_grid, job.positions);
  W sum = 0;
  if (at.channel < job.channels()) {
    const int64_t source = job.source(at.channel), c = source < 0 ? 0 : source;
    const Affine<J> vector(job, source);
    X* y = job.result(at.sample, at.channel);
    for (int64_t p = at.first; p < at.last; p += at.step) {
      const int64_t count = at.last - p;
      W v[V];
      results(job, vector, at.sample, c, p, count, v, sum);
      const bool vectorized = job.vectorized && count >= V;
      store(y + p, v, count, vectorized);
      if (job.is_copied(at.channel))
        store(job.copy.template at<typename J::A>(at.sample, at.channel, p), v, count, vectorized);
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) job.log_det_parts[blockIdx.x] = sum;
}

template <class J>
__global__ void __launch_bounds__(threads, J::sm_blocks)
    inverse_contiguous(const __grid_constant__ J job) {
  using X = typename J::X;
  using A = typename J::A;
  using W = typename J::W;
  constexpr int V = J::V;
  const ContiguousPlace at(job.contiguous_grid, job.positions);
  const int64_t source = at.channel < job.channels() ? job.source(at.channel) : -1;
  const int64_t j = source - job.conditioning;
  W sum = 0;
  if (source >= 0 && j >= 0) {
    const W gain = job.gain(source), shift = job.shift(source);
    const X* y = job.result(at.sample, at.channel);
    for (int64_t p = at.first; p < at.last; p += at.step) {
      const int64_t count = at.last - p;
      const bool vectorized = job.vectorized && count >= V;
      const auto of_y = fetch<V>(y + p, count, vectorized);
      const auto a_s = fetch<V>(job.a.template at<A>(at.sample, j, p), count, vectorized);
      const auto a_t =
          fetch<V>(job.a.template at<A>(at.sample, j + job.transformed, p), count, vectorized);
      W u[V], s[V], t[V];
      unpack(u, of_y), unpack(s, a_s), unpack(t, a_t);
      job.log_scales(s);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        u[i] = uncouple(u[i], s[i], job.k.shift * t[i], gain, shift);
        sum += s[i];
      }
      store(job.x2.template at<X>(at.sample, j, p), u, count, vectorized);
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) job.log_det_parts[blockIdx.x] = sum;
}

template <class J>
__global__ void __launch_bounds__(threads, J::sm_blocks)
    backward_contiguous(const __grid_constant__ J job) {
  using X = typename J::X;
  using A = typename J::A;
  using W = typename J::W;
  constexpr int V = J::V;
  const ContiguousPlace at(job.contiguous_grid, job.positions);
  const int64_t c = at.channel < job.channels() ? job.source(at.channel) : -1;
  const int64_t j = c - job.conditioning;
  const bool transformed = j >= 0;
  W sum_scale = 0, sum_offset = 0;
  if (c >= 0) {
    const W gain = job.gain(c), shift = job.shift(c), grad_s = job.grad_log_det[at.sample];
    const X* grad_y = job.result(at.sample, at.channel);
    for (int64_t p = at.first; p < at.last; p += at.step) {
      const int64_t count = at.last - p;
      const bool vectorized = job.vectorized && count >= V;
      const auto of_x = fetch<V>(transformed ? job.x2.template at<X>(at.sample, j, p)
                                             : job.x1.template at<X>(at.sample, c, p),
                                 count, vectorized);
      const auto of_y = fetch<V>(grad_y + p, count, vectorized);
      Words<A, V> a_s = {}, a_t = {};
      if (transformed) {
        a_s = fetch<V>(job.a.template at<A>(at.sample, j, p), count, vectorized);
        a_t = fetch<V>(job.a.template at<A>(at.sample, j + job.transformed, p), count, vectorized);
      }
      W g[V], x[V];
      unpack(g, of_y), unpack(x, of_x);
      if (job.is_copied(at.channel)) {
        W added[V];
        load(added, job.copy.template at<A>(at.sample, at.channel, p), count, vectorized);
#pragma unroll
        for (int i = 0; i < V; ++i) g[i] += added[i];
      }
      if (transformed) {
        W s[V], t[V];
        unpack(s, a_s), unpack(t, a_t);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const auto d = job.gradients(g[i], grad_s, x[i], s[i], t[i], gain, shift);
          x[i] = d.x, s[i] = d.a_s, t[i] = d.a_t;
          sum_scale += d.scale, sum_offset += d.offset;
        }
        store(job.grad_x2.template at<X>(at.sample, j, p), x, count, vectorized);
        store(job.grad_a.template at<A>(at.sample, j, p), s, count, vectorized);
        store(job.grad_a.template at<A>(at.sample, j + job.transformed, p), t, count, vectorized);
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const auto d = conditioning_gradients(g[i], x[i], gain, shift, W(job.limit));
          x[i] = d.x;
          sum_scale += d.scale, sum_offset += d.offset;
        }
        store(job.grad_x1.template at<X>(at.sample, c, p), x, count, vectorized);
      }
    }
  }
  sum_scale = group_sum(sum_scale, job.contiguous_grid.width);
  sum_offset = group_sum(sum_offset, job.contiguous_grid.width);
  if (c >= 0 && threadIdx.x % job.contiguous_grid.width == 0) {
    W* to = job.grad_parts +
            (at.sample * job.contiguous_grid.pieces + at.piece) * 2 * job.channels() + c;
    to[0] = sum_scale, to[job.channels()] = sum_offset;
  }
}

// ---- channels_last: a block is some positions, whose channels are permuted in shared memory ----

template <class J>
__global__ void __launch_bounds__(threads, J::sm_blocks)
    forward_channels_last(const __grid_constant__ J job) {
  using W = typename J::W;
  constexpr int V = J::V;
  const ChannelsLastPlace at(job.rows, job.positions);
  const Stage<J> stage(job);
  stage.order_results(job);
  W sum = 0;
  const auto stage_half = [&](int64_t begin, int64_t size) {
    over_packets<V>(size, at.rows, [&](int64_t k, int64_t count) {
      const int64_t c = begin + k;
      const Affine<J> vector(job, c, count);
      return [=, &job, &at, &stage, &sum](int row) {
        W v[V];
        results(job, vector, at.sample, c, at.first + row, count, v, sum);
        stage.put(row, c, v, count);
      };
    });
  };
  stage_half(0, job.conditioning);
  stage_half(job.conditioning, job.transformed);
  sum = block_sum(sum);  // Also a barrier: after it, the stage is complete.
  if (threadIdx.x == 0) job.log_det_parts[blockIdx.x] = sum;
  write_results(job, at, stage, job.y1, 0, job.split);
  write_results(job, at, stage, job.y2, job.split, job.channels() - job.split);
}

template <class J>
__global__ void __launch_bounds__(threads, J::sm_blocks)
    inverse_channels_last(const __grid_constant__ J job) {
  using X = typename J::X;
  using A = typename J::A;
  using W = typename J::W;
  constexpr int V = J::V;
  const ChannelsLastPlace at(job.rows, job.positions);
  const Stage<J> stage(job);
  stage.order_channels(job);
  read_results(job, at, stage);
  __syncthreads();
  W sum = 0;
  over_packets<V>(job.transformed, at.rows, [&](int64_t j, int64_t count) {
    const Affine<J> vector(job, job.conditioning + j, count);
    return [=, &job, &at, &stage, &sum](int row) {
      const bool vectorized = job.vectorized && count >= V;
      const int64_t p = at.first + row;
      const auto a_s = fetch<V>(job.a.template at<A>(at.sample, j, p), count, vectorized);
      const auto a_t =
          fetch<V>(job.a.template at<A>(at.sample, j + job.transformed, p), count, vectorized);
      W u[V], s[V], t[V];
      stage.get(u, row, job.conditioning + j, count);
      unpack(s, a_s), unpack(t, a_t);
      job.log_scales(s);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        u[i] = uncouple(u[i], s[i], job.k.shift * t[i], vector.gain[i], vector.shift[i]);
        sum += s[i];
      }
      store(job.x2.template at<X>(at.sample, j, p), u, count, vectorized);
    };
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) job.log_det_parts[blockIdx.x] = sum;
}

template <class J>
__global__ void __launch_bounds__(threads, 2)
    backward_channels_last(const __grid_constant__ J job) {
  using X = typename J::X;
  using A = typename J::A;
  using W = typename J::W;
  constexpr int V = J::V;
  const ChannelsLastPlace at(job.rows, job.positions);
  const Stage<J> stage(job);  // gradients of the results
  stage.order_channels(job);
  read_results(job, at, stage);
  __syncthreads();
  W* sum_scale = job.grad_parts + int64_t(blockIdx.x) * 2 * job.channels();
  W* sum_offset = sum_scale + job.channels();
  const auto conditioning = [&](int64_t c, int64_t count) {
    const Affine<J> vector(job, c, count);
    return [=, &job, &at, &stage](int row, W(&scales)[V], W(&offsets)[V]) {
      const bool vectorized = job.vectorized && count >= V;
      const auto of_x =
          fetch<V>(job.x1.template at<X>(at.sample, c, at.first + row), count, vectorized);
      W g[V], x[V];
      stage.get(g, row, c, count);
      unpack(x, of_x);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const auto d =
            conditioning_gradients(g[i], x[i], vector.gain[i], vector.shift[i], W(job.limit));
        x[i] = d.x;
        scales[i] += d.scale, offsets[i] += d.offset;
      }
      store(job.grad_x1.template at<X>(at.sample, c, at.first + row), x, count, vectorized);
    };
  };
  const W grad_s = job.grad_log_det[at.sample];
  const auto transformed = [&](int64_t j, int64_t count) {
    const Affine<J> vector(job, job.conditioning + j, count);
    return [=, &job, &at, &stage](int row, W(&scales)[V], W(&offsets)[V]) {
      const bool vectorized = job.vectorized && count >= V;
      const int64_t p = at.first + row;
      const auto of_x = fetch<V>(job.x2.template at<X>(at.sample, j, p), count, vectorized);
      const auto a_s = fetch<V>(job.a.template at<A>(at.sample, j, p), count, vectorized);
      const auto a_t =
          fetch<V>(job.a.template at<A>(at.sample, j + job.transformed, p), count, vectorized);
      W g[V], x[V], s[V], t[V];
      stage.get(g, row, job.conditioning + j, count);
      unpack(x, of_x), unpack(s, a_s), unpack(t, a_t);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const auto d =
            job.gradients(g[i], grad_s, x[i], s[i], t[i], vector.gain[i], vector.shift[i]);
        x[i] = d.x, s[i] = d.a_s, t[i] = d.a_t;
        scales[i] += d.scale, offsets[i] += d.offset;
      }
      store(job.grad_x2.template at<X>(at.sample, j, p), x, count, vectorized);
      store(job.grad_a.template at<A>(at.sample, j, p), s, count, vectorized);
      store(job.grad_a.template at<A>(at.sample, j + job.transformed, p), t, count, vectorized);
    };
  };
  channel_sums<V>(job.conditioning, at.rows, sum_scale, sum_offset, conditioning);
  channel_sums<V>(job.transformed, at.rows, sum_scale + job.conditioning,
                  sum_offset + job.conditioning, transformed);
}

// ---- the second kernel ----

// A block sums the parts of one sample's log_det, and adds the log_det of the global scale.
template <class W>
__global__ void __launch_bounds__(threads, 1)
    finish_log_det(const __grid_constant__ Coupling job, const W* parts, int64_t size, W sign,
                   W* log_det) {
  double sum = 0, scales = 0;
  for (int64_t i = threadIdx.x; i < size; i += threads) sum += double(parts[blockIdx.x * size + i]);
  if (job.scale)
    for (int64_t c = threadIdx.x; c < job.channels(); c += threads)
      scales += log(double(static_cast<const W*>(job.scale)[c]));
  sum = block_sum(sum + scales * double(job.positions));
  if (threadIdx.x == 0) log_det[blockIdx.x] = sign * W(sum);
}

template <class J>
void sum_log_det(const J& job, double sign, void* log_det, void* stream) {
  using W = typename J::W;
  launch(finish_log_det<W>, job.samples, 0, stream, static_cast<const Coupling&>(job),
         static_cast<const W*>(job.log_det_parts), job.channels() ? job.sample_blocks() : 0,
         W(sign), static_cast<W*>(log_det));
}

// Sums the parts (rows, 2, C). The gradient of scale also gets the term of log_det.
template <class W>
__global__ void __launch_bounds__(threads, 1)
    finish_gradients(const __grid_constant__ Coupling job, const W* parts, int64_t rows,
                     const W* grad_log_det, W* grad_scale, W* grad_offset) {
  const int64_t channels = job.channels();
  const int64_t column = int64_t(blockIdx.x) * sum_columns + threadIdx.x % sum_columns;
  double of_log_det = 0;
  if (grad_scale && column < channels) {
    const double slope = double(job.positions) / double(static_cast<const W*>(job.scale)[column]);
    for (int64_t n = threadIdx.x / sum_columns; n < job.samples; n += threads / sum_columns)
      of_log_det += double(grad_log_det[n]) * slope;
  }
  const double sum = column_sum(parts, rows, 2 * channels, column, of_log_det);
  if (threadIdx.x >= sum_columns || column >= 2 * channels) return;
  if (column >= channels && grad_offset) grad_offset[column - channels] = W(sum);
  if (column < channels && grad_scale) grad_scale[column] = W(sum);
}

}  // namespace

int64_t coupling_scratch(const Coupling& coupling, DType x, DType a, bool backward) {
  const Pass pass = backward ? Pass::backward : Pass::forward;
  return with_types(x, a, [&](auto* tag) {
    return std::remove_reference_t<decltype(*tag)>(coupling, nullptr, pass).bytes;
  });
}

void coupling_forward_cuda(const Coupling& coupling, Tensor x1, Tensor x2, Tensor a, Tensor y1,
                           Tensor y2, Tensor copy, void* log_det, void* scratch, void* stream) {
  with_types(x2.dtype, a.dtype, [&](auto* tag) {
    using J = std::remove_reference_t<decltype(*tag)>;
    J job(coupling, scratch, Pass::forward);
    require_memory(scratch, job.bytes);
    job.x1 = x1, job.x2 = x2, job.a = a, job.y1 = y1, job.y2 = y2, job.copy = copy;
    job.vectorized = aligned({x1, x2, a, y1, y2, copy}) && subnet_aligned(job);
    if (job.channels_last)
      launch(forward_channels_last<J>, job.blocks(), job.stage_bytes(), stream, job);
    else
      launch(forward_contiguous<J>, job.blocks(), 0, stream, job);
    if (log_det) sum_log_det(job, 1, log_det, stream);
  });
}

void coupling_inverse_cuda(const Coupling& coupling, Tensor y1, Tensor y2, Tensor a, Tensor x2,
                           void* log_det, void* scratch, void* stream) {
  with_types(x2.dtype, a.dtype, [&](auto* tag) {
    using J = std::remove_reference_t<decltype(*tag)>;
    J job(coupling, scratch, Pass::forward);
    require_memory(scratch, job.bytes);
    job.y1 = y1, job.y2 = y2, job.a = a, job.x2 = x2;
    job.vectorized = aligned({y1, y2, a, x2}) && subnet_aligned(job);
    if (job.channels_last)
      launch(inverse_channels_last<J>, job.blocks(), job.stage_bytes(), stream, job);
    else
      launch(inverse_contiguous<J>, job.blocks(), 0, stream, job);
    sum_log_det(job, -1, log_det, stream);
  });
}

void coupling_backward_cuda(const Coupling& coupling, Tensor grad_y1, Tensor grad_y2,
                            Tensor grad_copy, const void* grad_log_det, Tensor x1, Tensor x2,
                            Tensor a, Tensor grad_x1, Tensor grad_x2, Tensor grad_a,
                            void* grad_scale, void* grad_offset, void* scratch, void* stream) {
  with_types(x2.dtype, a.dtype, [&](auto* tag) {
    using J = std::remove_reference_t<decltype(*tag)>;
    using W = typename J::W;
    J job(coupling, scratch, Pass::backward);
    require_memory(scratch, job.bytes);
    job.y1 = grad_y1, job.y2 = grad_y2, job.copy = grad_copy, job.x1 = x1, job.x2 = x2, job.a = a;
    job.grad_x1 = grad_x1, job.grad_x2 = grad_x2, job.grad_a = grad_a;
    job.grad_log_det = static_cast<const W*>(grad_log_det);
    job.vectorized = aligned({grad_y1, grad_y2, grad_copy, x1, x2, a, grad_x1, grad_x2, grad_a}) &&
                     subnet_aligned(job);
    if (job.channels_last)
      launch(backward_channels_last<J>, job.blocks(), job.stage_bytes(), stream, job);
    else
      launch(backward_contiguous<J>, job.blocks(), 0, stream, job);
    if (!grad_scale && !grad_offset) return;
    launch(finish_gradients<W>, (2 * job.channels() + sum_columns - 1) / sum_columns, 0, stream,
           static_cast<const Coupling&>(job), static_cast<const W*>(job.grad_parts),
           job.grad_rows(), job.grad_log_det, static_cast<W*>(grad_scale),
           static_cast<W*>(grad_offset));
  });
}

}  // namespace msflow
