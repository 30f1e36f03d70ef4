// A coupling call on CUDA: its operands, and how they are split into blocks.
#pragma once

#include <type_traits>

#include "common/grid.cuh"
#include "common/reduction.cuh"
#include "common/vector_access.cuh"
#include "coupling/coupling.h"

namespace msflow {
namespace {

// Bytes of shared memory for the rows of a channels_last block.
constexpr int64_t stage_budget = 16 * 1024;

// Decides how a call is split into blocks. The inverse is split as the forward pass.
enum class Pass { forward, backward, likelihood };

// Positions of a channels_last block of the likelihood: two for each warp.
constexpr int likelihood_rows = 2 * warps;

// Operands of all passes. Each pass uses some of them. A packet is 16 bytes of the subnet's output.
template <class X_, class A_>
struct Job : Coupling {
  using X = X_;
  using A = A_;
  using W = accumulation_t<X>;
  static constexpr int V = packet_of<A>;
  // Blocks per multiprocessor that a kernel asks for. With more, double would spill registers.
  static constexpr int sm_blocks = sizeof(W) == 8 ? 1 : 3;

  Tensor x1, x2, a, y1, y2;         // y1, y2: results, or their gradients in the backward
  Tensor copy;                      // y1 in the subnet's dtype, or its gradient; may be null
  Tensor grad_x1, grad_x2, grad_a;  // backward
  Clamp<W> k;                       // the soft clamp's constants
  bool vectorized = false;          // packets of the tensors are aligned
  bool stage_vectorized;            // packets of the stage in shared memory are aligned
  bool affine_vectorized;           // packets of scale and offset are aligned
  ContiguousGrid contiguous_grid;
  ChannelsLastGrid rows;
  W* log_det_parts;  // (N, blocks of a sample)
  W* grad_parts;     // (grad_rows, 2, C)
  const W* grad_log_det = nullptr;
  W* likelihoods = nullptr;  // (N, P)

  Job(const Coupling& c, void* memory, Pass pass)
      : Coupling(c),
        k(make_clamp<W>(c.form, c.clamp)),
        stage_vectorized(c.conditioning % V == 0 && c.split % V == 0 && c.channels() % V == 0),
        affine_vectorized(stage_vectorized && (uintptr_t(c.scale) | uintptr_t(c.offset)) % 16 == 0),
        contiguous_grid(c.channels(), c.positions, V, threads, 4, false),
        rows(c.positions, c.channels() * int64_t(sizeof(X)), stage_budget) {
    if (pass == Pass::likelihood) {
      contiguous_grid = grid_with_all_channels(c.channels(), c.positions, V);
      rows = ChannelsLastGrid(c.positions, 1, likelihood_rows);
    }
    Scratch scratch(memory);
    log_det_parts = scratch.take<W>(pass == Pass::forward ? blocks() : 0);
    grad_parts = scratch.take<W>(pass == Pass::backward ? grad_rows() * 2 * channels() : 0);
    bytes = scratch.bytes();
  }

  int64_t bytes;  // of scratch memory
  int64_t sample_blocks() const { return channels_last ? rows.tiles : contiguous_grid.blocks(); }
  int64_t blocks() const { return channels() ? samples * sample_blocks() : 0; }
  int64_t grad_rows() const {
    return samples * (channels_last ? rows.tiles : contiguous_grid.pieces);
  }
  HD int64_t stage_rows_bytes() const {
    return (rows.rows * channels() * int64_t(sizeof(X)) + 15) / 16 * 16;
  }
  size_t stage_bytes() const { return size_t(stage_rows_bytes() + channels() * 2); }

  // Returns the source channel of a result, or -1 if perm is out of range. The result is then NaN,
  // because a kernel cannot throw.
  __device__ int64_t source(int64_t result) const {
    if (!perm) return result;
    const int64_t c = perm[result];
    return c >= 0 && c < channels() ? c : -1;
  }
  __device__ W gain(int64_t c) const {
    if (c < 0) return W(NAN);
    return scale ? static_cast<const W*>(scale)[c] : W(1);
  }
  __device__ W shift(int64_t c) const {
    return offset && c >= 0 ? static_cast<const W*>(offset)[c] : W(0);
  }
  __device__ X* result(int64_t n, int64_t channel) const {
    return channel < split ? y1.template at<X>(n, channel) : y2.template at<X>(n, channel - split);
  }
  // Returns whether result k is also written to `copy`, which is null if both dtypes are equal.
  __device__ bool is_copied(int64_t k) const {
    return !std::is_same<X, A>::value && copy.data && k < split;
  }

