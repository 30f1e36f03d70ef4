// Resampling on CUDA. Pooling, upsampling and both their gradients are the same sum: a result is
// that of the inputs in a range of rows and columns, each times a weight of its row and one of its
// column.
#include "common/launch.cuh"
#include "resample/formula.h"
#include "resample/resample.h"

namespace msflow {
namespace {

constexpr int packets_per_thread = 8;

// Along one axis: the inputs of every result, and the weights, which belong to the results going
// forward and to the inputs going backward.
template <class W>
struct Line {
  int begin, end;  // inputs of a result
  int low, high;   // of upsampling: where a tap reads, with `weight` at `high`
  W weight;        // of pooling: 1 / the window's size
};

enum class Kind : int { pool, upsample };

template <class X_, class Base_>
struct Job {
  using X = X_;
  using Base = Base_;
  using W = wide_t<X>;
  static constexpr int V = packet_of<X>;

  int64_t samples, channels;
  int height, width, from_height, from_width;  // of the results and of the inputs
  bool interleaved, whole, forward;
  Kind kind;
  Tensor from, base, to;  // to = base + sums of from; base may be null

  HD int64_t positions() const { return int64_t(height) * width; }
  HD int64_t lines() const { return int64_t(height) + width + from_height + from_width; }
  // Packets: along positions or along channels.
  HD int64_t row_packets() const { return ((interleaved ? channels : positions()) + V - 1) / V; }
  HD int64_t packets() const { return row_packets() * (interleaved ? positions() : channels); }
  HD unsigned sample_blocks() const {
    return unsigned((packets() + threads * packets_per_thread - 1) /
                    (threads * packets_per_thread));
  }
};

// The lines of one axis, results and then inputs, of which each half is filled as far as it is
// used.
template <class J, class W = typename J::W>
__device__ void fill(const J& job, Line<W>* lines, int size, int from_size) {
  const int fine = job.forward == (job.kind == Kind::upsample) ? size : from_size;
  const int coarse = job.forward == (job.kind == Kind::upsample) ? from_size : size;
  const auto weigh = [&](Line<W>& line, int i) {
    if (job.kind == Kind::pool) {
      line.weight = W(1) / W(window(i, fine, coarse).size());
    } else {
      const Tap<W> t = tap<W>(resampling(coarse, fine, true), i, coarse);
      line.low = int(t.low), line.high = int(t.high), line.weight = t.weight;
    }
  };
  for (int i = int(threadIdx.x); i < size; i += threads) {
    Line<W>& line = lines[i];
    if (job.forward) weigh(line, i);
    Range range;
    if (job.kind == Kind::pool)
      range = window(i, from_size, size);  // backward: the windows that hold i
    else if (job.forward)
      range = {line.low, line.high + 1};
    else
      range = readers(i, size, from_size);
    line.begin = int(range.begin), line.end = int(range.end);
  }
  if (!job.forward)
    for (int i = int(threadIdx.x); i < from_size; i += threads) weigh(lines[size + i], i);
}

// The weight of input `from` in result `to` along one axis.
template <class J, class W>
__device__ __forceinline__ W weight_of(const J& job, const Line<W>* lines, int size, int to,
                                       int from) {
  const Line<W>& line = lines[job.forward ? to : size + from];
  if (job.kind == Kind::pool) return line.weight;
  return share(Tap<W>{line.low, line.high, line.weight}, job.forward ? from : to);
}

// A thread takes some packets of results of one sample, far apart.
template <class J>
__global__ void __launch_bounds__(threads, 1) resample(const __grid_constant__ J job) {
  using X = typename J::X;
  using W = typename J::W;
  constexpr int V = J::V;
  Line<W>* rows = shared_memory<Line<W>>();
  Line<W>* columns = rows + job.height + job.from_height;
  fill(job, rows, job.height, job.from_height);
  fill(job, columns, job.width, job.from_width);
  __syncthreads();
  const int64_t n = blockIdx.x / job.sample_blocks();
  const int64_t first = int64_t(blockIdx.x % job.sample_blocks()) * threads * packets_per_thread;
  for (int i = 0; i < packets_per_thread; ++i) {
    const int64_t packet = first + i * threads + threadIdx.x;
    if (packet >= job.packets()) break;
    const int64_t row = packet / job.row_packets(), along = packet % job.row_packets() * V;
    const int64_t c = job.interleaved ? along : row, p = job.interleaved ? row : along;
    const int64_t count = (job.interleaved ? job.channels : job.positions()) - along;
    const bool whole = job.whole && count >= V;
    W sums[V] = {};
    if (job.base.data) load(sums, job.base.template at<typename J::Base>(n, c, p), count, whole);
    // Calls add(weight, position) for every input of the result at q.
    const auto inputs = [&](unsigned q, auto add) {
      const int y = int(q / unsigned(job.width)), x = int(q % unsigned(job.width));
      for (int h = rows[y].begin; h < rows[y].end; ++h) {
        const W of_row = weight_of(job, rows, job.height, y, h);
        for (int w = columns[x].begin; w < columns[x].end; ++w)
          add(of_row * weight_of(job, columns, job.width, x, w), int64_t(h) * job.from_width + w);
      }
    };
    if (job.interleaved) {
      inputs(unsigned(p), [&](W weight, int64_t q) {
        W values[V];
        load(values, job.from.template at<X>(n, c, q), count, whole);
#pragma unroll
        for (int v = 0; v < V; ++v) sums[v] += weight * values[v];
      });
    } else {
      const X* from = job.from.template at<X>(n, c);
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (v < count)
          inputs(unsigned(p) + v,
                 [&](W weight, int64_t q) { sums[v] += weight * W(load(from[q])); });
    }
    store(job.to.template at<X>(n, c, p), sums, count, whole);
  }
}

template <class X, class Base = X>
void run(const Resample& r, Kind kind, bool forward, Tensor from, Tensor base, Tensor to,
         void* stream) {
  if (r.samples == 0) return;  // whatever the sizes say
  const bool onto_low = forward == (kind == Kind::pool);
  if (r.height * r.width > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("resample: a map may have at most 2^31 - 1 positions on CUDA");
  Job<X, Base> job;
  job.samples = r.samples, job.channels = r.channels, job.interleaved = r.interleaved;
  job.height = int(onto_low ? r.low_height : r.height);
  job.width = int(onto_low ? r.low_width : r.width);
  job.from_height = int(onto_low ? r.height : r.low_height);
  job.from_width = int(onto_low ? r.width : r.low_width);
  job.kind = kind, job.forward = forward, job.from = from, job.base = base, job.to = to;
  job.whole = aligned({from, base, to});
  const size_t bytes = size_t(job.lines()) * sizeof(Line<wide_t<X>>);
  if (bytes > shared_limit)
    throw std::invalid_argument("resample: the sides of both maps may add up to at most " +
                                std::to_string(shared_limit / sizeof(Line<wide_t<X>>)) +
                                " on CUDA");
  launch(resample<Job<X, Base>>, job.samples * job.sample_blocks(), bytes, stream, job);
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
