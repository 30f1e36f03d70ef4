// The channel norm on CUDA: forward in one kernel; backward in three, means of each position first.
#include "common/launch.cuh"
#include "norm/formula.h"
#include "norm/norm.h"

namespace msflow {
namespace {

constexpr int64_t row_budget = 16 * 1024;  // bytes that bound the rows of an interleaved block

template <class X_>
struct Job : Norm {
  using X = X_;
  using W = wide_t<X>;
  static constexpr int V = packet_of<X>;

  Tensor x, map, y, grad_x, grad_map;  // y: result, or its gradient
  W* statistics = nullptr;             // (N, P, 2): mean, 1 / deviation
  W* means = nullptr;  // (N, P, 2): means over channels of the gradient, and of it times normal
  W* grad_parts = nullptr;  // (grad_rows, 2, C)
  W floor, share;           // of the ReLU, if there is one; 1 / C
  bool whole = false;       // packets are aligned
  bool dense;               // and so are those of statistics and means
  bool stashed = false;     // all channels of a block wait in shared memory
  bool per_sample;          // a block of the last kernel takes one sample, not all of them
  Planar planar, pieces;    // blocks with all channels; blocks with some
  Interleaved rows;

  Job(const Norm& norm, void* memory, bool with_map)
      : Norm(norm),
        floor(relu ? W(0) : -std::numeric_limits<W>::infinity()),
        share(W(1) / W(channels)),
        dense(positions % 2 == 0),
        per_sample(!with_map),
        planar(channels, positions, V, max_depth_width, 1, true),
        pieces(channels, positions, V, max_depth_width, 1, false),
        rows(positions, channels * int64_t(sizeof(X)), row_budget) {
    Scratch scratch(memory);
    means = scratch.take<W>(samples * positions * 2);
    grad_parts = scratch.take<W>(grad_rows() * 2 * channels);
    bytes = scratch.bytes();
  }

  int64_t bytes;  // of scratch memory
  HD int64_t sample_groups() const { return per_sample ? samples : samples > 0; }
  int64_t grad_rows() const { return sample_groups() * (interleaved ? rows.tiles : pieces.pieces); }

  __device__ W weight_of(int64_t c) const { return static_cast<const W*>(weight)[c]; }
  __device__ W bias_of(int64_t c) const { return static_cast<const W*>(bias)[c]; }

  // V elements of x + map.
  __device__ __forceinline__ void load_sum(W (&h)[V], int64_t n, int64_t c, int64_t p,
                                           int64_t count) const {
    const bool packet = whole && count >= V;
    load(h, x.template at<X>(n, c, p), count, packet);
    if (!map.data) return;
    W m[V];
    load(m, map.template at<W>(0, c, p), count, packet);
#pragma unroll
    for (int i = 0; i < V; ++i) h[i] += m[i];
  }
};

// ---- forward: every position's channels are read once, and wait in shared memory for mean and
// deviation ----

// Threads along positions, and along channels.
template <class J>
__global__ void __launch_bounds__(threads, 1) forward_planar(const __grid_constant__ J job) {
  using W = typename J::W;
  constexpr int V = J::V;
  const PlanarPlace at(job.planar, job.positions);
  const int64_t count = job.positions - at.first, step = job.planar.depth;
  W* stash = shared_memory<W>() + threadIdx.x;  // a thread reads only what it wrote
  W mean[V] = {}, inverse[V] = {}, h[V];
  for (int64_t c = at.channel, i = 0; c < job.channels; c += step) {
    job.load_sum(h, at.sample, c, at.first, count);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      mean[v] += h[v];
      if (job.stashed) stash[i++ * threads] = h[v];
    }
  }
  depth_sums(mean, job.planar.width);
#pragma unroll
  for (int v = 0; v < V; ++v) mean[v] *= job.share;
  for (int64_t c = at.channel, i = 0; c < job.channels; c += step) {
    if (!job.stashed) job.load_sum(h, at.sample, c, at.first, count);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const W centred = (job.stashed ? stash[i++ * threads] : h[v]) - mean[v];
      inverse[v] += centred * centred;
    }
  }
  depth_sums(inverse, job.planar.width);
#pragma unroll
  for (int v = 0; v < V; ++v) inverse[v] = 1 / sqrt(inverse[v] * job.share + W(job.eps));
  for (int64_t c = at.channel, i = 0; c < job.channels; c += step) {
    if (!job.stashed) job.load_sum(h, at.sample, c, at.first, count);
    const W weight = job.weight_of(c), bias = job.bias_of(c);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (job.stashed) h[v] = stash[i++ * threads];
      h[v] = rectified((h[v] - mean[v]) * inverse[v] * weight + bias, job.floor);
    }
    store(job.y.template at<typename J::X>(at.sample, c, at.first), h, count,
          job.whole && count >= V);
  }
  if (threadIdx.x / job.planar.width > 0 || !job.statistics) return;
  W* to = job.statistics + (at.sample * job.positions + at.first) * 2;
