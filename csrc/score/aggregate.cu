// Aggregation over scales on CUDA. The kernels run in this order: prepare, upsample, range, count
// (once per digit), finish, scores. The k lowest pixels are found by a radix search, which is exact
// and parallel.
#include "common/elementary.h"
#include "common/reduction.cuh"
#include "score/formula.h"
#include "score/job.cuh"

namespace msflow {
namespace {

// A block processes one map of one image: it computes the exponentials and clears the histograms.
template <class W>
__global__ void __launch_bounds__(threads, 1) prepare(const __grid_constant__ Job<W> job) {
  const int64_t n = blockIdx.x / job.count, level = blockIdx.x % job.count;
  const auto& map = job.levels[level];
  const W* from = map.log_likelihood + n * map.size();
  W* to = map.probability + n * map.size();
  W high = 0;
  if (!job.mean) {
    key_t<W> best = 0;
    for (int64_t i = threadIdx.x; i < map.size(); i += threads) {
      const auto key = key_of(from[i]);
      best = key > best ? key : best;
    }
    high = value_of<W>(block_max(best));
  }
  for (int64_t i = threadIdx.x; i < map.size(); i += threads) to[i] = exp_(from[i] - high);
  if (level == 0)
    for (int64_t i = threadIdx.x; i < job.passes * bins; i += threads)
      job.histogram[n * job.passes * bins + i] = 0;
}

// A thread computes V neighbouring pixels of the sums over scales, a block its extremes.
template <class W>
__global__ void __launch_bounds__(threads, 1) upsample(const __grid_constant__ Job<W> job) {
  constexpr int V = Job<W>::V;
  const int64_t n = blockIdx.x / job.blocks();
  const int64_t packet = blockIdx.x % job.blocks() * threads + threadIdx.x;
  const int64_t y = packet / job.row_packets(), x = packet % job.row_packets() * V;
  key_t<W> low = 0, high = 0, probability = 0;
  if (y < job.height) {
    W logs[V] = {}, sums[V] = {};
    for (int level = 0; level < job.count; ++level) {
      const auto& map = job.levels[level];
      const Tap<W> row = tap<W>(map.rows, y, map.height);
      const int64_t upper = n * map.size() + row.low * map.width;
      const int64_t lower = n * map.size() + row.high * map.width;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const Tap<W> column = tap<W>(map.columns, x + v, map.width);
        const auto sample = [&](const W* from) {
          return interpolate(
              interpolate(from[upper + column.low], from[lower + column.low], row.weight),
              interpolate(from[upper + column.high], from[lower + column.high], row.weight),
              column.weight);
        };
        sums[v] += sample(map.probability);
        if (!job.mean) logs[v] += sample(map.log_likelihood);
      }
    }
    const int64_t count = job.width - x, to = (n * job.height + y) * job.width + x;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (job.mean) sums[v] *= W(-1) / W(job.count);
      if (v >= count) continue;
      const auto key = key_of(logs[v]), p = key_of(sums[v]);
      low = ~key > low ? ~key : low;
      high = key > high ? key : high;
      probability = p > probability ? p : probability;
    }
    const bool vectorized = job.vectorized && count >= V;
    store(job.anomaly_map + to, sums, count, vectorized);
    if (!job.mean) store(job.image_map + to, logs, count, vectorized);
  }
  low = block_max(low), high = block_max(high), probability = block_max(probability);
  if (threadIdx.x > 0) return;
  const int64_t all = job.samples * job.blocks();
  job.extremes[blockIdx.x] = low;
  job.extremes[all + blockIdx.x] = high;
  job.extremes[2 * all + blockIdx.x] = probability;
}

// A block computes the extremes of one image, with which the search starts.
template <class W>
__global__ void __launch_bounds__(threads, 1) range(const __grid_constant__ Job<W> job) {
  const int64_t n = blockIdx.x, all = job.samples * job.blocks();
  key_t<W> best[3] = {};
  for (int64_t i = threadIdx.x; i < job.blocks(); i += threads)
#pragma unroll
    for (int e = 0; e < 3; ++e) {
      const auto key = job.extremes[e * all + n * job.blocks() + i];
      best[e] = key > best[e] ? key : best[e];
    }
#pragma unroll
  for (int e = 0; e < 3; ++e) best[e] = block_max(best[e]);
  if (threadIdx.x > 0) return;
  if (job.mean) {
    job.score[n] = value_of<W>(best[2]);
    return;
  }
  const key_t<W> low = ~best[0], distance = best[1] - low;
  int bits = 0;
  while (bits < key_bits<W> && distance >> bits) ++bits;
  job.searches[n * (job.passes + 1)] = {low, bits, job.k};
  job.maxima[n] = {value_of<W>(best[1]), value_of<W>(best[2])};
}

