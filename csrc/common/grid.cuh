// How CUDA kernels cut a tensor into blocks and threads, and how they are launched.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "common/host_device.h"

namespace msflow {

// Every block has this many threads. Kernels are marked __launch_bounds__(threads, n), where n is
// the number of blocks that a multiprocessor holds without register spills. If n is left open,
// ptxas spills a few bytes to fit one more block.
constexpr int threads = 256;
constexpr int warp_size = 32;
constexpr int warps = threads / warp_size;

// Bytes of dynamic shared memory per block. Every GPU provides 48 KB; the sums need some of it.
constexpr size_t shared_limit = 44 * 1024;

// ---- contiguous tensors (N, C, P) ----

// A block is `width` threads along positions times `depth` threads along channels.
struct ContiguousGrid {
  int width, depth;        // powers of two
  int packet, packets;     // elements of a packet, packets of a thread
  unsigned pieces, tiles;  // blocks of a sample along positions, and along channels

  ContiguousGrid() = default;
  // A block spans at most max_width packets, and all channels if `all_channels`.
  ContiguousGrid(int64_t channels, int64_t positions, int packet, int max_width, int packets,
                 bool all_channels)
      : width(1), packet(packet), packets(packets) {
    while (width < max_width && int64_t(width) * packet < positions) width *= 2;
    depth = threads / width;
    pieces = unsigned((positions + span() - 1) / span());
    tiles = all_channels ? 1 : unsigned((channels + depth - 1) / depth);
  }

  HD int64_t span() const { return int64_t(width) * packet * packets; }
  HD unsigned blocks() const { return pieces * tiles; }  // of a sample
};

// What a thread works on: positions `first` to `last`, `step` apart, of one channel and sample.
struct ContiguousPlace {
  int64_t sample, piece, channel, first, last, step;

  __device__ ContiguousPlace(const ContiguousGrid& grid, int64_t positions) {
    const unsigned block = blockIdx.x % grid.blocks(), lane = threadIdx.x % grid.width;
    sample = blockIdx.x / grid.blocks();
    piece = block % grid.pieces;
    channel = int64_t(block / grid.pieces) * grid.depth + threadIdx.x / grid.width;
    first = piece * grid.span() + int64_t(lane) * grid.packet;
    last = (piece + 1) * grid.span() < positions ? (piece + 1) * grid.span() : positions;
    step = int64_t(grid.width) * grid.packet;
  }
};

// ---- channels_last tensors (N, P, C) ----

// A block is some positions with all their channels.
struct ChannelsLastGrid {
  int rows;        // positions of a block
  unsigned tiles;  // blocks of a sample

  ChannelsLastGrid() = default;
  // As many positions as fit in `budget` bytes of shared memory.
  ChannelsLastGrid(int64_t positions, int64_t bytes_per_position, int64_t budget)
      : rows(int(std::min<int64_t>(
            64, std::max<int64_t>(1, budget / std::max<int64_t>(1, bytes_per_position))))),
        tiles(unsigned((positions + rows - 1) / rows)) {}
};

// What a block works on: `rows` positions of one sample, from `first` on.
struct ChannelsLastPlace {
  int64_t sample, first;
  int rows;

  __device__ ChannelsLastPlace(const ChannelsLastGrid& grid, int64_t positions) {
    sample = blockIdx.x / grid.tiles;
    first = int64_t(blockIdx.x % grid.tiles) * grid.rows;
    rows = int(positions - first < grid.rows ? positions - first : grid.rows);
  }
};

// How the threads of a block divide the packets of its rows: `lanes` threads side by side in a row,
// the other threads in other rows.
template <int V>
struct ThreadLayout {
  int packets, lanes, row, row_step;

  __device__ explicit ThreadLayout(int64_t channels) {
    packets = int((channels + V - 1) / V);
    lanes = packets < threads ? (packets > 0 ? packets : 1) : threads;
    row = int(threadIdx.x) / lanes;
    row_step = threads / lanes;
  }
  __device__ int lane() const { return int(threadIdx.x) % lanes; }
};

// Calls prepare(channel, count) for each packet of this thread, then calls the function that
// prepare returned for each of the thread's rows.
template <int V, class Prepare>
__device__ __forceinline__ void over_packets(int64_t channels, int rows, Prepare prepare) {
  const ThreadLayout<V> layout(channels);
  if (layout.row >= layout.row_step) return;
  for (int q = layout.lane(); q < layout.packets; q += layout.lanes) {
    const int64_t channel = int64_t(q) * V;
    const auto body = prepare(channel, channels - channel);
    for (int row = layout.row; row < rows; row += layout.row_step) body(row);
  }
}

// ---- launch ----

inline void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // Clears the error: otherwise the next launch would report it again.
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// Launches a kernel on the current device, unless there are no blocks.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  if (blocks <= 0) return;
  if (blocks > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("CUDA: the tensors need more blocks than a grid has");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Returns the block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#else
  return reinterpret_cast<T*>(emulator::shared_memory());
#endif
}

// Throws if the scratch memory cannot hold this many bytes.
inline void require_memory(const void* memory, int64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  if (bytes > 0 && (!memory || address > std::numeric_limits<uintptr_t>::max() - uint64_t(bytes)))
    throw std::invalid_argument("CUDA: the call needs scratch memory");
}

// Allocates arrays from the scratch memory of a call. Without memory it only counts the bytes.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(reinterpret_cast<uintptr_t>(memory)) {}

  template <class T>
  T* take(int64_t size) {
    const uintptr_t begin = memory_ + uint64_t(bytes_);
    bytes_ += (size * int64_t(sizeof(T)) + 15) / 16 * 16;
    return memory_ ? reinterpret_cast<T*>(begin) : nullptr;
  }
  int64_t bytes() const { return bytes_; }

 private:
  uintptr_t memory_;
  int64_t bytes_ = 0;
};

}  // namespace msflow
