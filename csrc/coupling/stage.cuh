// What an interleaved coupling permutes goes through shared memory.
#pragma once

#include "coupling/job.cuh"

namespace msflow {
namespace {

// Of an interleaved block, in shared memory: its rows of all channels, or of all results, and the
// order in which the other of the two lie in a row. The permutation is read once for it, because a
// thread has too few rows to read it for itself.
template <class J>
struct Stage {
  using X = typename J::X;
  using W = typename J::W;
  X* rows;
  int16_t* order;
  int size;    // of a row
  bool whole;  // packets are aligned

  __device__ explicit Stage(const J& job)
      : rows(shared_memory<X>()),
        order(reinterpret_cast<int16_t*>(shared_memory<unsigned char>() + job.stage_rows_bytes())),
        size(int(job.channels())),
        whole(job.stage_whole) {}

  // For rows of channels.
  __device__ __forceinline__ void order_results(const J& job) const {
    for (int k = int(threadIdx.x); k < size; k += threads) order[k] = int16_t(job.source(k));
  }
  // For rows of results.
  __device__ __forceinline__ void order_channels(const J& job) const {
    for (int k = int(threadIdx.x); k < size; k += threads)
      if (const int64_t c = job.source(k); c >= 0) order[c] = int16_t(k);
  }

  __device__ __forceinline__ void put(int row, int64_t first, const W (&from)[J::V],
                                      int64_t count) const {
    store(rows + row * size + first, from, count, whole);
  }
  // V neighbours in that order; NaN is what lies outside. Where the order is no permutation, what
  // lies nowhere may be anything.
  __device__ __forceinline__ void get(W (&to)[J::V], int row, int64_t first, int64_t count) const {
    int place[J::V];
    load(place, order + first, count, whole);
#pragma unroll
    for (int i = 0; i < J::V; ++i)
      to[i] = unsigned(place[i]) < unsigned(size) ? W(load(rows[row * size + place[i]])) : W(NAN);
  }
};

// Writes results `begin` to `begin + size` of the staged channels to y.
template <class J>
__device__ __forceinline__ void write_results(const J& job, const InterleavedPlace& at,
                                              const Stage<J>& stage, const Tensor& y, int64_t begin,
                                              int64_t size) {
  over_packets<J::V>(size, at.rows, [&](int64_t k, int64_t count) {
    return [=, &job, &at, &stage, &y](int row) {
      typename J::W u[J::V];
      stage.get(u, row, begin + k, count);
      const bool whole = job.whole && count >= J::V;
      store(y.template at<typename J::X>(at.sample, k, at.first + row), u, count, whole);
      if (job.is_copied(begin + k))
        store(job.copy.template at<typename J::A>(at.sample, k, at.first + row), u, count, whole);
    };
  });
}

// Stages the results, of each thread a few packets at a time: their loads are under way together.
template <class J>
__device__ __forceinline__ void read_results(const J& job, const InterleavedPlace& at,
                                             const Stage<J>& stage) {
  using X = typename J::X;
  using W = typename J::W;
  constexpr int V = J::V, batch = 4;
  const int split = int(job.split), of_first = (split + V - 1) / V;
  const int packets = of_first + (stage.size - split + V - 1) / V;
  const Share<V> share(packets * V);
  if (share.row >= share.row_step) return;
  for (int q = share.lane(); q < packets; q += share.lanes) {
    const bool first = q < of_first;
    const int k = (first ? q : q - of_first) * V, result = first ? k : split + k;
    const int count = (first ? split : stage.size) - result;
    const bool whole = job.whole && count >= V;
    for (int begin = share.row; begin < at.rows; begin += batch * share.row_step) {
      Words<X, V> y[batch];
#pragma unroll
      for (int b = 0; b < batch; ++b) {
        const int row = begin + b * share.row_step;
        if (row < at.rows)
          y[b] = fetch<V>((first ? job.y1 : job.y2).template at<X>(at.sample, k, at.first + row),
                          count, whole);
      }
#pragma unroll
      for (int b = 0; b < batch; ++b) {
        const int row = begin + b * share.row_step;
        if (row >= at.rows) break;
        W u[V];
        unpack(u, y[b]);
        if (job.is_copied(result)) {
          W added[V];
          load(added, job.copy.template at<typename J::A>(at.sample, k, at.first + row), count,
               whole);
#pragma unroll
          for (int i = 0; i < V; ++i) u[i] += added[i];
        }
        stage.put(row, result, u, count);
      }
    }
  }
}

}  // namespace
}  // namespace msflow
