// Resampling on CUDA. Pooling, upsampling and both their gradients are the same sum: a result is
// that of the inputs in a range of rows and columns, each times a weight of its row and one of its
// column.
#include "common/launch.cuh"
#include "resample/formula.h"
#include "resample/resample.h"

namespace msflow {
namespace {

// Blocks that keep a large GPU busy; threads take several packets only where more of them would be
// left, as every block begins with its tables.
constexpr int64_t enough_blocks = 1024;
constexpr int64_t most_packets_per_thread = 8;

// Along one axis: the inputs of every result, and the weights, which belong to the results going
// forward and to the inputs going backward.
template <class W>
struct Line {
  int begin, end;  // inputs of a result
  int low;         // has the weight `at_low`, and every other one that is asked for `elsewhere`
  W at_low, elsewhere;
};

enum class Kind : int { pool, upsample };

struct Axis {
  int size, from_size;  // of the results and of the inputs
  Resampling grid;      // of upsampling

  HD int lines() const { return size + from_size; }
};

// A packet is the results of V channels at a position: side by side in memory, or `apart`.
template <class X_, class Base_, int V_, bool apart_>
struct Job {
  using X = X_;
  using Base = Base_;
  using W = wide_t<X>;
  static constexpr int V = V_;
  static constexpr bool apart = apart_;
  static constexpr int in_flight = apart ? 1 : 4;  // packets that a thread waits for at a time

  Axis rows, columns;
  int64_t positions, channel_packets;
  unsigned sample_blocks;
  int packets_per_thread;
  bool interleaved, forward;
  Kind kind;
  Tensor from, base, to;  // to = base + sums of from; base may be null

