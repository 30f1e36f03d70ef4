// A call of the channel norm on CUDA: its operands, and how they are split into blocks.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "common/grid.cuh"
#include "common/reduction.cuh"
#include "common/vector_access.cuh"
#include "norm/formula.h"
#include "norm/norm.h"

namespace msflow {
namespace {

// Kernels that use many registers ask for two blocks per multiprocessor. Otherwise ptxas would use
// a few more registers than two blocks leave. With the limit, nothing spills.

template <class X_>
struct Job : Norm {
  using X = X_;
  using W = accumulation_t<X>;
  static constexpr int V = packet_of<X>;

  Tensor x, map, y, grad_x, grad_map;  // y: result, or its gradient in the backward
  W* statistics = nullptr;             // (N, P, 2): mean, 1 / deviation
  // (N, P, 2): means over channels of the gradient, and of the gradient times the normal value.
  W* means = nullptr;
  W* grad_parts = nullptr;         // (grad_rows, 2, C)
  W floor;                         // of the ReLU, or -infinity
  W mean_factor;                   // 1 / C
  bool vectorized = false;         // every packet has V elements and is aligned to 16 bytes
  bool cached = false;             // the channels of a block fit in shared memory
  int64_t warp_samples;            // samples that a warp processes, at one position
  int block_samples;               // samples of a block of the backward's second kernel
  ContiguousGrid contiguous_grid;  // blocks hold all channels
  ContiguousGrid backward_grid;    // blocks hold some channels: for the backward's second kernel
  ChannelsLastGrid rows;

  Job(const Norm& norm, void* memory, bool with_map)
      : Norm(norm),
        floor(relu ? W(0) : -std::numeric_limits<W>::infinity()),
        mean_factor(W(1) / W(channels)),
        warp_samples(std::max<int64_t>(1, samples * positions / target_warps)),
        block_samples(with_map ? std::max(1, int(samples)) : samples_in_flight),
        contiguous_grid(channels, positions, V, depth_width(), 1, true),
        backward_grid(channels, positions, V, max_depth_width, 1, false),
        rows(positions, 1, rows_of_block()) {
    if (with_map && samples > std::numeric_limits<int>::max())
      throw std::invalid_argument("channel_norm: more samples than a block counts");
    Scratch scratch(memory);
    means = scratch.take<W>(samples * positions * 2);
    grad_parts = scratch.take<W>(grad_rows() * 2 * channels);
    bytes = scratch.bytes();
  }

  int64_t bytes;  // of scratch memory
  // Returns the number of samples of the block that starts at `first`. 32 bits save a register.
  __device__ int samples_from(int64_t first) const {
    return samples - first < block_samples ? int(samples - first) : block_samples;
  }
  HD int64_t sample_groups() const { return (samples + block_samples - 1) / block_samples; }
  int64_t grad_rows() const {
    return sample_groups() * (channels_last ? rows.tiles : backward_grid.pieces);
  }

  // Enough warps for 132 multiprocessors. A warp processes as many samples as that allows.
  static constexpr int64_t target_warps = 4096;
  int64_t warp_groups() const { return (samples + warp_samples - 1) / warp_samples; }
  int64_t warp_blocks() const { return (warp_groups() * positions + warps - 1) / warps; }
  int64_t row_blocks() const { return (samples * positions + warps - 1) / warps; }
  int64_t lane_packets() const { return (channels + warp_size * V - 1) / (warp_size * V); }

  // Samples whose loads overlap in the backward's second kernel.
  static constexpr int samples_in_flight = 4;

  // Positions of a channels_last block: enough blocks for two on each of 132 multiprocessors, and a
  // row for every thread. With more blocks, the third kernel would have more parts to add.
  int64_t rows_of_block() const {
    constexpr int64_t target_blocks = 256;
    const int64_t packets = std::max<int64_t>(1, (channels + V - 1) / V);
    const int64_t positions_of_block =
        (sample_groups() * positions + target_blocks - 1) / target_blocks;
    return std::max(threads / std::min<int64_t>(packets, threads), positions_of_block);
  }

  // Width of a block with all channels: 32 blocks of a sample, but at least two packets, which is
  // one sector of memory. The order of sums must not depend on the batch size, so this does not.
  int depth_width() const {
    int width = max_depth_width;
    while (width > 2 && positions < int64_t(32) * width * V) width /= 2;
    return width;
  }

  // Sets `vectorized`: whether these tensors, weight and bias consist of full, aligned packets.
  void set_vectorized(std::initializer_list<Tensor> tensors) {
    const auto vectors = reinterpret_cast<uintptr_t>(weight) | reinterpret_cast<uintptr_t>(bias);
    vectorized = aligned(tensors) &&
                 (channels_last ? channels % V == 0 && vectors % 16 == 0 : positions % V == 0);
  }

  __device__ const W* weights() const { return static_cast<const W*>(weight); }
  __device__ const W* biases() const { return static_cast<const W*>(bias); }

