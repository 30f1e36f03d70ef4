// The coupling's likelihood map on CUDA: squares are summed over channels where they arise.
#include "coupling/job.cuh"

namespace msflow {
namespace {

// Threads along positions, and along channels.
template <class J>
__global__ void __launch_bounds__(threads, 1) likelihood_planar(const __grid_constant__ J job) {
  using W = typename J::W;
  constexpr int V = J::V;
  const PlanarPlace at(job.planar, job.positions);
  const int64_t count = job.positions - at.first;
  W squares[V] = {}, log_scales = 0;  // the latter unread
  for (int64_t c = at.channel; c < job.channels(); c += job.planar.depth) {
    W v[V];
    results(job, Affine<J>(job, c), at.sample, c, at.first, count, v, log_scales);
#pragma unroll
    for (int i = 0; i < V; ++i) squares[i] += v[i] * v[i];
  }
  depth_sums(squares, job.planar.width);
#pragma unroll
  for (int i = 0; i < V; ++i) squares[i] *= W(-0.5 / double(job.channels()));
  if (threadIdx.x / job.planar.width == 0)
    store(job.likelihoods + at.sample * job.positions + at.first, squares, count, false);
}

// A warp takes every 8th position of its block.
template <class J>
__global__ void __launch_bounds__(threads, 1)
    likelihood_interleaved(const __grid_constant__ J job) {
  using W = typename J::W;
  constexpr int V = J::V, mine = likelihood_rows / warps;
  const InterleavedPlace at(job.rows, job.positions);
  const int first = int(threadIdx.x) / warp_size;
  W squares[mine] = {}, log_scales = 0;  // the latter unread
  const auto add_half = [&](int64_t begin, int64_t size) {
    for (int64_t k = threadIdx.x % warp_size * V; k < size; k += warp_size * V) {
      const int64_t c = begin + k, count = size - k;
      const Affine<J> vector(job, c, count);
#pragma unroll
      for (int r = 0; r < mine; ++r) {
        const int row = first + r * warps;
        if (row >= at.rows) break;
        W v[V];
        results(job, vector, at.sample, c, at.first + row, count, v, log_scales);
#pragma unroll
        for (int i = 0; i < V; ++i) squares[r] += v[i] * v[i];
      }
    }
  };
  add_half(0, job.passive);
  add_half(job.passive, job.active);
#pragma unroll
  for (int r = 0; r < mine; ++r) {
    const int row = first + r * warps;
    const W likelihood = warp_sum(squares[r]) * W(-0.5 / double(job.channels()));
    if (threadIdx.x % warp_size == 0 && row < at.rows)
      job.likelihoods[at.sample * job.positions + at.first + row] = likelihood;
  }
}

}  // namespace

void coupling_likelihood_cuda(const Coupling& coupling, Tensor x1, Tensor x2, Tensor a,
                              void* likelihoods, void*, void* stream) {
  with_types(x2.dtype, a.dtype, [&](auto* tag) {
    using J = std::remove_reference_t<decltype(*tag)>;
    J job(coupling, nullptr, Pass::likelihood);
    job.x1 = x1, job.x2 = x2, job.a = a;
    job.likelihoods = static_cast<typename J::W*>(likelihoods);
    job.whole = aligned({x1, x2, a}) && subnet_aligned(job);
    launch(job.interleaved ? likelihood_interleaved<J> : likelihood_planar<J>, job.blocks(), 0,
           stream, job);
  });
}

}  // namespace msflow
