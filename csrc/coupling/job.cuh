// A coupling call on CUDA: its operands, and how they are cut into blocks.
#pragma once

#include <type_traits>

#include "common/launch.cuh"
#include "coupling/coupling.h"

namespace msflow {
namespace {

constexpr int64_t stage_budget =
    16 * 1024;  // bytes of shared memory for the rows of an interleaved block

// What a call is about, which decides how it is cut: the inverse goes as the forward does.
enum class Pass { forward, backward, likelihood };

constexpr int likelihood_rows = 2 * warps;  // positions of an interleaved block, two for each warp

// Operands of all passes; in each, some are unused. A packet holds 16 bytes of the
// subnet's output.
template <class X_, class A_>
struct Job : Coupling {
  using X = X_;
  using A = A_;
  using W = wide_t<X>;
  static constexpr int V = packet_of<A>;
  static constexpr int sm_blocks = sizeof(W) == 8 ? 1 : 3;  // at least; doubles would spill

  Tensor x1, x2, a, y1, y2;         // y1, y2: results, or their gradients
  Tensor copy;                      // y1 in the subnet's type, or its gradient, if any
  Tensor grad_x1, grad_x2, grad_a;  // backward
  Clamp<W> k;                       // the soft clamp's constants
  bool whole = false;               // packets are aligned
  bool stage_whole;                 // and so are those of the stage in shared memory
  bool vectors_whole;               // and of scale and offset
  Planar planar;
  Interleaved rows;
  W* log_det_parts;  // (N, blocks of a sample)
  W* grad_parts;     // (grad_rows, 2, C)
  const W* grad_log_det = nullptr;
  W* likelihoods = nullptr;  // (N, P)

  Job(const Coupling& c, void* memory, Pass pass)
      : Coupling(c),
        k(make_clamp<W>(c.form, c.clamp)),
        stage_whole(c.passive % V == 0 && c.split % V == 0 && c.channels() % V == 0),
        vectors_whole(stage_whole && (uintptr_t(c.scale) | uintptr_t(c.offset)) % 16 == 0),
        planar(c.channels(), c.positions, V, threads, 4, false),
        rows(c.positions, c.channels() * int64_t(sizeof(X)), stage_budget) {
    if (pass == Pass::likelihood) {
      planar = planar_of_all_channels(c.channels(), c.positions, V);
      rows = Interleaved(c.positions, 1, likelihood_rows);
    }
    Scratch scratch(memory);
    log_det_parts = scratch.take<W>(pass == Pass::forward ? blocks() : 0);
    grad_parts = scratch.take<W>(pass == Pass::backward ? grad_rows() * 2 * channels() : 0);
    bytes = scratch.bytes();
  }

  int64_t bytes;  // of scratch memory
  int64_t sample_blocks() const { return interleaved ? rows.tiles : planar.blocks(); }
  int64_t blocks() const { return channels() ? samples * sample_blocks() : 0; }
  int64_t grad_rows() const { return samples * (interleaved ? rows.tiles : planar.pieces); }
  HD int64_t stage_rows_bytes() const {
    return (rows.rows * channels() * int64_t(sizeof(X)) + 15) / 16 * 16;
  }
  size_t stage_bytes() const { return size_t(stage_rows_bytes() + channels() * 2); }

  // The channel from which result k comes; one outside makes the result NaN, because no exception
  // leaves a kernel.
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
  // Whether result k has a copy: never, where both types are one.
  __device__ bool is_copied(int64_t k) const {
    return !std::is_same<X, A>::value && copy.data && k < split;
  }

  // a_s becomes s.
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
    return active_gradients(k, grad_y, grad_s, x, s, slope, a_t, gain, shift, W(limit));
  }
};

// Scale and offset of V neighbours: of one channel, or of as many.
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
    if (job.scale) load(gain, static_cast<const W*>(job.scale) + channel, count, job.vectors_whole);
    if (job.offset)
      load(shift, static_cast<const W*>(job.offset) + channel, count, job.vectors_whole);
  }
};

// The results of channel c at position p and its neighbours, V in all, before they are permuted;
// adds their log-scales to `sum`.
template <class J>
__device__ __forceinline__ void results(const J& job, const Affine<J>& vector, int64_t sample,
                                        int64_t c, int64_t p, int64_t count,
                                        typename J::W (&v)[J::V], typename J::W& sum) {
  using X = typename J::X;
  using A = typename J::A;
  using W = typename J::W;
  constexpr int V = J::V;
  const bool whole = job.whole && count >= V;
  const int64_t j = c - job.passive;
  if (j < 0) {
    load(v, job.x1.template at<X>(sample, c, p), count, whole);
  } else {
    W s[V], t[V];
    const auto x = fetch<V>(job.x2.template at<X>(sample, j, p), count, whole);
    const auto a_s = fetch<V>(job.a.template at<A>(sample, j, p), count, whole);
    const auto a_t = fetch<V>(job.a.template at<A>(sample, j + job.active, p), count, whole);
    unpack(v, x), unpack(s, a_s), unpack(t, a_t);
    job.log_scales(s);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      v[i] = coupled(v[i], s[i], job.k.shift * t[i]);
      sum += s[i];
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = affine(v[i], vector.gain[i], vector.shift[i], W(job.limit));
}

// Calls run with a null Job* that tells the element types of the stream and of the subnet's output.
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

// a_t must be aligned as a_s is.
template <class J>
bool subnet_aligned(const J& job) {
  return job.interleaved ? job.active % J::V == 0 : true;
}

}  // namespace
}  // namespace msflow
