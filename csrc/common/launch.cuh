// What the CUDA kernels share: 16-byte packets, how a tensor is cut into blocks, sums in a fixed
// order, the launch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/half.h"
#include "common/tensor.h"

namespace msflow {

// Of every block. Kernels say __launch_bounds__(threads, 1), or how many blocks an SM holds at
// least where none of them spills then: with the number of blocks left open, ptxas spills some
// bytes to fit one block more.
constexpr int threads = 256;
constexpr int warp_size = 32;
constexpr int warps = threads / warp_size;
constexpr size_t shared_limit =
    44 * 1024;  // bytes: every GPU grants 48 KB, of which sums take some

// ---- packets: V neighbouring elements, moved 16 bytes at a time where their addresses allow ----

template <class T>
constexpr int packet_of = 16 / int(sizeof(T));

template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Packet {
  T element[V];
};

// A packet as it is read: in words, for elements would have to be taken from them at once, which
// waits for the memory.
template <class T, int V>
struct alignas(Packet<T, V>) Words {
  uint32_t word[sizeof(T) * V / 4];
};

// Reads `count` elements, zeros beyond them; `whole`: V of them, aligned. Whoever needs several
// packets fetches them all before unpacking the first, so that their loads are under way together.
template <int V, class T>
__device__ __forceinline__ Words<T, V> fetch(const T* from, int64_t count, bool whole) {
  if (whole) return *reinterpret_cast<const Words<T, V>*>(from);
  T element[V];
#pragma unroll
  for (int i = 0; i < V; ++i) element[i] = i < count ? from[i] : T{};
  Words<T, V> words;
  memcpy(&words, element, sizeof words);
  return words;
}

template <class T, int V, class W>
__device__ __forceinline__ void unpack(W (&to)[V], const Words<T, V>& words) {
  T element[V];
  memcpy(element, &words, sizeof words);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = W(load(element[i]));
}

template <class T, int V, class W>
__device__ __forceinline__ void load(W (&to)[V], const T* from, int64_t count, bool whole) {
  unpack(to, fetch<V>(from, count, whole));
}

template <class T, int V, class W>
__device__ __forceinline__ void store(T* to, const W (&from)[V], int64_t count, bool whole) {
  if (whole) {
    Packet<T, V> packet;
#pragma unroll
    for (int i = 0; i < V; ++i) store(&packet.element[i], from[i]);
    *reinterpret_cast<Packet<T, V>*>(to) = packet;
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < count) store(to + i, from[i]);
  }
}

// True if every packet of these tensors that holds V elements begins at a multiple of 16 bytes.
inline bool aligned(std::initializer_list<Tensor> tensors) {
  constexpr int64_t sizes[] = {4, 8, 2, 2};  // in the order of DType
  for (const Tensor& t : tensors) {
    const int64_t size = sizes[int(t.dtype)];
    if (t.data % 16) return false;
    for (int64_t stride : {t.n, t.c, t.p})
      if (stride != 1 && stride * size % 16) return false;
  }
  return true;
}

// ---- planar tensors (N, C, P): a block is `width` threads along positions, `depth` along channels
// ----

struct Planar {
  int width, depth;        // powers of two
  int packet, packets;     // elements of a packet, packets of a thread
  unsigned pieces, tiles;  // of a sample: along positions, along channels

  Planar() = default;
  // A block spans at most max_width packets, and all channels if `whole_channels`.
  Planar(int64_t channels, int64_t positions, int packet, int max_width, int packets,
         bool whole_channels)
      : width(1), packet(packet), packets(packets) {
    while (width < max_width && int64_t(width) * packet < positions) width *= 2;
    depth = threads / width;
    pieces = unsigned((positions + span() - 1) / span());
    tiles = whole_channels ? 1 : unsigned((channels + depth - 1) / depth);
  }

  HD int64_t span() const { return int64_t(width) * packet * packets; }
  HD unsigned blocks() const { return pieces * tiles; }  // of a sample
};

// Where a thread begins.
struct PlanarPlace {
  int64_t sample, piece, channel, first, last;  // positions first to last, `step` apart
  int64_t step;

  __device__ PlanarPlace(const Planar& cut, int64_t positions) {
    const unsigned block = blockIdx.x % cut.blocks(), lane = threadIdx.x % cut.width;
    sample = blockIdx.x / cut.blocks();
    piece = block % cut.pieces;
    channel = int64_t(block / cut.pieces) * cut.depth + threadIdx.x / cut.width;
    first = piece * cut.span() + int64_t(lane) * cut.packet;
    last = (piece + 1) * cut.span() < positions ? (piece + 1) * cut.span() : positions;
    step = int64_t(cut.width) * cut.packet;
  }
};

// ---- interleaved tensors (N, P, C): a block is some positions with all their channels ----

struct Interleaved {
  int rows;        // positions of a block
  unsigned tiles;  // of a sample

  Interleaved() = default;
  // As many positions as `budget` bytes of shared memory hold.
  Interleaved(int64_t positions, int64_t bytes_per_position, int64_t budget)
      : rows(int(std::min<int64_t>(
            64, std::max<int64_t>(1, budget / std::max<int64_t>(1, bytes_per_position))))),
        tiles(unsigned((positions + rows - 1) / rows)) {}
};

