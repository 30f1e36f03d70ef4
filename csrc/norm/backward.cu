// The channel norm's backward pass on CUDA, in three kernels: means of each position, gradients of
// x and the map, sums over the blocks.
#include "norm/job.cuh"

namespace msflow {
namespace {

// ---- first kernel: the two means over channels that the gradients of a position need ----

// The normal value of one element, and its gradient before the ReLU.
template <class W>
struct Element {
  W normal, grad;

  template <class J>
  __device__ __forceinline__ Element(const J& job, W h, W grad_y, W mean, W inverse, W weight,
                                     W bias)
      : normal((h - mean) * inverse),
        grad(relu_gradient(grad_y, normal, weight, bias, job.floor)) {}
};

template <bool vectorized, class J>
__device__ __forceinline__ void contiguous_means(const J& job) {
  using X = typename J::X;
  using W = typename J::W;
  constexpr int V = J::V;
  const ContiguousPlace at(job.contiguous_grid, job.positions);
  const int64_t count = job.positions - at.first;
  const int64_t where = (at.sample * job.positions + at.first) * 2;
  const int64_t end = count > 0 ? job.channels : 0;
  W statistics[2 * V] = {}, sums[2 * V] = {};
  if (count > 0) load(statistics, job.statistics + where, 2 * count, vectorized);
  in_groups<vectorized ? 2 : 1>(
      at.channel, end, job.contiguous_grid.depth, [&](auto together, int64_t first) {
        constexpr int S = decltype(together)::value;
        W map[S][V], h[S][V], g[S][V], weight[S], bias[S];
#pragma unroll
        for (int s = 0; s < S; ++s)
          job.load_map(map[s], first + s * job.contiguous_grid.depth, at.first, count, vectorized);
#pragma unroll
        for (int s = 0; s < S; ++s) {
          const int64_t c = first + s * job.contiguous_grid.depth;
          load(h[s], job.x.template at<X>(at.sample, c, at.first), count, vectorized);
          load(g[s], job.y.template at<X>(at.sample, c, at.first), count, vectorized);
          weight[s] = job.weights()[c], bias[s] = job.biases()[c];
        }
#pragma unroll
        for (int s = 0; s < S; ++s)
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const Element<W> e(job, h[s][v] + map[s][v], g[s][v], statistics[2 * v],
                               statistics[2 * v + 1], weight[s], bias[s]);
            sums[2 * v] += e.grad * weight[s];
            sums[2 * v + 1] += e.grad * weight[s] * e.normal;
          }
      });
  depth_sums(sums, job.contiguous_grid.width);
  if (threadIdx.x / job.contiguous_grid.width > 0 || count <= 0) return;
#pragma unroll
  for (int i = 0; i < 2 * V; ++i) sums[i] *= job.mean_factor;
  store(job.means + where, sums, 2 * count, vectorized);
}

template <class J>
__global__ void __launch_bounds__(threads, 1) means_contiguous(const __grid_constant__ J job) {
  job.vectorized ? contiguous_means<true>(job) : contiguous_means<false>(job);
}

// One warp per position, whose channels are full packets. A lane holds up to K in registers.
template <class J, int K>
__global__ void __launch_bounds__(threads, 2)
    means_channels_last_in_registers(const __grid_constant__ J job) {
  using W = typename J::W;
  constexpr int V = J::V;
  const WarpRows<J, K> rows(job);
  for (int64_t n = rows.first; n < rows.last; ++n) {
    const int64_t where = (n * job.positions + rows.position) * 2;
    W statistics[2], sums[2] = {};
    Words<typename J::X, V> x[K], grad_y[K];
    W h[K][V];
    load(statistics, job.statistics + where, 2, true);
    rows.read(x, job.x, n);
    rows.read(grad_y, job.y, n);
    rows.sum(h, x);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      W g[V], terms[2] = {};
      unpack(g, grad_y[k]);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const W weight = rows.weight[k][v];
        const Element<W> e(job, h[k][v], g[v], statistics[0], statistics[1], weight,
                           rows.bias[k][v]);
        terms[0] += e.grad * weight;
        terms[1] += e.grad * weight * e.normal;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) sums[i] += rows.has(k) ? terms[i] : W(0);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) sums[i] = warp_sum(sums[i]) * job.mean_factor;
    if (threadIdx.x % warp_size == 0) store(job.means + where, sums, 2, true);
  }
}