  HD int64_t packets() const { return positions * channel_packets; }  // of a sample
};

// Line i of an axis: those of the results come first, then those of the inputs.
template <class W, class J>
__device__ Line<W> line_of(const J& job, const Axis& axis, int i) {
  const bool of_result = i < axis.size, onto_low = job.forward == (job.kind == Kind::pool);
  const int coarse = onto_low ? axis.size : axis.from_size;
  const int fine = onto_low ? axis.from_size : axis.size;
  i -= of_result ? 0 : axis.size;
  Line<W> line = {};
  if (of_result == job.forward) {
    if (job.kind == Kind::pool) {
      line.at_low = line.elsewhere = W(1) / W(window(i, fine, coarse).size());
    } else {
      const Tap<W> t = tap<W>(axis.grid, i, coarse);
      line.low = int(t.low), line.at_low = share(t, t.low), line.elsewhere = share(t, t.high);
      line.begin = line.low, line.end = int(t.high) + 1;
    }
  }
  if (of_result && !(job.forward && job.kind == Kind::upsample)) {
    const Range range = job.kind == Kind::pool
                            ? window(i, axis.from_size, axis.size)  // or the windows that hold i
                            : readers<W>(axis.grid, i, coarse, fine);
    line.begin = int(range.begin), line.end = int(range.end);
  }
  return line;
}

// The weight of input `from` in result `to` along one axis.
template <class J, class W>
__device__ __forceinline__ W weight_of(const J& job, const Line<W>* lines, int size, int to,
                                       int from) {
  const Line<W>& line = lines[job.forward ? to : size + from];
  return (job.forward ? from : to) == line.low ? line.at_low : line.elsewhere;
}

template <class J, class T>
__device__ __forceinline__ Packet<T, J::V> fetch(const T* from, int64_t channel_step) {
  using P = Packet<T, J::V>;
  if constexpr (J::apart) {
    P packet;
#pragma unroll
    for (int v = 0; v < J::V; ++v) packet.element[v] = from[v * channel_step];
    return packet;
  } else {
    return *reinterpret_cast<const P*>(from);
  }
}

// A thread takes some packets of results of one sample, far apart.
template <class J>
__global__ void __launch_bounds__(threads, 1) resample(const __grid_constant__ J job) {
  using X = typename J::X;
  using W = typename J::W;
  constexpr int V = J::V, in_flight = J::in_flight;
  Line<W>* rows = shared_memory<Line<W>>();
  Line<W>* columns = rows + job.rows.lines();
  for (int i = int(threadIdx.x); i < job.rows.lines() + job.columns.lines(); i += threads) {
    const bool is_row = i < job.rows.lines();
    const Axis axis = is_row ? job.rows : job.columns;
    rows[i] = line_of<W>(job, axis, is_row ? i : i - job.rows.lines());
  }
  __syncthreads();
  const int64_t n = blockIdx.x / job.sample_blocks;
  int64_t packet =
      int64_t(blockIdx.x % job.sample_blocks) * threads * job.packets_per_thread + threadIdx.x;
  for (int k = 0; k < job.packets_per_thread && packet < job.packets(); ++k, packet += threads) {
    const int64_t fast = job.interleaved ? job.channel_packets : job.positions;
    const int64_t slow = packet / fast, rest = packet - slow * fast;
    const int64_t p = job.interleaved ? slow : rest, c = (job.interleaved ? rest : slow) * V;
    const int y = int(unsigned(p) / unsigned(job.columns.size));
    const int x = int(unsigned(p) % unsigned(job.columns.size));
    // Added last: it is on its way while the inputs are.
    Packet<typename J::Base, V> base;
    if (job.base.data)
      base = fetch<J>(job.base.template at<const typename J::Base>(n, c, p), job.base.c);
    W sums[V] = {};
    const X* from = job.from.template at<X>(n, c);
    const int begin = columns[x].begin, end = columns[x].end;
    for (int h = rows[y].begin; h < rows[y].end; ++h) {
      const W of_row = weight_of(job, rows, job.rows.size, y, h);
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
          const W weight = of_row * weight_of(job, columns, job.columns.size, x, first + i);
#pragma unroll
          for (int v = 0; v < V; ++v) sums[v] += weight * W(load(inputs[i].element[v]));
        }
      }
    }
    if (job.base.data)
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v] += W(load(base.element[v]));
    X* to = job.to.template at<X>(n, c, p);
    if constexpr (J::apart) {
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
  const bool onto_low = forward == (kind == Kind::pool);
  const auto axis = [&](int64_t high, int64_t low) {
    return Axis{int(onto_low ? low : high), int(onto_low ? high : low),
                resampling(low, high, true)};
  };
  J job;
  job.rows = axis(r.height, r.low_height), job.columns = axis(r.width, r.low_width);
  job.positions = int64_t(job.rows.size) * job.columns.size;
  job.channel_packets = r.channels / J::V;
  job.interleaved = r.interleaved, job.forward = forward, job.kind = kind;
  job.from = from, job.base = base, job.to = to;
  job.packets_per_thread = int(std::clamp(r.samples * job.packets() / (threads * enough_blocks),
                                          int64_t(1), most_packets_per_thread));
  const int64_t of_block = threads * job.packets_per_thread;
  job.sample_blocks = unsigned((job.packets() + of_block - 1) / of_block);
  const size_t lines = job.rows.lines() + job.columns.lines();
  launch(resample<J>, r.samples * job.sample_blocks, lines * sizeof(Line<typename J::W>), stream,
         job);
}

template <class X, class Base = X>
void run(const Resample& r, Kind kind, bool forward, Tensor from, Tensor base, Tensor to,
         void* stream) {
  if (r.samples == 0) return;  // whatever the sizes say
  if (r.height * r.width > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("resample: a map may have at most 2^31 - 1 positions on CUDA");
  const int64_t most_lines = shared_limit / sizeof(Line<wide_t<X>>);
  if (r.height + r.width + r.low_height + r.low_width > most_lines)
    throw std::invalid_argument("resample: the sides of both maps may add up to at most " +
                                std::to_string(most_lines) + " on CUDA");
  // Packets where all are whole; but channels that lie apart one by one where the results are the
  // coarser ones, which are few and have many inputs.
  const bool onto_low = forward == (kind == Kind::pool);
  constexpr int V = packet_of<X>;
  if (r.interleaved && r.channels % V == 0 && aligned({from, base, to}))
    run_job<Job<X, Base, V, false>>(r, kind, forward, from, base, to, stream);
  else if (!r.interleaved && r.channels % 8 == 0 && !onto_low)
    run_job<Job<X, Base, 8, true>>(r, kind, forward, from, base, to, stream);
  else
    run_job<Job<X, Base, 1, false>>(r, kind, forward, from, base, to, stream);
}

void run(const Resample& r, Kind kind, bool forward, Tensor from, Tensor base, Tensor to,
         void* stream) {
  const bool wide_base = base.data && base.dtype != to.dtype;
  if (to.dtype == DType::float32) return run<float>(r, kind, forward, from, base, to, stream);
  if (to.dtype == DType::float64) return run<double>(r, kind, forward, from, base, to, stream);
  if (to.dtype == DType::bfloat16)
    return wide_base ? run<bfloat16, float>(r, kind, forward, from, base, to, stream)
                     : run<bfloat16>(r, kind, forward, from, base, to, stream);
  if (to.dtype == DType::float16)
    return wide_base ? run<float16, float>(r, kind, forward, from, base, to, stream)
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
