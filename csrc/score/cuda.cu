// Sums of squares over channels on CUDA.
#include "common/launch.cuh"
#include "score/score.h"

namespace msflow {
namespace {

template <class X_>
struct Squares {
  using X = X_;
  using W = wide_t<X>;
  static constexpr int V = packet_of<X>;

  int64_t samples, channels, positions;
  bool interleaved;
  Tensor z;
  bool whole;  // packets are aligned
  W* per_position;
  W* parts = nullptr;  // (N, blocks of a sample)
  Planar planar;
  Interleaved rows;

  Squares(int64_t samples, int64_t channels, int64_t positions, bool interleaved)
      : samples(samples),
        channels(channels),
        positions(positions),
        interleaved(interleaved),
        planar(planar_of_all_channels(channels, positions, V)),
        rows(positions, 1, std::clamp<int64_t>(positions / 16, warps, 32)) {}

  int64_t sample_blocks() const { return interleaved ? rows.tiles : planar.blocks(); }
};

// Calls add with V numbers of aligned packets `step` elements apart, of which a thread waits for
// several at a time.
template <int V, class X, class Add>
__device__ __forceinline__ void each_packet(const X* from, int64_t packets, int64_t step, Add add) {
  constexpr int in_flight = 4;
  for (int64_t k = 0; k < packets; k += in_flight) {
    Words<X, V> words[in_flight];
#pragma unroll
    for (int i = 0; i < in_flight; ++i)
      if (k + i < packets) words[i] = fetch<V>(from + (k + i) * step, V, true);
#pragma unroll
    for (int i = 0; i < in_flight; ++i) {
      if (k + i >= packets) break;
      wide_t<X> values[V];
      unpack(values, words[i]);
      add(values);
    }
  }
}

template <class X>
__device__ __forceinline__ wide_t<X> square(X x) {
  const wide_t<X> wide = load(x);
  return wide * wide;
}

// Threads along positions, and along channels.
template <class J>
__global__ void __launch_bounds__(threads, 1) square_sums_planar(const __grid_constant__ J job) {
  using X = typename J::X;
  using W = typename J::W;
  constexpr int V = J::V;
  const PlanarPlace at(job.planar, job.positions);
  const int64_t count = job.positions - at.first, depth = job.planar.depth;
  W sums[V] = {};
  if (job.whole && count >= V) {
    const X* z = job.z.template at<X>(at.sample, at.channel, at.first);
    each_packet<V>(z, (job.channels - at.channel + depth - 1) / depth, depth * job.z.c,
                   [&](const W(&values)[V]) {
#pragma unroll
                     for (int v = 0; v < V; ++v) sums[v] += values[v] * values[v];
                   });
  } else {
#pragma unroll 1
    for (int64_t c = at.channel; c < job.channels; c += depth) {
      const X* z = job.z.template at<X>(at.sample, c, at.first);
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (v < count) sums[v] += square(z[v]);
    }
  }
  depth_sums(sums, job.planar.width);
  const bool leads = threadIdx.x / job.planar.width == 0;
  if (leads && job.per_position)
    store(job.per_position + at.sample * job.positions + at.first, sums, count, false);
  W sum = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) sum += leads ? sums[v] : W(0);
  sum = block_sum(sum);
  if (threadIdx.x == 0) job.parts[blockIdx.x] = sum;
}

// A warp takes every 8th position of its block.
template <class J>
__global__ void __launch_bounds__(threads, 1)
    square_sums_interleaved(const __grid_constant__ J job) {
  using X = typename J::X;
  using W = typename J::W;
  constexpr int V = J::V;
  const InterleavedPlace at(job.rows, job.positions);
  const int lane = int(threadIdx.x) % warp_size;
  const int64_t in_packets = job.whole ? job.channels / V : 0;  // beyond them one by one
  W total = 0;
  for (int row = int(threadIdx.x) / warp_size; row < at.rows; row += warps) {
    const X* z = job.z.template at<X>(at.sample, 0, at.first + row);
    W sum = 0;
    each_packet<V>(z + lane * V, (in_packets - lane + warp_size - 1) / warp_size, warp_size * V,
                   [&](const W(&values)[V]) {
#pragma unroll
                     for (int v = 0; v < V; ++v) sum += values[v] * values[v];
                   });
#pragma unroll 1
    for (int64_t c = in_packets * V + lane; c < job.channels; c += warp_size) sum += square(z[c]);
    sum = warp_sum(sum);
    if (lane > 0) continue;
    total += sum;
    if (job.per_position) job.per_position[at.sample * job.positions + at.first + row] = sum;
  }
  total = block_sum(total);
  if (threadIdx.x == 0) job.parts[blockIdx.x] = total;
}

template <class W>
__global__ void __launch_bounds__(threads, 1)
    finish_samples(const W* parts, int64_t size, W* per_sample) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < size; i += threads) sum += double(parts[blockIdx.x * size + i]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) per_sample[blockIdx.x] = W(sum);
}

// Calls run with a null Squares* that tells the element type.
template <class Run>
auto with_type(DType z, Run run) {
  if (z == DType::float32) return run((Squares<float>*)nullptr);
  if (z == DType::float64) return run((Squares<double>*)nullptr);
  if (z == DType::bfloat16) return run((Squares<bfloat16>*)nullptr);
  if (z == DType::float16) return run((Squares<float16>*)nullptr);
  throw std::invalid_argument("score: no kernel for this element type");
}

}  // namespace

int64_t square_sums_scratch(int64_t samples, int64_t channels, int64_t positions, bool interleaved,
                            DType z) {
  return with_type(z, [&](auto* tag) {
    using J = std::remove_reference_t<decltype(*tag)>;
    return samples * J(samples, channels, positions, interleaved).sample_blocks() *
           int64_t(sizeof(typename J::W));
  });
}

void square_sums_cuda(int64_t samples, int64_t channels, int64_t positions, bool interleaved,
                      Tensor z, void* per_position, void* per_sample, void* scratch, void* stream) {
  with_type(z.dtype, [&](auto* tag) {
    using J = std::remove_reference_t<decltype(*tag)>;
    using W = typename J::W;
    J job(samples, channels, positions, interleaved);
    require_memory(scratch, samples * job.sample_blocks() * int64_t(sizeof(W)));
    job.z = z, job.whole = aligned({z});
    job.per_position = static_cast<W*>(per_position), job.parts = static_cast<W*>(scratch);
    launch(interleaved ? square_sums_interleaved<J> : square_sums_planar<J>,
           samples * job.sample_blocks(), 0, stream, job);
    if (!per_sample) return;
    launch(finish_samples<W>, samples, 0, stream, static_cast<const W*>(job.parts),
           job.sample_blocks(), static_cast<W*>(per_sample));
  });
}

}  // namespace msflow