// One warp per position, with any number of channels.
template <class J>
__global__ void __launch_bounds__(threads, 1) means_channels_last(const __grid_constant__ J job) {
  using W = typename J::W;
  constexpr int V = J::V;
  const int64_t row = int64_t(blockIdx.x) * warps + threadIdx.x / warp_size;
  if (row >= job.samples * job.positions) return;
  const int64_t n = row / job.positions, p = row % job.positions;
  const W mean = job.statistics[2 * row], inverse = job.statistics[2 * row + 1];
  W mean_g = 0, mean_gn = 0;
  for (int64_t c = threadIdx.x % warp_size * V; c < job.channels; c += warp_size * V) {
    const int64_t count = job.channels - c;
    W h[V], g[V], weight[V], bias[V];
    job.load_sum(h, n, c, p, count, job.vectorized);
    load(g, job.y.template at<typename J::X>(n, c, p), count, job.vectorized);
    load(weight, job.weights() + c, count, job.vectorized);
    load(bias, job.biases() + c, count, job.vectorized);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Element<W> e(job, h[v], g[v], mean, inverse, weight[v], bias[v]);
      mean_g += e.grad * weight[v];
      mean_gn += e.grad * weight[v] * e.normal;
    }
  }
  mean_g = warp_sum(mean_g), mean_gn = warp_sum(mean_gn);
  if (threadIdx.x % warp_size == 0)
    job.means[2 * row] = mean_g * job.mean_factor,
                  job.means[2 * row + 1] = mean_gn * job.mean_factor;
}

// ---- second kernel: gradients of x and the map, and partial sums of those of weight and bias ----
//
// With a map, a block processes all samples of its positions, because the map's gradient is a sum
// over the samples.

// Returns the gradient of h, and adds its terms to the gradients of weight and bias.
template <class W>
__device__ __forceinline__ W differentiate(const Element<W>& e, W weight, W inverse, W mean_g,
                                           W mean_gn, W& grad_weight, W& grad_bias) {
  grad_weight += e.grad * e.normal;
  grad_bias += e.grad;
  return norm_gradient(e.grad * weight, e.normal, inverse, mean_g, mean_gn);
}

constexpr int contiguous_samples_in_flight = 2;

template <bool vectorized, class J>
__device__ __forceinline__ void contiguous_backward(const J& job) {
  using X = typename J::X;
  using W = typename J::W;
  constexpr int V = J::V;
  const ContiguousPlace at(job.backward_grid, job.positions);
  const int64_t c = at.channel, p = at.first, count = job.positions - p;
  const int64_t begin = at.sample * job.block_samples;
  W sum_weight = 0, sum_bias = 0;
  if (c < job.channels && count > 0) {
    const W weight = job.weights()[c], bias = job.biases()[c];
    W map[V], grad_map[V] = {};
    job.load_map(map, c, p, count, vectorized);
    in_groups<vectorized ? contiguous_samples_in_flight : 1>(
        0, job.samples_from(begin), 1, [&](auto together, int64_t i) {
          const int64_t n = begin + i;
          constexpr int S = decltype(together)::value;
          W h[S][V], g[S][V], statistics[S][2 * V], means[S][2 * V];
#pragma unroll
          for (int s = 0; s < S; ++s) {
            const int64_t where = ((n + s) * job.positions + p) * 2;
            load(h[s], job.x.template at<X>(n + s, c, p), count, vectorized);
            load(g[s], job.y.template at<X>(n + s, c, p), count, vectorized);
            load(statistics[s], job.statistics + where, 2 * count, vectorized);
            load(means[s], job.means + where, 2 * count, vectorized);
          }
#pragma unroll
          for (int s = 0; s < S; ++s) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
              const W inverse = statistics[s][2 * v + 1];
              const Element<W> e(job, h[s][v] + map[v], g[s][v], statistics[s][2 * v], inverse,
                                 weight, bias);
              h[s][v] = differentiate(e, weight, inverse, means[s][2 * v], means[s][2 * v + 1],
                                      sum_weight, sum_bias);
              grad_map[v] += h[s][v];
            }
            store(job.grad_x.template at<X>(n + s, c, p), h[s], count, vectorized);
          }
        });
    if (job.grad_map.data) store(job.grad_map.template at<W>(0, c, p), grad_map, count, vectorized);
  }
  sum_weight = group_sum(sum_weight, job.backward_grid.width);
  sum_bias = group_sum(sum_bias, job.backward_grid.width);
  if (c < job.channels && threadIdx.x % job.backward_grid.width == 0) {
    W* to =
        job.grad_parts + (at.sample * job.backward_grid.pieces + at.piece) * 2 * job.channels + c;
    to[0] = sum_weight, to[job.channels] = sum_bias;
  }
}

template <class J>
__global__ void __launch_bounds__(threads, 2) backward_contiguous(const __grid_constant__ J job) {
  job.vectorized ? contiguous_backward<true>(job) : contiguous_backward<false>(job);
}

