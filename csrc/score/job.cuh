// A call of the aggregation on CUDA: its operands, and how they are split into blocks.
#pragma once

#include <stdexcept>
#include <vector>

#include "common/bilinear.h"
#include "common/grid.cuh"
#include "common/vector_access.cuh"
#include "score/score.h"

namespace msflow {
namespace {

constexpr int digit_bits = 11, bins = 1 << digit_bits;

// Pixels of a block in the kernels count and finish.
constexpr int64_t piece_pixels = 16 * threads;

// Floats as integers in the same order. NaN is largest, as in torch's max and topk.
template <class W>
struct Order;
template <>
struct Order<float> {
  using Key = uint32_t;
};
template <>
struct Order<double> {
  using Key = unsigned long long;
};
template <class W>
using key_t = typename Order<W>::Key;

template <class W>
constexpr int key_bits = 8 * int(sizeof(W));

template <class W>
__device__ __forceinline__ key_t<W> key_of(W x) {
  key_t<W> bits;
  memcpy(&bits, &x, sizeof bits);
  const key_t<W> sign = key_t<W>(1) << (key_bits<W> - 1);
  return x != x ? ~key_t<W>(0) : bits & sign ? ~bits : bits | sign;
}

template <class W>
__device__ __forceinline__ W value_of(key_t<W> key) {
  const key_t<W> sign = key_t<W>(1) << (key_bits<W> - 1);
  const key_t<W> bits = key & sign ? key ^ sign : ~key;
  W x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

template <class W>
struct Level {
  const W* log_likelihood;  // (N, h, w)
  W* probability;           // exp(log_likelihood), or relative to the maximum of the map
  int64_t height, width;
  Resampling rows, columns;

  HD int64_t size() const { return height * width; }
};

// A radix search: the result is the rank-th lowest of the pixels whose keys are low + d, where d
// has at most `bits` bits.
template <class W>
struct Search {
  key_t<W> low;
  int bits;
  int64_t rank;

  HD int shift() const { return bits > digit_bits ? bits - digit_bits : 0; }
};

// The maxima of both sums over an image.
template <class W>
struct Maxima {
  W log_likelihood, probability;
};

template <class W>
struct Job {
  static constexpr int V = packet_of<W>;
  static constexpr int passes = (key_bits<W> + digit_bits - 1) / digit_bits;

  int64_t samples, height, width, k;
  bool mean;        // FastFlow's aggregation: no sum of log-likelihoods, no selection
  bool vectorized;  // packets of the maps are aligned
  int count;        // of levels
  Level<W> levels[max_scales];
  // The maps hold the sums of probabilities and log-likelihoods until they are finished.
  W *anomaly_map, *image_map;
  W *score, *log_score, *nll_score;
  // (3, N, blocks): largest keys of ~log-likelihood, log-likelihood and probability.
  key_t<W>* extremes;
  Maxima<W>* maxima;    // (N,)
  Search<W>* searches;  // (N, passes + 1)
  unsigned* histogram;  // (N, passes, bins)
  double* sums;         // (N, pieces, 2)
  int64_t bytes;        // of scratch memory

  Job(int64_t samples, int64_t height, int64_t width, int64_t k, const std::vector<Scale>& scales,
      bool mean, void* memory)
      : samples(samples),
        height(height),
        width(width),
        k(k),
        mean(mean),
        count(int(scales.size())) {
    if (scales.size() > max_scales) throw std::invalid_argument("score: at most 16 maps on CUDA");
    Scratch scratch(memory);
    for (int i = 0; i < count; ++i) {
      const Scale& s = scales[i];
      levels[i] = {static_cast<const W*>(s.log_likelihood),
                   scratch.take<W>(samples * s.height * s.width),
                   s.height,
                   s.width,
                   resampling(s.height, height, !mean),
                   resampling(s.width, width, !mean)};
    }
    extremes = scratch.take<key_t<W>>(3 * samples * blocks());
    maxima = scratch.take<Maxima<W>>(samples);
    searches = scratch.take<Search<W>>(samples * (passes + 1));
    histogram = scratch.take<unsigned>(samples * passes * bins);
    sums = scratch.take<double>(samples * pieces() * 2);
    bytes = scratch.bytes();
  }

  HD int64_t size() const { return height * width; }
  HD int64_t row_packets() const { return (width + V - 1) / V; }
  HD int64_t blocks() const { return (height * row_packets() + threads - 1) / threads; }
  HD int64_t pieces() const { return (size() + piece_pixels - 1) / piece_pixels; }
};

}  // namespace
}  // namespace msflow
