// The channel norm's forward pass on CUDA, in one kernel.
#include "norm/job.cuh"

namespace msflow {
namespace {

// The channels of a position are kept until mean and deviation are known: in registers if they fit,
// otherwise in shared memory. If they do not fit there either, they are read again.

// ---- contiguous: the threads of a block are spread along positions and channels ----

// A thread keeps up to K packets in registers.
template <class J, int K>
__global__ void __launch_bounds__(threads, 2)
    forward_contiguous_in_registers(const __grid_constant__ J job) {
  using X = typename J::X;
  using W = typename J::W;
  constexpr int V = J::V;
  const ContiguousPlace at(job.contiguous_grid, job.positions);
  const int64_t p = at.first < job.positions ? at.first : job.positions - V;
  const auto own = [&](int k) { return at.channel + int64_t(k) * job.contiguous_grid.depth; };
  const auto has = [&](int k) { return own(k) < job.channels; };
  W h[K][V], mean[V] = {}, inverse[V] = {}, weight[K], bias[K];
  Words<X, V> x[K];
  // A thread with fewer packets reads the last channel again, because a conditional load would not
  // overlap with the others.
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t c = has(k) ? own(k) : job.channels - 1;
    x[k] = fetch<V>(job.x.template at<X>(at.sample, c, p), V, true);
    job.load_map(h[k], c, p, V, true);
    weight[k] = job.weights()[c], bias[k] = job.biases()[c];
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    add(h[k], x[k]);
#pragma unroll
    for (int v = 0; v < V; ++v) mean[v] += has(k) ? h[k][v] : W(0);
  }
  depth_sums(mean, job.contiguous_grid.width);
#pragma unroll
  for (int v = 0; v < V; ++v) mean[v] *= job.mean_factor;
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int v = 0; v < V; ++v) {
      h[k][v] -= mean[v];
      inverse[v] += has(k) ? h[k][v] * h[k][v] : W(0);
    }
  depth_sums(inverse, job.contiguous_grid.width);
  if (at.first >= job.positions) return;
#pragma unroll
  for (int v = 0; v < V; ++v) inverse[v] = 1 / sqrt(inverse[v] * job.mean_factor + W(job.eps));
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (!has(k)) break;
#pragma unroll
    for (int v = 0; v < V; ++v)
      h[k][v] = rectified(h[k][v] * inverse[v] * weight[k] + bias[k], job.floor);
    store(job.y.template at<X>(at.sample, own(k), p), h[k], V, true);
  }
  if (threadIdx.x / job.contiguous_grid.width > 0 || !job.statistics) return;
  W statistics[2 * V];
#pragma unroll
  for (int v = 0; v < V; ++v) statistics[2 * v] = mean[v], statistics[2 * v + 1] = inverse[v];
  store(job.statistics + (at.sample * job.positions + p) * 2, statistics, 2 * V, true);
}

template <class J>
__global__ void __launch_bounds__(threads, 1) forward_contiguous(const __grid_constant__ J job) {
  using W = typename J::W;
  constexpr int V = J::V;
  const ContiguousPlace at(job.contiguous_grid, job.positions);
  const int64_t count = job.positions - at.first, step = job.contiguous_grid.depth;
  W* cache = shared_memory<W>() + threadIdx.x;  // A thread reads only what it wrote: no barrier.
  W mean[V] = {}, inverse[V] = {}, h[V];
  for (int64_t c = at.channel, i = 0; c < job.channels; c += step) {
    job.load_sum(h, at.sample, c, at.first, count, job.vectorized && count >= V);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      mean[v] += h[v];
      if (job.cached) cache[i++ * threads] = h[v];
    }
  }
  depth_sums(mean, job.contiguous_grid.width);
