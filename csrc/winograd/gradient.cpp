// The gradient of the weight of Winograd's convolution on the CPU: the adjoint of its last two
// steps. For a block of tiles transform input and gradient, add up their products point by point
// over the tiles; in the end transform the sums, nine numbers from 36.
#include "common/half.h"
#include "common/parallel.h"
#include "winograd/tiles.h"
#include "winograd/winograd.h"

namespace msflow {
namespace {

constexpr int tile = 4, side = tile + 2, points = side * side, taps = 9;
constexpr int64_t depth = 128;  // tiles whose factors for two panels stay in the first cache
// Bytes of factors and of sums at once, but `depth` tiles and a panel at least: more would be new
// memory in every call, whose pages cost a fifth of the time (16x16 512 -> 576).
constexpr int64_t cached = 8 << 20, summed = 16 << 20;

struct Job : WinogradGradient {
  Tensor x, grad;
  Grid grid;
  int64_t tiles, block;   // in all, and at work
  int64_t ins, outs;      // panels of channels at work: all of the input, some of the gradient
  int64_t first_out = 0;  // channel of the gradient
  std::unique_ptr<float[]> factors, sums;
  std::unique_ptr<uint32_t[]> zeros;

  Job(const WinogradGradient& w, Tensor x, Tensor grad)
      : WinogradGradient(w), x(x), grad(grad), grid(tile, out_height, out_width) {
    tiles = samples * grid.per_image();
    ins = panels(channels);
    const int64_t most_outs = std::max<int64_t>(1, summed / (4 * points * panel * panel * ins));
    const int64_t groups = (panels(out_channels) + most_outs - 1) / most_outs;
    outs = (panels(out_channels) + groups - 1) / groups;
    const int64_t most = std::max(depth, cached / (4 * points * panel * (ins + outs)));
    block = std::min(tiles, round_up(most, depth));
    // Zeros, because the products reach a little beyond the last channels.
    factors.reset(new float[points * (point(ins) + point(outs))]());
    sums = scratch<float>(points * outs * panel * ins * panel);
    zeros.reset(new uint32_t[std::max(channels, out_channels)]());
  }

  static int64_t panels(int64_t channels) { return (channels + panel - 1) / panel; }
  int64_t size() const { return std::min(block, tiles - grid.first); }
  int64_t out_size() const { return std::min(outs * panel, out_channels - first_out); }
  // A line more, so that the points of a tile do not share cache sets.
  int64_t point(int64_t panels) const { return panels * block * panel + line; }
  // (points, panels, block, 32) of the input; behind it those of the gradient.
  Values inputs() const { return {factors.get(), point(ins), block * panel, panel}; }
  Values gradients() const {
    return {factors.get() + points * point(ins), point(outs), block * panel, panel};
  }
};

template <class V, class X>
HD void transform_input(const Job& job, int64_t begin, int64_t end) {
  const Map map{job.x,       job.channels, job.height,     job.width,
                job.pad_top, job.pad_left, job.zeros.get()};
  transform_tiles<V, X, float, side, side>(job.grid, map, job.inputs(), begin, end);
}

template <class V, class X>
HD void transform_gradient(const Job& job, int64_t begin, int64_t end) {
  Tensor grad = job.grad;
  grad.data += job.first_out * sizeof(X);
  const Map map{grad, job.out_size(), job.out_height, job.out_width, 0, 0, job.zeros.get()};
  transform_tiles<V, X, float, tile, side>(job.grid, map, job.gradients(), begin, end);
}

// Sums over tiles stay in registers: some channels of the gradient times some of the input.
template <class V, int rows, int vectors>
HD void multiply_block(const float* a, const float* b, int64_t count, bool fresh, float* m,
                       int64_t m_step) {
  V sum[rows][vectors];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vectors; ++j) {
      load(m + i * m_step + j * size_of<V>, sum[i][j]);
      if (fresh) sum[i][j] = V{};
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    V w[vectors];
    for (int j = 0; j < vectors; ++j) load(b + k * panel + j * size_of<V>, w[j]);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < vectors; ++j) sum[i][j] += a[k * panel + i] * w[j];
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) store(m + i * m_step + j * size_of<V>, sum[i][j]);
}

