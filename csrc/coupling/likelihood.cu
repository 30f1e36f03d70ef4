// The coupling's likelihood map on CUDA. Squares are summed over channels as they are computed.
#include "coupling/job.cuh"

namespace msflow {
namespace {

// The threads of a block are spread along positions and channels.
template <class J>
__global__ void __launch_bounds__(threads, 1) likelihood_contiguous(const __grid_constant__ J job) {
  using W = typename J::W;
  constexpr int V = J::V;
  const ContiguousPlace at(job.contiguous_grid, job.positions);
  const int64_t count = job.positions - at.first;
  W squares[V] = {}, log_scales = 0;  // results() adds to log_scales, which is not used here
  for (int64_t c = at.channel; c < job.channels(); c += job.contiguous_grid.depth) {
    W v[V];
    results(job, Affine<J>(job, c), at.sample, c, at.first, count, v, log_scales);
#pragma unroll
    for (int i = 0; i < V; ++i) squares[i] += v[i] * v[i];
  }
  depth_sums(squares, job.contiguous_grid.width);
#pragma unroll
  for (int i = 0; i < V; ++i) squares[i] *= W(-0.5 / double(job.channels()));
  if (threadIdx.x / job.contiguous_grid.width == 0)
    store(job.likelihoods + at.sample * job.positions + at.first, squares, count, false);
}

// A warp processes every 8th position of its block.
template <class J>
__global__ void __launch_bounds__(threads, 1)
    likelihood_channels_last(const __grid_constant__ J job) {
  using W = typename J::W;
  constexpr int V = J::V, rows_per_warp = likelihood_rows / warps;
  const ChannelsLastPlace at(job.rows, job.positions);
  const int first = int(threadIdx.x) / warp_size;
  W squares[rows_per_warp] = {}, log_scales = 0;  // log_scales is not used here
  const auto add_half = [&](int64_t begin, int64_t size) {
    for (int64_t k = threadIdx.x % warp_size * V; k < size; k += warp_size * V) {
      const int64_t c = begin + k, count = size - k;
      const Affine<J> vector(job, c, count);
#pragma unroll
      for (int r = 0; r < rows_per_warp; ++r) {
        const int row = first + r * warps;
        if (row >= at.rows) break;
        W v[V];
        results(job, vector, at.sample, c, at.first + row, count, v, log_scales);
#pragma unroll
        for (int i = 0; i < V; ++i) squares[r] += v[i] * v[i];
      }
    }
  };
  add_half(0, job.conditioning);
  add_half(job.conditioning, job.transformed);
#pragma unroll
  for (int r = 0; r < rows_per_warp; ++r) {
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
    job.vectorized = aligned({x1, x2, a}) && subnet_aligned(job);
    launch(job.channels_last ? likelihood_channels_last<J> : likelihood_contiguous<J>, job.blocks(),
           0, stream, job);
  });
}

}  // namespace msflow