#pragma unroll
  for (int v = 0; v < V; ++v)
    if (v < count) to[2 * v] = mean[v], to[2 * v + 1] = inverse[v];
}

// A warp per position.
template <class J>
__global__ void __launch_bounds__(threads, 1) forward_interleaved(const __grid_constant__ J job) {
  using W = typename J::W;
  constexpr int V = J::V;
  const int64_t row = int64_t(blockIdx.x) * warps + threadIdx.x / warp_size;
  if (row >= job.samples * job.positions) return;
  const int64_t n = row / job.positions, p = row % job.positions;
  const int64_t first = threadIdx.x % warp_size * V, step = warp_size * V;
  W* stash = shared_memory<W>() + threadIdx.x;
  W mean = 0, inverse = 0, h[V];
  for (int64_t c = first, i = 0; c < job.channels; c += step) {
    job.load_sum(h, n, c, p, job.channels - c);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      mean += h[v];
      if (job.stashed) stash[i++ * threads] = h[v];
    }
  }
  mean = warp_sum(mean) * job.share;
  for (int64_t c = first, i = 0; c < job.channels; c += step) {
    if (!job.stashed) job.load_sum(h, n, c, p, job.channels - c);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const W centred = (job.stashed ? stash[i++ * threads] : h[v]) - mean;
      inverse += c + v < job.channels ? centred * centred : W(0);
    }
  }
  inverse = 1 / sqrt(warp_sum(inverse) * job.share + W(job.eps));
  for (int64_t c = first, i = 0; c < job.channels; c += step) {
    if (!job.stashed) job.load_sum(h, n, c, p, job.channels - c);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (job.stashed) h[v] = stash[i++ * threads];
      if (c + v < job.channels)
        h[v] = rectified((h[v] - mean) * inverse * job.weight_of(c + v) + job.bias_of(c + v),
                         job.floor);
    }
    const int64_t count = job.channels - c;
    store(job.y.template at<typename J::X>(n, c, p), h, count, job.whole && count >= V);
  }
  if (threadIdx.x % warp_size == 0 && job.statistics)
    job.statistics[2 * row] = mean, job.statistics[2 * row + 1] = inverse;
}

// ---- backward, first: the two means over channels that every gradient of a position needs ----

// Of one element: its normal value, and the gradient that comes through the ReLU.
template <class W>
struct Element {
  W normal, grad;

  template <class J>
  __device__ __forceinline__ Element(const J& job, W h, W grad_y, W mean, W inverse, W weight,
                                     W bias)
      : normal((h - mean) * inverse), grad(through_relu(grad_y, normal, weight, bias, job.floor)) {}
};

template <class J>
__global__ void __launch_bounds__(threads, 1) means_planar(const __grid_constant__ J job) {
  using W = typename J::W;
  constexpr int V = J::V;
  const PlanarPlace at(job.planar, job.positions);
  const int64_t count = job.positions - at.first;
  const bool whole = job.whole && count >= V;
  const int64_t where = (at.sample * job.positions + at.first) * 2;
  W statistics[2 * V], sums[2 * V] = {};
  load(statistics, job.statistics + where, 2 * count, job.dense && count >= V);
  for (int64_t c = at.channel; c < job.channels; c += job.planar.depth) {
    const W weight = job.weight_of(c), bias = job.bias_of(c);
    W h[V], g[V];
    job.load_sum(h, at.sample, c, at.first, count);
    load(g, job.y.template at<typename J::X>(at.sample, c, at.first), count, whole);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Element<W> e(job, h[v], g[v], statistics[2 * v], statistics[2 * v + 1], weight, bias);
      sums[2 * v] += e.grad * weight;
      sums[2 * v + 1] += e.grad * weight * e.normal;
    }
  }
  depth_sums(sums, job.planar.width);
  if (threadIdx.x / job.planar.width > 0) return;
#pragma unroll
  for (int i = 0; i < 2 * V; ++i) sums[i] *= job.share;
  store(job.means + where, sums, 2 * count, job.dense && count >= V);
}

