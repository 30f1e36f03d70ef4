// Resampling on CUDA. Pooling, upsampling and both gradients have one form: a result is a sum over
// rows and columns of the input, each number times a weight of its row and one of its column.
#include "common/grid.cuh"
#include "common/vector_access.cuh"
#include "resample/formula.h"
#include "resample/resample.h"

namespace msflow {
namespace {

// Enough blocks to occupy a large GPU. Only if there would be more, a thread processes several
// packets, because every block first computes its tables.
constexpr int64_t target_blocks = 1024;
constexpr int64_t max_packets_per_thread = 8;

// Table entry of one coordinate along an axis: the inputs of a result, and the weights. The weights
// depend on the result in the forward pass, and on the input in the backward pass.
template <class W>
struct AxisEntry {
  int begin, end;  // inputs of a result
  int low;         // the coordinate with weight_at_low; all others have weight_elsewhere
  W weight_at_low, weight_elsewhere;
};

enum class Kind : int { pool, upsample };

struct Axis {
  int size, from_size;  // of the result and of the input
  Resampling grid;      // for upsampling

  HD int entries() const { return size + from_size; }
};

// A packet is V channels of the result at one position: neighbours in memory, or `strided`.
template <class X_, class Base_, int V_, bool strided_>
struct Job {
  using X = X_;
  using Base = Base_;
  using W = accumulation_t<X>;
  static constexpr int V = V_;
  static constexpr bool strided = strided_;
  static constexpr int in_flight = strided ? 1 : 4;  // packets whose loads overlap

  Axis rows, columns;
  int64_t positions, channel_packets;
  unsigned sample_blocks;
  int packets_per_thread;
  bool channels_last, forward;
  Kind kind;
  Tensor from, base, to;  // to = base + sums of from; base may be null