template <bool vectorized, class J>
__device__ __forceinline__ void channels_last_backward(const J& job) {
  using X = typename J::X;
  using W = typename J::W;
  constexpr int V = J::V;
  const ChannelsLastPlace at(job.rows, job.positions);
  const int64_t begin = at.sample * job.block_samples;
  const int samples = job.samples_from(begin);
  const auto add_row = [&](int64_t c, int64_t count, int64_t p, const W(&weight)[V],
                           const W(&bias)[V], W(&weights)[V], W(&biases)[V]) {
    W map[V], grad_map[V] = {};
    job.load_map(map, c, p, count, vectorized);
    in_groups<vectorized ? J::samples_in_flight : 1>(0, samples, 1, [&](auto together, int64_t i) {
      const int64_t n = begin + i;
      constexpr int S = decltype(together)::value;
      W h[S][V], g[S][V], statistics[S][2], means[S][2];
#pragma unroll
      for (int s = 0; s < S; ++s) {
        const int64_t where = ((n + s) * job.positions + p) * 2;
        load(h[s], job.x.template at<X>(n + s, c, p), count, vectorized);
        load(g[s], job.y.template at<X>(n + s, c, p), count, vectorized);
        load(statistics[s], job.statistics + where, 2, true);
        load(means[s], job.means + where, 2, true);
      }
#pragma unroll
      for (int s = 0; s < S; ++s) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const W inverse = statistics[s][1];
          const Element<W> e(job, h[s][v] + map[v], g[s][v], statistics[s][0], inverse, weight[v],
                             bias[v]);
          h[s][v] =
              differentiate(e, weight[v], inverse, means[s][0], means[s][1], weights[v], biases[v]);
          grad_map[v] += h[s][v];
        }
        store(job.grad_x.template at<X>(n + s, c, p), h[s], count, vectorized);
      }
    });
    if (job.grad_map.data) store(job.grad_map.template at<W>(0, c, p), grad_map, count, vectorized);
  };
  W* sum_weight = job.grad_parts + int64_t(blockIdx.x) * 2 * job.channels;
  channel_sums<V>(job.channels, at.rows, sum_weight, sum_weight + job.channels,
                  [&](int64_t c, int64_t count) {
                    W weight[V], bias[V];
                    load(weight, job.weights() + c, count, vectorized);
                    load(bias, job.biases() + c, count, vectorized);
                    return [=, &add_row, &at](int row, W(&weights)[V], W(&biases)[V]) {
                      add_row(c, count, at.first + row, weight, bias, weights, biases);
                    };
                  });
}

template <class J>
__global__ void __launch_bounds__(threads, 2)
    backward_channels_last(const __grid_constant__ J job) {
  job.vectorized ? channels_last_backward<true>(job) : channels_last_backward<false>(job);
}

// ---- third kernel: sums of the parts (rows, 2, C) ----

template <class W>
__global__ void __launch_bounds__(threads, 1)
    finish_gradients(const W* parts, int64_t rows, int64_t channels, W* grad_weight, W* grad_bias) {
  const int64_t column = int64_t(blockIdx.x) * sum_columns + threadIdx.x % sum_columns;
  const W sum = W(column_sum(parts, rows, 2 * channels, column));
  if (threadIdx.x >= sum_columns || column >= 2 * channels) return;
  (column < channels ? grad_weight[column] : grad_bias[column - channels]) = sum;
}

}  // namespace

int64_t norm_scratch(const Norm& norm, DType x, bool with_map) {
  return with_type(x, [&](auto* tag) {
    return std::remove_reference_t<decltype(*tag)>(norm, nullptr, with_map).bytes;
  });
}

void norm_backward_cuda(const Norm& norm, Tensor grad_y, Tensor x, Tensor bias_map,
                        const void* statistics, Tensor grad_x, Tensor grad_map, void* grad_weight,
                        void* grad_bias, void* scratch, void* stream) {
  with_type(x.dtype, [&](auto* tag) {
    using J = std::remove_reference_t<decltype(*tag)>;
    using W = typename J::W;
    J job(norm, scratch, bias_map.data);
    require_memory(scratch, job.bytes);
    job.y = grad_y, job.x = x, job.map = bias_map, job.grad_x = grad_x, job.grad_map = grad_map;
    job.statistics = const_cast<W*>(static_cast<const W*>(statistics));
    job.set_vectorized({grad_y, x, bias_map, grad_x, grad_map});
    if (job.channels_last) {
      constexpr int limit = sizeof(W) == 8 ? 6 : 24;  // With more, registers spill.
      const bool launched =
          job.vectorized && with_packets<J::V, limit>(job.lane_packets(), [&](auto packets) {
            launch(means_channels_last_in_registers<J, decltype(packets)::value>, job.warp_blocks(),
                   0, stream, job);
          });
      if (!launched) launch(means_channels_last<J>, job.row_blocks(), 0, stream, job);
      launch(backward_channels_last<J>, job.sample_groups() * job.rows.tiles, 0, stream, job);
    } else {
      launch(means_contiguous<J>, job.samples * job.contiguous_grid.blocks(), 0, stream, job);
      launch(backward_contiguous<J>, job.sample_groups() * job.backward_grid.blocks(), 0, stream,
             job);
    }
    launch(finish_gradients<W>, (2 * job.channels + sum_columns - 1) / sum_columns, 0, stream,
           static_cast<const W*>(job.grad_parts), job.grad_rows(), job.channels,
           static_cast<W*>(grad_weight), static_cast<W*>(grad_bias));
  });
}

}  // namespace msflow