  // Loads V elements of the map, or zeros without a map.
  __device__ __forceinline__ void load_map(W (&m)[V], int64_t c, int64_t p, int64_t count,
                                           bool packet) const {
#pragma unroll
    for (int v = 0; v < V; ++v) m[v] = 0;
    if (map.data) load(m, map.template at<W>(0, c, p), count, packet);
  }

  // Loads V elements of x + map.
  __device__ __forceinline__ void load_sum(W (&h)[V], int64_t n, int64_t c, int64_t p,
                                           int64_t count, bool packet) const {
    W m[V];
    load_map(m, c, p, count, packet);
    load(h, x.template at<X>(n, c, p), count, packet);
#pragma unroll
    for (int v = 0; v < V; ++v) h[v] += m[v];
  }
};

// Adds a fetched packet.
template <class X, int V, class W>
__device__ __forceinline__ void add(W (&to)[V], const Words<X, V>& words) {
  W element[V];
  unpack(element, words);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] += element[i];
}

// Calls run(count, i) for i from first to last in steps of `step`. A call handles `Together` items,
// so that their loads overlap; the remaining items are handled one by one.
template <int Together, class Run>
__device__ __forceinline__ void in_groups(int64_t first, int64_t last, int64_t step, Run run) {
  int64_t i = first;
  for (; i + (Together - 1) * step < last; i += Together * step)
    run(std::integral_constant<int, Together>(), i);
  for (; Together > 1 && i < last; i += step) run(std::integral_constant<int, 1>(), i);
}

// The rows of a warp: one position of several samples. Each lane has up to K packets of channels,
// and keeps their weights and biases in registers. A lane with fewer packets reads the last packet
// again, because a conditional load would not overlap with the others.
template <class J, int K>
struct WarpRows {
  using X = typename J::X;
  using W = typename J::W;
  static constexpr int V = J::V;
  // Whether there are enough registers for the map and the next row, too.
  static constexpr bool has_spare_registers = K * V * sizeof(W) <= 64;

  const J& job;
  int64_t position, first, last;  // samples first to last
  W weight[K][V], bias[K][V], map[has_spare_registers ? K : 1][V];

  __device__ __forceinline__ explicit WarpRows(const J& job) : job(job) {
    const int64_t warp = int64_t(blockIdx.x) * warps + threadIdx.x / warp_size;
    position = warp % job.positions;
    first = warp / job.positions * job.warp_samples;
    last = first + job.warp_samples < job.samples ? first + job.warp_samples : job.samples;
    if (first >= last) return;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      load(weight[k], job.weights() + channel(k), V, true);
      load(bias[k], job.biases() + channel(k), V, true);
      if (has_spare_registers)
        job.load_map(map[has_spare_registers ? k : 0], channel(k), position, V, true);
    }
  }

  __device__ bool has(int k) const { return own(k) < job.channels; }
  __device__ int64_t channel(int k) const { return has(k) ? own(k) : job.channels - V; }

  __device__ __forceinline__ void read(Words<X, V> (&to)[K], const Tensor& from, int64_t n) const {
#pragma unroll
    for (int k = 0; k < K; ++k)
      to[k] = fetch<V>(from.template at<X>(n, channel(k), position), V, true);
  }

  // Computes x + map of all packets.
  __device__ __forceinline__ void sum(W (&h)[K][V], const Words<X, V> (&x)[K]) const {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (!has_spare_registers) job.load_map(h[k], channel(k), position, V, true);
#pragma unroll
      for (int v = 0; has_spare_registers && v < V; ++v)
        h[k][v] = map[has_spare_registers ? k : 0][v];
    }
#pragma unroll
    for (int k = 0; k < K; ++k) add(h[k], x[k]);
  }

 private:
  __device__ int64_t own(int k) const {
    return (int64_t(k) * warp_size + threadIdx.x % warp_size) * V;
  }
};

// Calls run with a number of packets per thread: the smallest of 1, 2, 3 and 5 that is at least
// `needed` and has at most `limit` elements. Returns false if there is none.
template <int V, int limit, class Run>
bool with_packets(int64_t needed, Run run) {
  bool done = false;
  const auto attempt = [&](auto packets) {
    constexpr int K = decltype(packets)::value;
    if constexpr (K * V <= limit)
      if (!done && needed <= K) run(packets), done = true;
  };
  attempt(std::integral_constant<int, 1>());
  attempt(std::integral_constant<int, 2>());
  attempt(std::integral_constant<int, 3>());
  attempt(std::integral_constant<int, 5>());
  return done;
}

// Calls run with a null Job* whose type holds the element type.
template <class Run>
auto with_type(DType x, Run run) {
  if (x == DType::float32) return run((Job<float>*)nullptr);
  if (x == DType::float64) return run((Job<double>*)nullptr);
  if (x == DType::bfloat16) return run((Job<bfloat16>*)nullptr);
  if (x == DType::float16) return run((Job<float16>*)nullptr);
  throw std::invalid_argument("channel_norm: no kernel for this element type");
}

}  // namespace
}  // namespace msflow