  HD int64_t packets() const { return positions * channel_packets; }  // of a sample
};

// Returns entry i of an axis. The entries of the results come first, then those of the inputs.
template <class W, class J>
__device__ AxisEntry<W> axis_entry(const J& job, const Axis& axis, int i) {
  const bool is_result = i < axis.size, to_low = job.forward == (job.kind == Kind::pool);
  const int coarse = to_low ? axis.size : axis.from_size;
  const int fine = to_low ? axis.from_size : axis.size;
  i -= is_result ? 0 : axis.size;
  AxisEntry<W> entry = {};
  if (is_result == job.forward) {
    if (job.kind == Kind::pool) {
      entry.weight_at_low = entry.weight_elsewhere = W(1) / W(window(i, fine, coarse).size());
    } else {
      const Tap<W> t = tap<W>(axis.grid, i, coarse);
      entry.low = int(t.low), entry.weight_at_low = tap_weight(t, t.low),
      entry.weight_elsewhere = tap_weight(t, t.high);
      entry.begin = entry.low, entry.end = int(t.high) + 1;
    }
  }
  if (is_result && !(job.forward && job.kind == Kind::upsample)) {
    const Range range = job.kind == Kind::pool
                            ? window(i, axis.from_size, axis.size)  // or the windows that contain i
                            : readers<W>(axis.grid, i, coarse, fine);
    entry.begin = int(range.begin), entry.end = int(range.end);
  }
  return entry;
}

// Returns the weight of input `from` in result `to` along one axis.
template <class J, class W>
__device__ __forceinline__ W weight_of(const J& job, const AxisEntry<W>* entries, int size, int to,
                                       int from) {
  const AxisEntry<W>& entry = entries[job.forward ? to : size + from];
  return (job.forward ? from : to) == entry.low ? entry.weight_at_low : entry.weight_elsewhere;
}

template <class J, class T>
__device__ __forceinline__ Packet<T, J::V> fetch(const T* from, int64_t channel_step) {
  using P = Packet<T, J::V>;
  if constexpr (J::strided) {
    P packet;
#pragma unroll
    for (int v = 0; v < J::V; ++v) packet.element[v] = from[v * channel_step];
    return packet;
  } else {
    return *reinterpret_cast<const P*>(from);
  }
}

// A thread computes some packets of one sample, one block width apart.
template <class J>
__global__ void __launch_bounds__(threads, 1) resample(const __grid_constant__ J job) {
  using X = typename J::X;
  using W = typename J::W;
  constexpr int V = J::V, in_flight = J::in_flight;
  AxisEntry<W>* rows = shared_memory<AxisEntry<W>>();
  AxisEntry<W>* columns = rows + job.rows.entries();
  for (int i = int(threadIdx.x); i < job.rows.entries() + job.columns.entries(); i += threads) {
    const bool is_row = i < job.rows.entries();
    const Axis axis = is_row ? job.rows : job.columns;
    rows[i] = axis_entry<W>(job, axis, is_row ? i : i - job.rows.entries());
  }
  __syncthreads();
  const int64_t n = blockIdx.x / job.sample_blocks;
  int64_t packet =
      int64_t(blockIdx.x % job.sample_blocks) * threads * job.packets_per_thread + threadIdx.x;
  for (int k = 0; k < job.packets_per_thread && packet < job.packets(); ++k, packet += threads) {
    const int64_t fast = job.channels_last ? job.channel_packets : job.positions;
    const int64_t slow = packet / fast, rest = packet - slow * fast;
    const int64_t p = job.channels_last ? slow : rest, c = (job.channels_last ? rest : slow) * V;
    const int y = int(unsigned(p) / unsigned(job.columns.size));
    const int x = int(unsigned(p) % unsigned(job.columns.size));
    // Loaded first and added last, so that the load overlaps with those of the inputs.
    Packet<typename J::Base, V> base;
    if (job.base.data)
      base = fetch<J>(job.base.template at<const typename J::Base>(n, c, p), job.base.c);
    W sums[V] = {};
    const X* from = job.from.template at<X>(n, c);
    const int begin = columns[x].begin, end = columns[x].end;
    for (int h = rows[y].begin; h < rows[y].end; ++h) {
      const W row_weight = weight_of(job, rows, job.rows.size, y, h);
      const int64_t row = int64_t(h) * job.columns.from_size;
      for (int first = begin; first < end; first += in_flight) {
        Packet<X, V> inputs[in_flight];
#pragma unroll
        for (int i = 0; i < in_flight; ++i)
          if (first + i < end)
            inputs[i] = fetch<J>(from + (row + first + i) * job.from.p, job.from.c);
#pragma unroll
        for (int i = 0; i < in_flight; ++i) {
          if (first + i >= end) break;
          const W weight = row_weight * weight_of(job, columns, job.columns.size, x, first + i);
#pragma unroll
          for (int v = 0; v < V; ++v) sums[v] += weight * W(load(inputs[i].element[v]));
        }
      }
    }
    if (job.base.data)
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v] += W(load(base.element[v]));
    X* to = job.to.template at<X>(n, c, p);
    if constexpr (J::strided) {
#pragma unroll
      for (int v = 0; v < V; ++v) store(to + v * job.to.c, sums[v]);
    } else {
      store(to, sums, V, true);
    }
  }
}

template <class J>
void run_job(const Resample& r, Kind kind, bool forward, Tensor from, Tensor base, Tensor to,
             void* stream) {
  const bool to_low = forward == (kind == Kind::pool);
  const auto axis = [&](int64_t high, int64_t low) {
    return Axis{int(to_low ? low : high), int(to_low ? high : low), resampling(low, high, true)};
  };
  J job;
  job.rows = axis(r.height, r.low_height), job.columns = axis(r.width, r.low_width);
  job.positions = int64_t(job.rows.size) * job.columns.size;
  job.channel_packets = r.channels / J::V;
  job.channels_last = r.channels_last, job.forward = forward, job.kind = kind;
  job.from = from, job.base = base, job.to = to;
  job.packets_per_thread = int(std::clamp(r.samples * job.packets() / (threads * target_blocks),
                                          int64_t(1), max_packets_per_thread));
  const int64_t block_packets = threads * job.packets_per_thread;
  job.sample_blocks = unsigned((job.packets() + block_packets - 1) / block_packets);
  const size_t entries = job.rows.entries() + job.columns.entries();
  launch(resample<J>, r.samples * job.sample_blocks, entries * sizeof(AxisEntry<typename J::W>),
         stream, job);
}

template <class X, class Base = X>
void run(const Resample& r, Kind kind, bool forward, Tensor from, Tensor base, Tensor to,
         void* stream) {
  if (r.samples == 0) return;  // other sizes may be huge
  if (r.height * r.width > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("resample: a map may have at most 2^31 - 1 positions on CUDA");
  const int64_t max_entries = shared_limit / sizeof(AxisEntry<accumulation_t<X>>);
  if (r.height + r.width + r.low_height + r.low_width > max_entries)
    throw std::invalid_argument("resample: the sides of both maps may add up to at most " +
                                std::to_string(max_entries) + " on CUDA");
  // Use packets if all are full and aligned. Contiguous tensors use strided packets, except to
  // write the coarse map: its results are few and have many inputs, so each gets a thread.
  const bool to_low = forward == (kind == Kind::pool);
  constexpr int V = packet_of<X>;
  if (r.channels_last && r.channels % V == 0 && aligned({from, base, to}))
    run_job<Job<X, Base, V, false>>(r, kind, forward, from, base, to, stream);
  else if (!r.channels_last && r.channels % 8 == 0 && !to_low)
    run_job<Job<X, Base, 8, true>>(r, kind, forward, from, base, to, stream);
  else
    run_job<Job<X, Base, 1, false>>(r, kind, forward, from, base, to, stream);
}

void run(const Resample& r, Kind kind, bool forward, Tensor from, Tensor base, Tensor to,
         void* stream) {
  const bool float_base = base.data && base.dtype != to.dtype;
  if (to.dtype == DType::float32) return run<float>(r, kind, forward, from, base, to, stream);
  if (to.dtype == DType::float64) return run<double>(r, kind, forward, from, base, to, stream);
  if (to.dtype == DType::bfloat16)
    return float_base ? run<bfloat16, float>(r, kind, forward, from, base, to, stream)
                      : run<bfloat16>(r, kind, forward, from, base, to, stream);
  if (to.dtype == DType::float16)
    return float_base ? run<float16, float>(r, kind, forward, from, base, to, stream)
                      : run<float16>(r, kind, forward, from, base, to, stream);
  throw std::invalid_argument("resample: no kernel for this element type");
}

}  // namespace

void pool_forward_cuda(const Resample& r, Tensor x, Tensor low, void*, void* stream) {
  run(r, Kind::pool, true, x, {}, low, stream);
}

void pool_backward_cuda(const Resample& r, Tensor grad_low, Tensor grad_x, void*, void* stream) {
  run(r, Kind::pool, false, grad_low, {}, grad_x, stream);
}

void upsample_forward_cuda(const Resample& r, Tensor x, Tensor low, Tensor y, void*, void* stream) {
  run(r, Kind::upsample, true, low, x, y, stream);
}

void upsample_backward_cuda(const Resample& r, Tensor grad_y, Tensor grad_low, void*,
                            void* stream) {
  run(r, Kind::upsample, false, grad_y, {}, grad_low, stream);
}

}  // namespace msflow