template <class J>
__global__ void __launch_bounds__(threads, 1) means_interleaved(const __grid_constant__ J job) {
  using W = typename J::W;
  constexpr int V = J::V;
  const int64_t row = int64_t(blockIdx.x) * warps + threadIdx.x / warp_size;
  if (row >= job.samples * job.positions) return;
  const int64_t n = row / job.positions, p = row % job.positions;
  const W mean = job.statistics[2 * row], inverse = job.statistics[2 * row + 1];
  W mean_g = 0, mean_gn = 0;
  for (int64_t c = threadIdx.x % warp_size * V; c < job.channels; c += warp_size * V) {
    const int64_t count = job.channels - c;
    W h[V], g[V];
    job.load_sum(h, n, c, p, count);
    load(g, job.y.template at<typename J::X>(n, c, p), count, job.whole && count >= V);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (v >= count) break;
      const W weight = job.weight_of(c + v);
      const Element<W> e(job, h[v], g[v], mean, inverse, weight, job.bias_of(c + v));
      mean_g += e.grad * weight;
      mean_gn += e.grad * weight * e.normal;
    }
  }
  mean_g = warp_sum(mean_g), mean_gn = warp_sum(mean_gn);
  if (threadIdx.x % warp_size == 0)
    job.means[2 * row] = mean_g * job.share, job.means[2 * row + 1] = mean_gn * job.share;
}

// ---- backward, second: gradients of x and the map, and what each block adds to those of weight
// and bias ----

// The gradient of h, and its terms of the gradients of weight and bias.
template <class W>
__device__ __forceinline__ W differentiate(const Element<W>& e, W weight, W inverse, W mean_g,
                                           W mean_gn, W& grad_weight, W& grad_bias) {
  grad_weight += e.grad * e.normal;
  grad_bias += e.grad;
  return norm_gradient(e.grad * weight, e.normal, inverse, mean_g, mean_gn);
}

// A block takes some channels and positions of one sample, or of all: the map's gradient sums over
// them.
template <class J>
__global__ void __launch_bounds__(threads, 1) backward_planar(const __grid_constant__ J job) {
  using W = typename J::W;
  constexpr int V = J::V;
  const PlanarPlace at(job.pieces, job.positions);
  const int64_t c = at.channel, p = at.first, count = job.positions - p;
  const bool whole = job.whole && count >= V;
  W sum_weight = 0, sum_bias = 0;
  if (c < job.channels && count > 0) {
    const W weight = job.weight_of(c), bias = job.bias_of(c);
    W grad_map[V] = {};
    const int64_t end = job.per_sample ? at.sample + 1 : job.samples;
    for (int64_t n = at.sample; n < end; ++n) {
      W h[V], g[V], statistics[2 * V], means[2 * V];
      const int64_t where = (n * job.positions + p) * 2;
      job.load_sum(h, n, c, p, count);
      load(g, job.y.template at<typename J::X>(n, c, p), count, whole);
      load(statistics, job.statistics + where, 2 * count, job.dense && count >= V);
      load(means, job.means + where, 2 * count, job.dense && count >= V);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const W inverse = statistics[2 * v + 1];
        const Element<W> e(job, h[v], v < count ? g[v] : W(0), statistics[2 * v], inverse, weight,
                           bias);
        h[v] =
            differentiate(e, weight, inverse, means[2 * v], means[2 * v + 1], sum_weight, sum_bias);
        grad_map[v] += h[v];
      }
      store(job.grad_x.template at<typename J::X>(n, c, p), h, count, whole);
    }
    if (job.grad_map.data) store(job.grad_map.template at<W>(0, c, p), grad_map, count, whole);
  }
  sum_weight = group_sum(sum_weight, job.pieces.width);
  sum_bias = group_sum(sum_bias, job.pieces.width);
  if (c < job.channels && threadIdx.x % job.pieces.width == 0) {
    W* to = job.grad_parts + (at.sample * job.pieces.pieces + at.piece) * 2 * job.channels + c;
    to[0] = sum_weight, to[job.channels] = sum_bias;
  }
}

template <class J>
__global__ void __launch_bounds__(threads, 1) backward_interleaved(const __grid_constant__ J job) {
  using W = typename J::W;
  constexpr int V = J::V;
  const InterleavedPlace at(job.rows, job.positions);
  W* sum_weight = job.grad_parts + int64_t(blockIdx.x) * 2 * job.channels;
  channel_sums<V>(
      job.channels, at.rows, sum_weight, sum_weight + job.channels, [&](int64_t c, int64_t count) {
        const bool whole = job.whole && count >= V;
        W weight[V], bias[V];
        load(weight, static_cast<const W*>(job.weight) + c, count, false);
        load(bias, static_cast<const W*>(job.bias) + c, count, false);
        return [=, &job, &at](int row, W(&weights)[V], W(&biases)[V]) {
          const int64_t p = at.first + row;
          W grad_map[V] = {};
          const int64_t end = job.per_sample ? at.sample + 1 : job.samples;
          for (int64_t n = at.sample; n < end; ++n) {
            W h[V], g[V];
            const W* statistics = job.statistics + (n * job.positions + p) * 2;
            const W* means = job.means + (n * job.positions + p) * 2;
            job.load_sum(h, n, c, p, count);
            load(g, job.y.template at<typename J::X>(n, c, p), count, whole);
#pragma unroll
            for (int v = 0; v < V; ++v) {
              const Element<W> e(job, h[v], g[v], statistics[0], statistics[1], weight[v], bias[v]);
              h[v] = differentiate(e, weight[v], statistics[1], means[0], means[1], weights[v],
                                   biases[v]);
              grad_map[v] += h[v];
            }
            store(job.grad_x.template at<typename J::X>(n, c, p), h, count, whole);
          }
          if (job.grad_map.data)
            store(job.grad_map.template at<W>(0, c, p), grad_map, count, whole);
        };
      });
}

