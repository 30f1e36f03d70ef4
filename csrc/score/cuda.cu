// Sums of squares over channels on CUDA.
#include "common/grid.cuh"
#include "common/reduction.cuh"
#include "common/vector_access.cuh"
#include "score/score.h"

namespace msflow {
namespace {

template <class X_>
struct Squares {
  using X = X_;
  using W = accumulation_t<X>;
  static constexpr int V = packet_of<X>;

  int64_t samples, channels, positions;
  bool channels_last;
  Tensor z;
  bool vectorized;  // packets are aligned
  W* per_position;
  W* parts = nullptr;  // (N, blocks of a sample)
  ContiguousGrid contiguous_grid;
  ChannelsLastGrid rows;

  Squares(int64_t samples, int64_t channels, int64_t positions, bool channels_last)
      : samples(samples),
        channels(channels),
        positions(positions),
        channels_last(channels_last),
        contiguous_grid(grid_with_all_channels(channels, positions, V)),
        rows(positions, 1, std::clamp<int64_t>(positions / 16, warps, 32)) {}

  int64_t sample_blocks() const { return channels_last ? rows.tiles : contiguous_grid.blocks(); }
};

// Calls add with the V values of each packet. The packets are aligned and `step` elements apart.
// The loads of several packets overlap.
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
      accumulation_t<X> values[V];
      unpack(values, words[i]);
      add(values);
    }
  }
}

template <class X>
__device__ __forceinline__ accumulation_t<X> square(X x) {
  const accumulation_t<X> value = load(x);
  return value * value;
}

// The threads of a block are spread along positions and channels.
template <class J>
__global__ void __launch_bounds__(threads, 1)
    square_sums_contiguous(const __grid_constant__ J job) {
  using X = typename J::X;
  using W = typename J::W;
  constexpr int V = J::V;
  const ContiguousPlace at(job.contiguous_grid, job.positions);
  const int64_t count = job.positions - at.first, depth = job.contiguous_grid.depth;
  W sums[V] = {};
  if (job.vectorized && count >= V) {
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
  depth_sums(sums, job.contiguous_grid.width);
  const bool first_row = threadIdx.x / job.contiguous_grid.width == 0;
  if (first_row && job.per_position)
    store(job.per_position + at.sample * job.positions + at.first, sums, count, false);
  W sum = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) sum += first_row ? sums[v] : W(0);
  sum = block_sum(sum);
  if (threadIdx.x == 0) job.parts[blockIdx.x] = sum;
}

// A warp processes every 8th position of its block.
template <class J>
__global__ void __launch_bounds__(threads, 1)
    square_sums_channels_last(const __grid_constant__ J job) {
  using X = typename J::X;
  using W = typename J::W;
  constexpr int V = J::V;
  const ChannelsLastPlace at(job.rows, job.positions);
  const int lane = int(threadIdx.x) % warp_size;
  const int64_t in_packets =
      job.vectorized ? job.channels / V : 0;  // the other elements one by one
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

// Calls run with a null Squares* whose type holds the element type.
template <class Run>
auto with_type(DType z, Run run) {
  if (z == DType::float32) return run((Squares<float>*)nullptr);
  if (z == DType::float64) return run((Squares<double>*)nullptr);
  if (z == DType::bfloat16) return run((Squares<bfloat16>*)nullptr);
  if (z == DType::float16) return run((Squares<float16>*)nullptr);
  throw std::invalid_argument("score: no kernel for this element type");
}

}  // namespace

int64_t square_sums_scratch(int64_t samples, int64_t channels, int64_t positions,
                            bool channels_last, DType z) {
  return with_type(z, [&](auto* tag) {
    using J = std::remove_reference_t<decltype(*tag)>;
    return samples * J(samples, channels, positions, channels_last).sample_blocks() *
           int64_t(sizeof(typename J::W));
  });
}

void square_sums_cuda(int64_t samples, int64_t channels, int64_t positions, bool channels_last,
                      Tensor z, void* per_position, void* per_sample, void* scratch, void* stream) {
  with_type(z.dtype, [&](auto* tag) {
    using J = std::remove_reference_t<decltype(*tag)>;
    using W = typename J::W;
    J job(samples, channels, positions, channels_last);
    require_memory(scratch, samples * job.sample_blocks() * int64_t(sizeof(W)));
    job.z = z, job.vectorized = aligned({z});
    job.per_position = static_cast<W*>(per_position), job.parts = static_cast<W*>(scratch);
    launch(channels_last ? square_sums_channels_last<J> : square_sums_contiguous<J>,
           samples * job.sample_blocks(), 0, stream, job);
    if (!per_sample) return;
    launch(finish_samples<W>, samples, 0, stream, static_cast<const W*>(job.parts),
           job.sample_blocks(), static_cast<W*>(per_sample));
  });
}

}  // namespace msflow