// An item is a panel of the gradient's channels at a point.
template <class V, int rows, int vectors>
HD void multiply(const Job& job, int64_t begin, int64_t end) {
  const Values in = job.inputs(), out = job.gradients();
  const int64_t m_step = job.ins * panel;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t point = item / job.outs, channel = item % job.outs * panel;
    const int64_t last = std::min(panel, job.out_size() - channel);
    for (int64_t k = 0; k < job.size(); k += depth) {
      const int64_t count = std::min(depth, job.size() - k);
      const bool fresh = job.grid.first + k == 0;
      const float* a = static_cast<float*>(out.data) + point * out.point + out.at(k, channel);
      const float* b = static_cast<float*>(in.data) + point * in.point;
      for (int64_t c = 0; c < job.channels; c += vectors * size_of<V>) {
        const float *now = b + in.at(k, c), *soon = b + in.at(k, c + vectors * size_of<V>);
        float* m = job.sums.get() + item * panel * m_step + c;
        for (int64_t i = 0; i < last; i += rows) {
          for (int64_t j = i * count / panel; j < (i + rows) * count / panel; ++j)
            PREFETCH(soon + j * panel, 0, 3);
          multiply_block<V, rows, vectors>(a + i, now, count, fresh, m + i * m_step, m_step);
        }
      }
    }
  }
}

// An item is a channel of the gradient.
template <class V>
HD void transform_sums(const Job& job, int64_t begin, int64_t end) {
  const int64_t m_step = job.ins * panel, point = job.outs * panel * m_step;
  float* const kernel = job.kernel + job.first_out * job.channels * taps;
  for (int64_t item = begin; item < end; ++item) {
    const float* from = job.sums.get() + item * m_step;
    for (int64_t c = 0; c < job.channels; c += size_of<V>) {
      V sum[taps] = {}, m;
      for (int p = 0; p < points; ++p) {
        load(from + p * point + c, m);
        for (int t = 0; t < taps; ++t) sum[t] += job.transform[p * taps + t] * m;
      }
      float found[taps][size_of<V>];
      for (int t = 0; t < taps; ++t) store(found[t], sum[t]);
      float* to = kernel + (item * job.channels + c) * taps;
      for (int64_t l = 0; l < std::min(size_of<V>, job.channels - c); ++l)
        for (int t = 0; t < taps; ++t) to[l * taps + t] = found[t][l];
    }
  }
}

#define BODY(mark, V, name, ...)                                \
  mark void name##_##V(int64_t begin, int64_t end, void* job) { \
    __VA_ARGS__(*static_cast<const Job*>(job), begin, end);     \
  }
#define BODIES(mark, V, rows, vectors)                                     \
  BODY(mark, V, input_float, transform_input<V, float>)                    \
  BODY(mark, V, input_bfloat16, transform_input<V, bfloat16>)              \
  BODY(mark, V, gradient_float, transform_gradient<V, float>)              \
  BODY(mark, V, gradient_bfloat16, transform_gradient<V, bfloat16>)        \
  BODY(mark, V, multiply, multiply<V, rows, vectors>)                      \
  BODY(mark, V, sums, transform_sums<V>)                                   \
  constexpr Bodies bodies_##V{{input_float_##V, input_bfloat16_##V},       \
                              {gradient_float_##V, gradient_bfloat16_##V}, \
                              multiply_##V,                                \
                              sums_##V};

struct Bodies {
  Body input[2], gradient[2], multiply, sums;  // of floats, and of halves
};
BODIES(WIDE, Floats16, 8, 2)
BODIES(MSFLOW_CLONES, Floats8, 4, 2)

}  // namespace

void winograd_gradient_cpu(const WinogradGradient& gradient, Tensor x, Tensor grad) {
  if (gradient.channels == 0 || gradient.out_channels == 0) return;
  if (gradient.samples == 0) {
    std::fill_n(gradient.kernel, gradient.out_channels * gradient.channels * taps, 0.f);
    return;
  }
  Job job(gradient, x, grad);
  const Bodies& bodies = has_wide() ? bodies_Floats16 : bodies_Floats8;
  const bool half = x.dtype == DType::bfloat16;
  const int64_t m_step = job.ins * panel, group = job.outs * panel;
  for (; job.first_out < job.out_channels; job.first_out += group) {
    for (job.grid.first = 0; job.grid.first < job.tiles; job.grid.first += job.block) {
      if (job.first_out == 0 || job.block < job.tiles)
        parallel_for(job.size(), points * job.channels, bodies.input[half], job);
      parallel_for(job.size(), points * job.out_size(), bodies.gradient[half], job);
      parallel_for(points * job.outs, job.size() * panel * m_step, bodies.multiply, job);
    }
    parallel_for(job.out_size(), points * taps * m_step, bodies.sums, job);
  }
}

}  // namespace msflow
