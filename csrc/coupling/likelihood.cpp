// The coupling's likelihood map on the CPU. Squares are summed over channels as they are computed.
#include "coupling/job.h"

namespace msflow {
namespace {

// An item is a block of positions of one sample. The results themselves are not stored.
template <bool Atan, class X, class A, class W>
HD void likelihood_contiguous(const Job<W>& job, int64_t begin, int64_t end) {
  const Clamp<W> k = job.k;
  const W limit = W(job.limit), factor = W(-0.5 / double(job.channels()));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / job.blocks(), first = item % job.blocks() * job.block();
    const int64_t size = std::min(job.block(), job.positions - first);
    W squares[max_block_positions] = {}, s[max_block_positions];
    for (int64_t c = 0; c < job.conditioning; ++c) {
      const X* x = job.x1.template at<X>(n, c, first);
      const W gain = job.gain[c], shift = job.shift[c];
      INDEPENDENT
      for (int64_t i = 0; i < size; ++i) {
        const W v = affine(W(load(x[i])), gain, shift, limit);
        squares[i] += v * v;
      }
    }
    for (int64_t j = 0; j < job.transformed; ++j) {
      const X* x = job.x2.template at<X>(n, j, first);
      const A* a_s = job.a.template at<A>(n, j, first);
      const A* a_t = job.a.template at<A>(n, j + job.transformed, first);
      const W gain = job.gain[job.conditioning + j], shift = job.shift[job.conditioning + j];
      log_scales<Atan>(k, a_s, s, size);
      INDEPENDENT
      for (int64_t i = 0; i < size; ++i) {
        const W u = couple(W(load(x[i])), s[i], k.shift * W(load(a_t[i])));
        const W v = affine(u, gain, shift, limit);
        squares[i] += v * v;
      }
    }
    W* to = job.likelihoods + n * job.positions + first;
    for (int64_t i = 0; i < size; ++i) to[i] = factor * squares[i];
  }
}

template <bool Atan, class X, class A, class W>
HD void likelihood_channels_last(const Job<W>& job, int64_t begin, int64_t end) {
  const Clamp<W> k = job.k;
  const W limit = W(job.limit), factor = W(-0.5 / double(job.channels()));
  const int64_t conditioning = job.conditioning, transformed = job.transformed;
  const auto buffer = scratch<W>(job.channels() + transformed);
  W* squares = buffer.get();
  W* s = squares + job.channels();
  const W* gain = job.gain.data();
  const W* shift = job.shift.data();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / job.blocks(), first = item % job.blocks() * job.block();
    const int64_t last = std::min(first + job.block(), job.positions);
    for (int64_t p = first; p < last; ++p) {
      const X* x1 = job.x1.template at<X>(n, 0, p);
      const X* x2 = job.x2.template at<X>(n, 0, p);
      const A* a_s = job.a.template at<A>(n, 0, p);
      const A* a_t = a_s + transformed;
      INDEPENDENT
      for (int64_t c = 0; c < conditioning; ++c) {
        const W v = affine(W(load(x1[c])), gain[c], shift[c], limit);
        squares[c] = v * v;
      }
      log_scales<Atan>(k, a_s, s, transformed);
      INDEPENDENT
      for (int64_t j = 0; j < transformed; ++j) {
        const W u = couple(W(load(x2[j])), s[j], k.shift * W(load(a_t[j])));
        const W v = affine(u, gain[conditioning + j], shift[conditioning + j], limit);
        squares[conditioning + j] = v * v;
      }
      job.likelihoods[n * job.positions + p] = factor * W(ordered_sum(squares, job.channels()));
    }
  }
}

BODIES(likelihood)

}  // namespace

void coupling_likelihood_cpu(const Coupling& coupling, Tensor x1, Tensor x2, Tensor a,
                             void* likelihoods) {
  const auto run = [&](auto zero, Body body) {
    using W = decltype(zero);
    Job<W> job(coupling);
    job.x1 = x1, job.x2 = x2, job.a = a, job.likelihoods = static_cast<W*>(likelihoods);
    job.by_position = true;
    parallel_for(job.items(), job.item_size(), body, job);
  };
  DISPATCH(likelihood, x2.dtype, a.dtype, run)
}

}  // namespace msflow