// ---- backward, third: a block sums the parts (rows, 2, C) of warp_size channels ----

template <class W>
__global__ void __launch_bounds__(threads, 1)
    finish_gradients(const W* parts, int64_t rows, int64_t channels, W* grad_weight, W* grad_bias) {
  const int64_t c = int64_t(blockIdx.x) * warp_size + threadIdx.x % warp_size;
  const double weights = column_sum(parts, rows, 2 * channels, c);
  __syncthreads();
  const double biases = column_sum(parts, rows, 2 * channels, c + channels);
  if (threadIdx.x < warp_size && c < channels)
    grad_weight[c] = W(weights), grad_bias[c] = W(biases);
}

// Calls run with a null Job* that tells the element type.
template <class Run>
auto with_type(DType x, Run run) {
  if (x == DType::float32) return run((Job<float>*)nullptr);
  if (x == DType::float64) return run((Job<double>*)nullptr);
  if (x == DType::bfloat16) return run((Job<bfloat16>*)nullptr);
  if (x == DType::float16) return run((Job<float16>*)nullptr);
  throw std::invalid_argument("channel_norm: no kernel for this element type");
}

int64_t warp_blocks(const Norm& norm) {
  return (norm.samples * norm.positions + warps - 1) / warps;
}

}  // namespace

int64_t norm_scratch(const Norm& norm, DType x, bool with_map) {
  return with_type(x, [&](auto* tag) {
    return std::remove_reference_t<decltype(*tag)>(norm, nullptr, with_map).bytes;
  });
}

void norm_forward_cuda(const Norm& norm, Tensor x, Tensor bias_map, Tensor y, void* statistics,
                       void*, void* stream) {
  with_type(x.dtype, [&](auto* tag) {
    using J = std::remove_reference_t<decltype(*tag)>;
    using W = typename J::W;
    constexpr int V = J::V;
    J job(norm, nullptr, bias_map.data);
    job.x = x, job.map = bias_map, job.y = y, job.statistics = static_cast<W*>(statistics);
    job.whole = aligned({x, bias_map, y});
    if (job.interleaved) {
      const int64_t stash = (job.channels + warp_size * V - 1) / (warp_size * V) * V * threads;
      job.stashed = stash * sizeof(W) <= shared_limit;
      launch(forward_interleaved<J>, warp_blocks(job), job.stashed ? stash * sizeof(W) : 0, stream,
             job);
      return;
    }
    // Narrower blocks where that makes their channels fit.
    const auto stash = [&](const Planar& cut) {
      return (job.channels + cut.depth - 1) / cut.depth * V * threads * int64_t(sizeof(W));
    };
    for (int width = max_depth_width; width >= 1 && !job.stashed; width /= 2) {
      const Planar cut(job.channels, job.positions, V, width, 1, true);
      if (stash(cut) <= int64_t(shared_limit)) job.planar = cut, job.stashed = true;
    }
    launch(forward_planar<J>, job.samples * job.planar.blocks(),
           job.stashed ? stash(job.planar) : 0, stream, job);
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
    job.whole = aligned({grad_y, x, bias_map, grad_x, grad_map});
    if (job.interleaved) {
      launch(means_interleaved<J>, warp_blocks(job), 0, stream, job);
      launch(backward_interleaved<J>, job.sample_groups() * job.rows.tiles, 0, stream, job);
    } else {
      launch(means_planar<J>, job.samples * job.planar.blocks(), 0, stream, job);
      launch(backward_planar<J>, job.sample_groups() * job.pieces.blocks(), 0, stream, job);
    }
    launch(finish_gradients<W>, (job.channels + warp_size - 1) / warp_size, 0, stream,
           static_cast<const W*>(job.grad_parts), job.grad_rows(), job.channels,
           static_cast<W*>(grad_weight), static_cast<W*>(grad_bias));
  });
}

}  // namespace msflow