// Returns the search of an image after `pass` histograms, in every thread of all its blocks. The
// image's first block also stores it.
template <class W>
__device__ Search<W> refine_search(const Job<W>& job, int64_t n, int64_t block, int pass) {
  Search<W>* stored = job.searches + n * (job.passes + 1) + pass;
  if (pass == 0) return *stored;
  // ends[t]: number of pixels in the bins of threads 0 to t.
  __shared__ unsigned ends[threads];
  __shared__ Search<W> result;
  const Search<W> before = stored[-1];
  constexpr int bins_per_thread = bins / threads;
  const int t = int(threadIdx.x);
  const unsigned* counts = job.histogram + (n * job.passes + pass - 1) * bins + t * bins_per_thread;
  unsigned sum = 0;
  for (int i = 0; i < bins_per_thread; ++i) sum += counts[i];
  ends[t] = sum;
  for (int offset = 1; offset < threads; offset *= 2) {
    __syncthreads();
    const unsigned earlier = t >= offset ? ends[t - offset] : 0;
    __syncthreads();
    ends[t] += earlier;
  }
  int64_t rank = before.rank - (ends[t] - sum);
  if (rank > 0 && rank <= int64_t(sum)) {
    int bin = t * bins_per_thread;
    for (int i = 0; rank > int64_t(counts[i]); ++i, ++bin) rank -= counts[i];
    result = {before.low + (key_t<W>(bin) << before.shift()), before.shift(), rank};
    if (block == 0) *stored = result;
  }
  __syncthreads();
  return result;
}

// Counts the next digit of the pixels of a piece that are still candidates.
template <class W>
__global__ void __launch_bounds__(threads, 1) count(const __grid_constant__ Job<W> job, int pass) {
  __shared__ unsigned counts[bins];
  const int64_t n = blockIdx.x / job.pieces(), block = blockIdx.x % job.pieces();
  for (int i = int(threadIdx.x); i < bins; i += threads) counts[i] = 0;
  const Search<W> search = refine_search(job, n, block, pass);
  __syncthreads();
  const W* pixels = job.image_map + n * job.size();
  const int64_t end =
      (block + 1) * piece_pixels < job.size() ? (block + 1) * piece_pixels : job.size();
  for (int64_t i = block * piece_pixels + threadIdx.x; i < end; i += threads) {
    const auto key = key_of(pixels[i]);
    const auto digit = (key - search.low) >> search.shift();
    if (key >= search.low && digit < bins) atomicAdd(&counts[digit], 1u);
  }
  __syncthreads();
  unsigned* to = job.histogram + (n * job.passes + pass) * bins;
  for (int i = int(threadIdx.x); i < bins; i += threads)
    if (counts[i]) atomicAdd(&to[i], counts[i]);
}

// Finishes the maps of a piece, and sums its pixels below the k-th lowest for the scores.
template <class W>
__global__ void __launch_bounds__(threads, 1) finish(const __grid_constant__ Job<W> job) {
  const int64_t n = blockIdx.x / job.pieces(), block = blockIdx.x % job.pieces();
  const key_t<W> bound = refine_search(job, n, block, job.passes).low;
  const W largest = value_of<W>(bound);
  const Maxima<W> high = job.maxima[n];
  double sum = 0, exponentials = 0;
  const int64_t end =
      (block + 1) * piece_pixels < job.size() ? (block + 1) * piece_pixels : job.size();
  constexpr int in_flight = 4;  // pixels whose loads overlap: all are read before one is written
  for (int64_t first = block * piece_pixels + threadIdx.x; first < end;
       first += in_flight * threads) {
    W* image = job.image_map + n * job.size() + first;
    W* anomaly = job.anomaly_map + n * job.size() + first;
    W log_likelihoods[in_flight], probabilities[in_flight];
#pragma unroll
    for (int i = 0; i < in_flight; ++i)
      if (first + i * threads < end)
        log_likelihoods[i] = image[i * threads], probabilities[i] = anomaly[i * threads];
#pragma unroll
    for (int i = 0; i < in_flight; ++i) {
      if (first + i * threads >= end) break;
      const W log_likelihood = log_likelihoods[i];
      image[i * threads] = 1 - exp_(log_likelihood - high.log_likelihood);
      anomaly[i * threads] = high.probability - probabilities[i];
      if (key_of(log_likelihood) < bound) {
        sum += double(log_likelihood);
        exponentials += double(exp_(log_likelihood - largest));
      }
    }
  }
  sum = block_sum(sum), exponentials = block_sum(exponentials);
  if (threadIdx.x == 0) job.sums[2 * blockIdx.x] = sum, job.sums[2 * blockIdx.x + 1] = exponentials;
}

