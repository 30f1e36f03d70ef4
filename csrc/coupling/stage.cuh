// Permutes the channels of a channels_last coupling through shared memory.
#pragma once

#include "coupling/job.cuh"

namespace msflow {
namespace {

// The rows of a channels_last block in shared memory, as channels or as results, and the
// permutation between the two. A block reads the permutation once, for all its rows.
template <class J>
struct Stage {
  using X = typename J::X;
  using W = typename J::W;
  X* rows;
  int16_t* order;
  int size;         // of a row
  bool vectorized;  // packets are aligned

  __device__ explicit Stage(const J& job)
      : rows(shared_memory<X>()),
        order(reinterpret_cast<int16_t*>(shared_memory<unsigned char>() + job.stage_rows_bytes())),
        size(int(job.channels())),
        vectorized(job.stage_vectorized) {}

  // Prepares `order` for rows of channels.
  __device__ __forceinline__ void order_results(const J& job) const {
    for (int k = int(threadIdx.x); k < size; k += threads) order[k] = int16_t(job.source(k));
  }
  // Prepares `order` for rows of results.
  __device__ __forceinline__ void order_channels(const J& job) const {
    for (int k = int(threadIdx.x); k < size; k += threads)
      if (const int64_t c = job.source(k); c >= 0) order[c] = int16_t(k);
  }

  __device__ __forceinline__ void put(int row, int64_t first, const W (&from)[J::V],
                                      int64_t count) const {
    store(rows + row * size + first, from, count, vectorized);
  }
  // Reads V neighbours through `order`. Out-of-range entries give NaN. If perm is not a
  // permutation, channels that no result comes from are undefined.
  __device__ __forceinline__ void get(W (&to)[J::V], int row, int64_t first, int64_t count) const {
    int place[J::V];
    load(place, order + first, count, vectorized);
#pragma unroll
    for (int i = 0; i < J::V; ++i)
      to[i] = unsigned(place[i]) < unsigned(size) ? W(load(rows[row * size + place[i]])) : W(NAN);
  }
};

// Writes results `begin` to `begin + size` of the staged channels to y.
template <class J>
__device__ __forceinline__ void write_results(const J& job, const ChannelsLastPlace& at,
                                              const Stage<J>& stage, const Tensor& y, int64_t begin,
                                              int64_t size) {
  over_packets<J::V>(size, at.rows, [&](int64_t k, int64_t count) {
    return [=, &job, &at, &stage, &y](int row) {
      typename J::W u[J::V];
      stage.get(u, row, begin + k, count);
      const bool vectorized = job.vectorized && count >= J::V;
      store(y.template at<typename J::X>(at.sample, k, at.first + row), u, count, vectorized);
      if (job.is_copied(begin + k))
        store(job.copy.template at<typename J::A>(at.sample, k, at.first + row), u, count,
              vectorized);
    };
  });
}

// Stages the results. A thread handles a few packets at a time, so that their loads overlap.
template <class J>
__device__ __forceinline__ void read_results(const J& job, const ChannelsLastPlace& at,
                                             const Stage<J>& stage) {
  using X = typename J::X;
  using W = typename J::W;
  constexpr int V = J::V, batch = 4;
  const int split = int(job.split), of_first = (split + V - 1) / V;
  const int packets = of_first + (stage.size - split + V - 1) / V;
  const ThreadLayout<V> layout(packets * V);
  if (layout.row >= layout.row_step) return;
  for (int q = layout.lane(); q < packets; q += layout.lanes) {
    const bool first = q < of_first;
    const int k = (first ? q : q - of_first) * V, result = first ? k : split + k;
    const int count = (first ? split : stage.size) - result;
    const bool vectorized = job.vectorized && count >= V;
    for (int begin = layout.row; begin < at.rows; begin += batch * layout.row_step) {
      Words<X, V> y[batch];
#pragma unroll
      for (int b = 0; b < batch; ++b) {
        const int row = begin + b * layout.row_step;
        if (row < at.rows)
          y[b] = fetch<V>((first ? job.y1 : job.y2).template at<X>(at.sample, k, at.first + row),
                          count, vectorized);
      }
#pragma unroll
      for (int b = 0; b < batch; ++b) {
        const int row = begin + b * layout.row_step;
        if (row >= at.rows) break;
        W u[V];
        unpack(u, y[b]);
        if (job.is_copied(result)) {
          W added[V];
          load(added, job.copy.template at<typename J::A>(at.sample, k, at.first + row), count,
               vectorized);
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
