// Deterministic sums and maxima over the threads of a block: their order is always the same.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "common/grid.cuh"

namespace msflow {

template <class T>
__device__ __forceinline__ T warp_sum(T value, int lanes = warp_size, int stride = 1) {
  for (int offset = lanes / 2; offset >= stride; offset /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Returns the sum over the block, in every thread.
template <class T>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T parts[warps];
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % warp_size == 0) parts[threadIdx.x / warp_size] = value;
  __syncthreads();
  T sum = parts[0];
  for (int w = 1; w < warps; ++w) sum += parts[w];
  return sum;
}

// Returns the maximum over the block, in every thread.
template <class T>
__device__ __forceinline__ T block_max(T value) {
  __shared__ T parts[warps];
  for (int offset = warp_size / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, value, offset);
    value = other > value ? other : value;
  }
  __syncthreads();
  if (threadIdx.x % warp_size == 0) parts[threadIdx.x / warp_size] = value;
  __syncthreads();
  for (int w = 0; w < warps; ++w) value = parts[w] > value ? parts[w] : value;
  return value;
}

// Sums over groups of `width` neighbouring threads. The first thread of a group gets the result.
template <class T>
__device__ __forceinline__ T group_sum(T value, int width) {
  if (width <= warp_size) return warp_sum(value, width);
  __shared__ T parts[warps];
  value = warp_sum(value);
  __syncthreads();
  const int w = int(threadIdx.x) / warp_size, size = width / warp_size;
  if (threadIdx.x % warp_size == 0) parts[w] = value;
  __syncthreads();
  if (w % size) return value;
  T sum = parts[w];
  for (int i = 1; i < size; ++i) sum += parts[w + i];
  return sum;
}

// Sums S values over all threads of a ContiguousGrid that share a column of positions, and returns
// the sums in each of these threads. The grid's width may be at most max_depth_width.
template <int S, class W>
__device__ __forceinline__ void depth_sums(W (&sums)[S], int width) {
  __shared__ W parts[warps][warp_size * S / 4];
  const int x = int(threadIdx.x) % width, t = int(threadIdx.x);
  for (int offset = warp_size / 2; offset >= width; offset /= 2)
#pragma unroll
    for (int i = 0; i < S; ++i) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], offset);
  __syncthreads();
  if (t % warp_size < width)
#pragma unroll
    for (int i = 0; i < S; ++i) parts[t / warp_size][x * S + i] = sums[i];
  __syncthreads();
  if (t < width * S)
    for (int w = 1; w < warps; ++w) parts[0][t] += parts[w][t];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < S; ++i) sums[i] = parts[0][x * S + i];
}
constexpr int max_depth_width = warp_size / 4;

// Returns a grid whose blocks hold all channels, for use with depth_sums. A sample is cut into 16
// blocks if it has enough positions, so that small maps still occupy a large GPU. A block is at
// least two packets wide, which is one sector of memory. The grid does not depend on the batch
// size, so the order of the sums does not either.
inline ContiguousGrid grid_with_all_channels(int64_t channels, int64_t positions, int packet) {
  const int64_t width = std::clamp<int64_t>(positions / (16 * packet), 2, max_depth_width);
  return ContiguousGrid(channels, positions, packet, int(width), 1, true);
}

// Shared memory of channel_sums. It is a type of its own so that all calls in a kernel share one
// array. Each row is padded by 128 / V bytes, so that a warp, which reads 32 / V neighbours in each
// of V rows, has no bank conflicts.
template <int V, class W>
struct ChannelParts {
  W of[V][threads + 128 / int(sizeof(W)) / V];

  __device__ static __forceinline__ ChannelParts& of_block() {
    __shared__ ChannelParts parts;
    return parts;
  }
};

// Computes two sums per channel over the rows of a channels_last block, and writes them to
// first[channel] and second[channel]. prepare(channel, count) returns a function that adds a row to
// both sums.
template <int V, class W, class Prepare>
__device__ __forceinline__ void channel_sums(int64_t channels, int rows, W* first, W* second,
                                             Prepare prepare) {
  auto& parts = ChannelParts<V, W>::of_block();
  const ThreadLayout<V> layout(channels);
  for (int start = 0; start < layout.packets; start += layout.lanes) {
    const int q = start + layout.lane();
    const int64_t channel = int64_t(q) * V;
    W a[V] = {}, b[V] = {};
    if (layout.row < layout.row_step && q < layout.packets) {
      const auto body = prepare(channel, channels - channel);
      for (int row = layout.row; row < rows; row += layout.row_step) body(row, a, b);
    }
    const auto add_up = [&](const W(&mine)[V], W* sums) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < V; ++i) parts.of[i][threadIdx.x] = mine[i];
      __syncthreads();
      for (int m = int(threadIdx.x); m < layout.lanes * V; m += threads) {
        const int64_t to = int64_t(start) * V + m;
        if (to >= channels) break;
        W sum = 0;
        for (int r = 0; r < layout.row_step; ++r) sum += parts.of[m % V][r * layout.lanes + m / V];
        sums[to] = sum;
      }
    };
    add_up(a, first);
    add_up(b, second);
  }
}

// Sums one column of parts (rows, columns), plus `own` of every thread with that column. The result
// is valid in the first sum_columns threads. A block handles sum_columns neighbouring columns, the
// floats of one memory sector; its other threads split the rows, so that many loads overlap.
constexpr int sum_columns = 8;
template <class W>
__device__ __forceinline__ double column_sum(const W* parts, int64_t rows, int64_t columns,
                                             int64_t column, double own = 0) {
  __shared__ double sums[warps][sum_columns];
  const int lane = int(threadIdx.x) % warp_size, w = int(threadIdx.x) / warp_size;
  double sum = 0;
  if (column < columns)
    for (int64_t r = int(threadIdx.x) / sum_columns; r < rows; r += threads / sum_columns)
      sum += double(parts[r * columns + column]);
  sum = warp_sum(sum + own, warp_size, sum_columns);
  if (lane < sum_columns) sums[w][lane] = sum;
  __syncthreads();
  for (int i = 1; i < warps && w == 0 && lane < sum_columns; ++i) sum += sums[i][lane];
  return sum;
}

}  // namespace msflow