// A block computes the scores of one image.
template <class W>
__global__ void __launch_bounds__(threads, 1) scores(const __grid_constant__ Job<W> job) {
  const int64_t n = blockIdx.x;
  double sum = 0, exponentials = 0;
  for (int64_t i = threadIdx.x; i < job.pieces(); i += threads) {
    sum += job.sums[2 * (n * job.pieces() + i)];
    exponentials += job.sums[2 * (n * job.pieces() + i) + 1];
  }
  sum = block_sum(sum), exponentials = block_sum(exponentials);
  if (threadIdx.x > 0) return;
  const Search<W> found = job.searches[n * (job.passes + 1) + job.passes];
  const double largest = double(value_of<W>(found.low)), ties = double(found.rank);
  const Scores s = scores_of(double(job.maxima[n].log_likelihood), largest, sum + ties * largest,
                             exponentials + ties, double(job.k));
  job.score[n] = W(s.score), job.log_score[n] = W(s.log_score), job.nll_score[n] = W(s.nll_score);
}

template <class W>
void run(Job<W>& job, void* stream) {
  job.vectorized = job.width % Job<W>::V == 0 &&
                   reinterpret_cast<uintptr_t>(job.anomaly_map) % 16 == 0 &&
                   reinterpret_cast<uintptr_t>(job.image_map) % 16 == 0;
  launch(prepare<W>, job.samples * job.count, 0, stream, job);
  launch(upsample<W>, job.samples * job.blocks(), 0, stream, job);
  launch(range<W>, job.samples, 0, stream, job);
  if (job.mean) return;
  for (int pass = 0; pass < job.passes; ++pass)
    launch(count<W>, job.samples * job.pieces(), 0, stream, job, pass);
  launch(finish<W>, job.samples * job.pieces(), 0, stream, job);
  launch(scores<W>, job.samples, 0, stream, job);
}

template <class Run>
auto with_type(DType dtype, Run run) {
  if (dtype == DType::float32) return run(float());
  if (dtype == DType::float64) return run(double());
  throw std::invalid_argument("score: maps must be float32 or float64");
}

}  // namespace

int64_t aggregate_scratch(DType dtype, int64_t samples, int64_t height, int64_t width,
                          const std::vector<Scale>& scales) {
  return with_type(dtype, [&](auto zero) {
    return Job<decltype(zero)>(samples, height, width, 1, scales, false, nullptr).bytes;
  });
}

void aggregate_cuda(DType dtype, int64_t samples, int64_t height, int64_t width, int64_t k,
                    const std::vector<Scale>& scales, void* score, void* log_score, void* nll_score,
                    void* anomaly_map, void* image_map, void* scratch, void* stream) {
  with_type(dtype, [&](auto zero) {
    using W = decltype(zero);
    Job<W> job(samples, height, width, k, scales, false, scratch);
    require_memory(scratch, job.bytes);
    job.score = static_cast<W*>(score), job.log_score = static_cast<W*>(log_score);
    job.nll_score = static_cast<W*>(nll_score);
    job.anomaly_map = static_cast<W*>(anomaly_map), job.image_map = static_cast<W*>(image_map);
    run(job, stream);
  });
}

void mean_aggregate_cuda(DType dtype, int64_t samples, int64_t height, int64_t width,
                         const std::vector<Scale>& scales, void* score, void* anomaly_map,
                         void* scratch, void* stream) {
  with_type(dtype, [&](auto zero) {
    using W = decltype(zero);
    Job<W> job(samples, height, width, 1, scales, true, scratch);
    require_memory(scratch, job.bytes);
    job.score = static_cast<W*>(score), job.log_score = job.nll_score = nullptr;
    job.anomaly_map = static_cast<W*>(anomaly_map), job.image_map = nullptr;
    run(job, stream);
  });
}

}  // namespace msflow
