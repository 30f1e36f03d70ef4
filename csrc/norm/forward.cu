// The channel norm's forward pass on CUDA, in one kernel.
#include "norm/job.cuh"

namespace msflow {
namespace {

// Every position's channels are read once, and wait in shared memory for mean and
// deviation.

// ---- planar: threads along positions, and along channels ----

template <class J>
__global__ void __launch_bounds__(threads, 1) forward_planar(const __grid_constant__ J job) {
  using W = typename J::W;
  constexpr int V = J::V;
  const PlanarPlace at(job.planar, job.positions);
  const int64_t count = job.positions - at.first, step = job.planar.depth;
  W* stash = shared_memory<W>() + threadIdx.x;  // a thread reads only what it wrote
  W mean[V] = {}, inverse[V] = {}, h[V];
  for (int64_t c = at.channel, i = 0; c < job.channels; c += step) {
    job.load_sum(h, at.sample, c, at.first, count, job.whole && count >= V);
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
    if (!job.stashed) job.load_sum(h, at.sample, c, at.first, count, job.whole && count >= V);
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
    if (!job.stashed) job.load_sum(h, at.sample, c, at.first, count, job.whole && count >= V);
    const W weight = job.weights()[c], bias = job.biases()[c];
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

// ---- interleaved: a warp per position ----

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
    job.load_sum(h, n, c, p, job.channels - c, job.whole);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      mean += h[v];
      if (job.stashed) stash[i++ * threads] = h[v];
    }
  }
  mean = warp_sum(mean) * job.share;
  for (int64_t c = first, i = 0; c < job.channels; c += step) {
    if (!job.stashed) job.load_sum(h, n, c, p, job.channels - c, job.whole);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const W centred = (job.stashed ? stash[i++ * threads] : h[v]) - mean;
      inverse += c + v < job.channels ? centred * centred : W(0);
    }
  }
  inverse = 1 / sqrt(warp_sum(inverse) * job.share + W(job.eps));
  for (int64_t c = first, i = 0; c < job.channels; c += step) {
    if (!job.stashed) job.load_sum(h, n, c, p, job.channels - c, job.whole);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (job.stashed) h[v] = stash[i++ * threads];
      if (c + v < job.channels)
        h[v] = rectified((h[v] - mean) * inverse * job.weights()[c + v] + job.biases()[c + v],
                         job.floor);
    }
    const int64_t count = job.channels - c;
    store(job.y.template at<typename J::X>(n, c, p), h, count, job.whole);
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
    J job(norm, nullptr, bias_map.data);
    job.x = x, job.map = bias_map, job.y = y, job.statistics = static_cast<W*>(statistics);
    job.look({x, bias_map, y});
    if (job.interleaved) {
      const int64_t stash = job.lane_packets() * V * threads * int64_t(sizeof(W));
      job.stashed = stash <= int64_t(shared_limit);
      launch(forward_interleaved<J>, job.row_blocks(), job.stashed ? stash : 0, stream, job);
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

}  // namespace msflow