struct InterleavedPlace {
  int64_t sample, first;
  int rows;

  __device__ InterleavedPlace(const Interleaved& cut, int64_t positions) {
    sample = blockIdx.x / cut.tiles;
    first = int64_t(blockIdx.x % cut.tiles) * cut.rows;
    rows = int(positions - first < cut.rows ? positions - first : cut.rows);
  }
};

// How the threads of a block share the packets of `rows` positions: `lanes` side by side, the rest
// in other rows.
template <int V>
struct Share {
  int packets, lanes, row, row_step;

  __device__ explicit Share(int64_t channels) {
    packets = int((channels + V - 1) / V);
    lanes = packets < threads ? (packets > 0 ? packets : 1) : threads;
    row = int(threadIdx.x) / lanes;
    row_step = threads / lanes;
  }
  __device__ int lane() const { return int(threadIdx.x) % lanes; }
};

// Calls prepare(channel, count), and what it returns with every row of this thread.
template <int V, class Prepare>
__device__ __forceinline__ void over_packets(int64_t channels, int rows, Prepare prepare) {
  const Share<V> share(channels);
  if (share.row >= share.row_step) return;
  for (int q = share.lane(); q < share.packets; q += share.lanes) {
    const int64_t channel = int64_t(q) * V;
    const auto body = prepare(channel, channels - channel);
    for (int row = share.row; row < rows; row += share.row_step) body(row);
  }
}

// ---- sums: always the same order, whatever the order of the threads ----

template <class T>
__device__ __forceinline__ T warp_sum(T value, int lanes = warp_size, int stride = 1) {
  for (int offset = lanes / 2; offset >= stride; offset /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// The sum over the block, in every thread.
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

// The sum over the `width` neighbouring threads of a group, in its first thread.
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

// Each of S sums over the threads of equal place along positions (Planar: width at most warp_size),
// in all of them.
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
constexpr int max_depth_width = warp_size / 4;  // the widest block for depth_sums

// Blocks with all channels. A sample is cut into 16 of them where its positions allow, so that
// small maps do not leave most of a large GPU idle, but into no less than two packets side by side,
// a sector of memory. The cut, and with it the order of the sums, is the same for every batch.
inline Planar planar_of_all_channels(int64_t channels, int64_t positions, int packet) {
  const int64_t width = std::clamp<int64_t>(positions / (16 * packet), 2, max_depth_width);
  return Planar(channels, positions, packet, int(width), 1, true);
}

// One array for every caller of channel_sums, whatever it prepares. A row is longer than a block
// has threads by 128 / V bytes, so that what a warp reads, V rows of 32 / V neighbours, lies in as
// many banks.
template <int V, class W>
struct ChannelParts {
  W of[V][threads + 128 / int(sizeof(W)) / V];

  __device__ static __forceinline__ ChannelParts& of_block() {
    __shared__ ChannelParts parts;
    return parts;
  }
};

// Two sums per channel over the rows of an interleaved block, written to first[channel] and
// second[channel]. prepare(channel, count) gives what is called with every row and both sums.
template <int V, class W, class Prepare>
__device__ __forceinline__ void channel_sums(int64_t channels, int rows, W* first, W* second,
                                             Prepare prepare) {
  auto& parts = ChannelParts<V, W>::of_block();
  const Share<V> share(channels);
  for (int start = 0; start < share.packets; start += share.lanes) {
    const int q = start + share.lane();
    const int64_t channel = int64_t(q) * V;
    W a[V] = {}, b[V] = {};
    if (share.row < share.row_step && q < share.packets) {
      const auto body = prepare(channel, channels - channel);
      for (int row = share.row; row < rows; row += share.row_step) body(row, a, b);
    }
    const auto add_up = [&](const W(&mine)[V], W* sums) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < V; ++i) parts.of[i][threadIdx.x] = mine[i];
      __syncthreads();
      for (int m = int(threadIdx.x); m < share.lanes * V; m += threads) {
        const int64_t to = int64_t(start) * V + m;
        if (to >= channels) break;
        W sum = 0;
        for (int r = 0; r < share.row_step; ++r) sum += parts.of[m % V][r * share.lanes + m / V];
        sums[to] = sum;
      }
    };
    add_up(a, first);
    add_up(b, second);
  }
}

// Column `column` of parts (rows, columns), and `own` of every thread that shares it; valid in the
// first threads. A block takes sum_columns of them side by side, as many floats as memory moves at
// once; its other threads go along the rows, so that many loads are under way.
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

// ---- launch ----

inline void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // what is no longer news to the caller must not meet the next launch
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// On the current device; nothing to do for no blocks.
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

// The block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#else
  return reinterpret_cast<T*>(emulator::shared_memory());
#endif
}

// Refuses scratch memory that cannot hold so many bytes.
inline void require_memory(const void* memory, int64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  if (bytes > 0 && (!memory || address > std::numeric_limits<uintptr_t>::max() - uint64_t(bytes)))
    throw std::invalid_argument("CUDA: the call needs scratch memory");
}

// Carves arrays out of the scratch memory of a call; without memory it only counts.
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