#pragma unroll
  for (int v = 0; v < V; ++v) mean[v] *= job.mean_factor;
  for (int64_t c = at.channel, i = 0; c < job.channels; c += step) {
    if (!job.cached) job.load_sum(h, at.sample, c, at.first, count, job.vectorized && count >= V);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const W centred = (job.cached ? cache[i++ * threads] : h[v]) - mean[v];
      inverse[v] += centred * centred;
    }
  }
  depth_sums(inverse, job.contiguous_grid.width);
#pragma unroll
  for (int v = 0; v < V; ++v) inverse[v] = 1 / sqrt(inverse[v] * job.mean_factor + W(job.eps));
  for (int64_t c = at.channel, i = 0; c < job.channels; c += step) {
    if (!job.cached) job.load_sum(h, at.sample, c, at.first, count, job.vectorized && count >= V);
    const W weight = job.weights()[c], bias = job.biases()[c];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (job.cached) h[v] = cache[i++ * threads];
      h[v] = rectified((h[v] - mean[v]) * inverse[v] * weight + bias, job.floor);
    }
    store(job.y.template at<typename J::X>(at.sample, c, at.first), h, count,
          job.vectorized && count >= V);
  }
  if (threadIdx.x / job.contiguous_grid.width > 0 || !job.statistics) return;
  W* to = job.statistics + (at.sample * job.positions + at.first) * 2;
#pragma unroll
  for (int v = 0; v < V; ++v)
    if (v < count) to[2 * v] = mean[v], to[2 * v + 1] = inverse[v];
}

// ---- channels_last: a warp per position ----

// A lane keeps up to K packets in registers. If registers allow, it loads the next row while it
// computes this one.
template <class J, int K>
__global__ void __launch_bounds__(threads, 2)
    forward_channels_last_in_registers(const __grid_constant__ J job) {
  using X = typename J::X;
  using W = typename J::W;
  constexpr int V = J::V;
  const WarpRows<J, K> rows(job);
  if (rows.first >= rows.last) return;
  Words<X, V> x[K];
  if (rows.has_spare_registers) rows.read(x, job.x, rows.first);
  for (int64_t n = rows.first; n < rows.last; ++n) {
    W h[K][V], statistics[2] = {};
    W& mean = statistics[0];
    W& inverse = statistics[1];
    if (!rows.has_spare_registers) rows.read(x, job.x, n);
    rows.sum(h, x);
    if (rows.has_spare_registers && n + 1 < rows.last) rows.read(x, job.x, n + 1);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      W sum = 0;
#pragma unroll
      for (int v = 0; v < V; ++v) sum += h[k][v];
      mean += rows.has(k) ? sum : W(0);
    }
    mean = warp_sum(mean) * job.mean_factor;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      W sum = 0;
#pragma unroll
      for (int v = 0; v < V; ++v) h[k][v] -= mean, sum += h[k][v] * h[k][v];
      inverse += rows.has(k) ? sum : W(0);
    }
    inverse = 1 / sqrt(warp_sum(inverse) * job.mean_factor + W(job.eps));
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int v = 0; v < V; ++v)
        h[k][v] = rectified(h[k][v] * inverse * rows.weight[k][v] + rows.bias[k][v], job.floor);
      if (rows.has(k))
        store(job.y.template at<X>(n, rows.channel(k), rows.position), h[k], V, true);
    }
    if (threadIdx.x % warp_size == 0 && job.statistics)
      store(job.statistics + (n * job.positions + rows.position) * 2, statistics, 2, true);
  }
}