  // Replaces a_s by s.
  __device__ __forceinline__ void log_scales(W (&s)[V]) const {
    if (form == ClampForm::atan) {
#pragma unroll
      for (int i = 0; i < V; ++i) s[i] = log_scale<true>(k, s[i]);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) s[i] = log_scale<false>(k, s[i]);
    }
  }
  __device__ __forceinline__ Gradients<W> gradients(W grad_y, W grad_s, W x, W a_s, W a_t, W gain,
                                                    W shift) const {
    W slope;
    const W s =
        form == ClampForm::atan ? log_scale<true>(k, a_s, slope) : log_scale<false>(k, a_s, slope);
    return transformed_gradients(k, grad_y, grad_s, x, s, slope, a_t, gain, shift, W(limit));
  }
};

// Scale and offset of V neighbours, which are positions of one channel or V channels.
template <class J>
struct Affine {
  typename J::W gain[J::V], shift[J::V];

  __device__ __forceinline__ Affine(const J& job, int64_t channel) {
    const auto of_gain = job.gain(channel), of_shift = job.shift(channel);
#pragma unroll
    for (int i = 0; i < J::V; ++i) gain[i] = of_gain, shift[i] = of_shift;
  }
  __device__ __forceinline__ Affine(const J& job, int64_t channel, int64_t count) {
    using W = typename J::W;
#pragma unroll
    for (int i = 0; i < J::V; ++i) gain[i] = 1, shift[i] = 0;
    if (job.scale)
      load(gain, static_cast<const W*>(job.scale) + channel, count, job.affine_vectorized);
    if (job.offset)
      load(shift, static_cast<const W*>(job.offset) + channel, count, job.affine_vectorized);
  }
};

// Computes V neighbouring results, starting at channel c and position p, before the permutation.
// Adds their log-scales to `sum`.
template <class J>
__device__ __forceinline__ void results(const J& job, const Affine<J>& vector, int64_t sample,
                                        int64_t c, int64_t p, int64_t count,
                                        typename J::W (&v)[J::V], typename J::W& sum) {
  using X = typename J::X;
  using A = typename J::A;
  using W = typename J::W;
  constexpr int V = J::V;
  const bool vectorized = job.vectorized && count >= V;
  const int64_t j = c - job.conditioning;
  if (j < 0) {
    load(v, job.x1.template at<X>(sample, c, p), count, vectorized);
  } else {
    W s[V], t[V];
    const auto x = fetch<V>(job.x2.template at<X>(sample, j, p), count, vectorized);
    const auto a_s = fetch<V>(job.a.template at<A>(sample, j, p), count, vectorized);
    const auto a_t =
        fetch<V>(job.a.template at<A>(sample, j + job.transformed, p), count, vectorized);
    unpack(v, x), unpack(s, a_s), unpack(t, a_t);
    job.log_scales(s);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      v[i] = couple(v[i], s[i], job.k.shift * t[i]);
      sum += s[i];
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = affine(v[i], vector.gain[i], vector.shift[i], W(job.limit));
}

// Calls run with a null Job* whose type holds the element types of the data and the subnet.
template <class Run>
auto with_types(DType x, DType a, Run run) {
  const auto both = [&](DType first, DType second) { return x == first && a == second; };
  if (both(DType::float32, DType::float32)) return run((Job<float, float>*)nullptr);
  if (both(DType::float64, DType::float64)) return run((Job<double, double>*)nullptr);
  if (both(DType::bfloat16, DType::bfloat16)) return run((Job<bfloat16, bfloat16>*)nullptr);
  if (both(DType::float16, DType::float16)) return run((Job<float16, float16>*)nullptr);
  if (both(DType::float32, DType::bfloat16)) return run((Job<float, bfloat16>*)nullptr);
  if (both(DType::float32, DType::float16)) return run((Job<float, float16>*)nullptr);
  throw std::invalid_argument("coupling: no kernel for these element types");
}

// Returns whether a_t, the second half of a, is aligned like a_s, the first.
template <class J>
bool subnet_aligned(const J& job) {
  return job.channels_last ? job.transformed % J::V == 0 : true;
}

}  // namespace
}  // namespace msflow