template <class J>
__global__ void __launch_bounds__(threads, 1) forward_channels_last(const __grid_constant__ J job) {
  using W = typename J::W;
  constexpr int V = J::V;
  const int64_t row = int64_t(blockIdx.x) * warps + threadIdx.x / warp_size;
  if (row >= job.samples * job.positions) return;
  const int64_t n = row / job.positions, p = row % job.positions;
  const int64_t first = threadIdx.x % warp_size * V, step = warp_size * V;
  W* cache = shared_memory<W>() + threadIdx.x;
  W mean = 0, inverse = 0, h[V];
  for (int64_t c = first, i = 0; c < job.channels; c += step) {
    job.load_sum(h, n, c, p, job.channels - c, job.vectorized);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      mean += h[v];
      if (job.cached) cache[i++ * threads] = h[v];
    }
  }
  mean = warp_sum(mean) * job.mean_factor;
  for (int64_t c = first, i = 0; c < job.channels; c += step) {
    if (!job.cached) job.load_sum(h, n, c, p, job.channels - c, job.vectorized);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const W centred = (job.cached ? cache[i++ * threads] : h[v]) - mean;
      inverse += c + v < job.channels ? centred * centred : W(0);
    }
  }
  inverse = 1 / sqrt(warp_sum(inverse) * job.mean_factor + W(job.eps));
  for (int64_t c = first, i = 0; c < job.channels; c += step) {
    if (!job.cached) job.load_sum(h, n, c, p, job.channels - c, job.vectorized);
    const int64_t count = job.channels - c;
    W weight[V], bias[V];
    load(weight, job.weights() + c, count, job.vectorized);
    load(bias, job.biases() + c, count, job.vectorized);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (job.cached) h[v] = cache[i++ * threads];
      h[v] = rectified((h[v] - mean) * inverse * weight[v] + bias[v], job.floor);
    }
    store(job.y.template at<typename J::X>(n, c, p), h, count, job.vectorized);
  }
  if (threadIdx.x % warp_size == 0 && job.statistics)
    job.statistics[2 * row] = mean, job.statistics[2 * row + 1] = inverse;
}

}  // namespace

void norm_forward_cuda(const Norm& norm, Tensor x, Tensor bias_map, Tensor y, void* statistics,
                       void*, void* stream) {
  with_type(x.dtype, [&](auto* tag) {
    using J = std::remove_reference_t<decltype(*tag)>;
    using W = typename J::W;
    constexpr int V = J::V;
    J job(norm, nullptr, false);
    job.x = x, job.map = bias_map, job.y = y, job.statistics = static_cast<W*>(statistics);
    job.set_vectorized({x, bias_map, y});
    if (job.channels_last) {
      const bool launched =
          job.vectorized && with_packets<V, 24>(job.lane_packets(), [&](auto packets) {
            launch(forward_channels_last_in_registers<J, decltype(packets)::value>,
                   job.warp_blocks(), 0, stream, job);
          });
      if (launched) return;
      const int64_t cache_bytes = job.lane_packets() * V * threads * int64_t(sizeof(W));
      job.cached = cache_bytes <= int64_t(shared_limit);
      launch(forward_channels_last<J>, job.row_blocks(), job.cached ? cache_bytes : 0, stream, job);
      return;
    }
    // A narrower block has more threads along channels, so that fewer packets per thread suffice.
    for (int width = job.contiguous_grid.width; job.vectorized && width >= 1; width /= 2) {
      J narrower = job;
      narrower.contiguous_grid = ContiguousGrid(job.channels, job.positions, V, width, 1, true);
      const int depth = narrower.contiguous_grid.depth;
      if (with_packets<V, 40>((job.channels + depth - 1) / depth, [&](auto packets) {
            launch(forward_contiguous_in_registers<J, decltype(packets)::value>,
                   narrower.samples * narrower.contiguous_grid.blocks(), 0, stream, narrower);
          }))
        return;
    }
    const auto cache_bytes = [&](const ContiguousGrid& grid) {
      return (job.channels + grid.depth - 1) / grid.depth * V * threads * int64_t(sizeof(W));
    };
    for (int width = max_depth_width; width >= 1 && !job.cached; width /= 2) {
      const ContiguousGrid grid(job.channels, job.positions, V, width, 1, true);
      if (cache_bytes(grid) <= int64_t(shared_limit)) job.contiguous_grid = grid, job.cached = true;
    }
    launch(forward_contiguous<J>, job.samples * job.contiguous_grid.blocks(),
           job.cached ? cache_bytes(job.contiguous_grid) : 0, stream, job);
  });
}

}  // namespace msflow
