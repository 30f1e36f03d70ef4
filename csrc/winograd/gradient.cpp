// The gradient of the weight of Winograd's convolution on the CPU. For each block of tiles it
// transforms input and gradient, and sums their products over the tiles, point by point. At the end
// it transforms the sums: 36 points give the nine numbers of a kernel.
#include "common/half.h"
#include "common/parallel.h"
#include "winograd/tiles.h"
#include "winograd/winograd.h"

namespace msflow {
namespace {

constexpr int tile = 4, side = tile + 2, points = side * side, taps = 9;
// Tiles whose factors for two panels fit in the L1 cache.
constexpr int64_t depth = 128;
// Most bytes of factors and of sums, though at least `depth` tiles and one panel. Larger buffers
// would be mapped anew in every call, and page faults cost a fifth of the time (16x16 512 -> 576).
constexpr int64_t cache_bytes = 8 << 20, sums_bytes = 16 << 20;

struct Job : WinogradGradient {
  Tensor x, grad;
  Grid grid;
  int64_t tiles, block;           // all tiles, and those of a block
  int64_t in_panels, out_panels;  // panels at a time: all of the input, some of the gradient
  int64_t first_out = 0;          // first channel of these panels of the gradient
  std::unique_ptr<float[]> factors, sums;
  std::unique_ptr<uint32_t[]> zeros;

  Job(const WinogradGradient& w, Tensor x, Tensor grad)
      : WinogradGradient(w), x(x), grad(grad), grid(tile, out_height, out_width) {
    tiles = samples * grid.per_image();
    in_panels = panels(channels);
    const int64_t max_outs =
        std::max<int64_t>(1, sums_bytes / (4 * points * panel * panel * in_panels));
    const int64_t groups = (panels(out_channels) + max_outs - 1) / max_outs;
    out_panels = (panels(out_channels) + groups - 1) / groups;
    const int64_t limit =
        std::max(depth, cache_bytes / (4 * points * panel * (in_panels + out_panels)));
    block = std::min(tiles, round_up(limit, depth));
    // Zeros, because the products read a little beyond the last channels.
    factors.reset(new float[points * (point(in_panels) + point(out_panels))]());
    sums = scratch<float>(points * out_panels * panel * in_panels * panel);
    zeros.reset(new uint32_t[std::max(channels, out_channels)]());
  }

  static int64_t panels(int64_t channels) { return (channels + panel - 1) / panel; }
  int64_t size() const { return std::min(block, tiles - grid.first); }
  int64_t out_size() const { return std::min(out_panels * panel, out_channels - first_out); }
  // One cache line more, so that the points of a tile do not share cache sets.
  int64_t point(int64_t panels) const { return panels * block * panel + cache_line; }
  // (points, panels, block, 32) for the input, followed by the same for the gradient.
  Values inputs() const { return {factors.get(), point(in_panels), block * panel, panel}; }
  Values gradients() const {
    return {factors.get() + points * point(in_panels), point(out_panels), block * panel, panel};
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

// Multiplies some channels of the gradient by some of the input. Sums over tiles stay in registers.
template <class V, int rows, int vectors>
HD void multiply_block(const float* a, const float* b, int64_t count, bool fresh, float* m,
                       int64_t m_step) {
  V sum[rows][vectors];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vectors; ++j) {
      load(m + i * m_step + j * lanes_of<V>, sum[i][j]);
      if (fresh) sum[i][j] = V{};
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    V w[vectors];
    for (int j = 0; j < vectors; ++j) load(b + k * panel + j * lanes_of<V>, w[j]);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < vectors; ++j) sum[i][j] += a[k * panel + i] * w[j];
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) store(m + i * m_step + j * lanes_of<V>, sum[i][j]);
}

// An item is a panel of the gradient's channels at a point.
template <class V, int rows, int vectors>
HD void multiply(const Job& job, int64_t begin, int64_t end) {
  const Values in = job.inputs(), out = job.gradients();
  const int64_t m_step = job.in_panels * panel;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t point = item / job.out_panels, channel = item % job.out_panels * panel;
    const int64_t last = std::min(panel, job.out_size() - channel);
    for (int64_t k = 0; k < job.size(); k += depth) {
      const int64_t count = std::min(depth, job.size() - k);
      const bool fresh = job.grid.first + k == 0;
      const float* a = static_cast<float*>(out.data) + point * out.point + out.at(k, channel);
      const float* b = static_cast<float*>(in.data) + point * in.point;
      for (int64_t c = 0; c < job.channels; c += vectors * lanes_of<V>) {
        const float *now = b + in.at(k, c), *next = b + in.at(k, c + vectors * lanes_of<V>);
        float* m = job.sums.get() + item * panel * m_step + c;
        for (int64_t i = 0; i < last; i += rows) {
          for (int64_t j = i * count / panel; j < (i + rows) * count / panel; ++j)
            PREFETCH(next + j * panel, 0, 3);
          multiply_block<V, rows, vectors>(a + i, now, count, fresh, m + i * m_step, m_step);
        }
      }
    }
  }
}

// An item is a channel of the gradient.
template <class V>
HD void transform_sums(const Job& job, int64_t begin, int64_t end) {
  const int64_t m_step = job.in_panels * panel, point = job.out_panels * panel * m_step;
  float* const kernel = job.kernel + job.first_out * job.channels * taps;
  for (int64_t item = begin; item < end; ++item) {
    const float* from = job.sums.get() + item * m_step;
    for (int64_t c = 0; c < job.channels; c += lanes_of<V>) {
      V sum[taps] = {}, m;
      for (int p = 0; p < points; ++p) {
        load(from + p * point + c, m);
        for (int t = 0; t < taps; ++t) sum[t] += job.transform[p * taps + t] * m;
      }
      float found[taps][lanes_of<V>];
      for (int t = 0; t < taps; ++t) store(found[t], sum[t]);
      float* to = kernel + (item * job.channels + c) * taps;
      for (int64_t l = 0; l < std::min(lanes_of<V>, job.channels - c); ++l)
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
  Body input[2], gradient[2], multiply, sums;  // [float32 or bfloat16]
};
BODIES(AVX512, Floats16, 8, 2)
BODIES(MSFLOW_CLONES, Floats8, 4, 2)

}  // namespace

void winograd_gradient_cpu(const WinogradGradient& gradient, Tensor x, Tensor grad) {
  if (gradient.channels == 0 || gradient.out_channels == 0) return;
  if (gradient.samples == 0) {
    std::fill_n(gradient.kernel, gradient.out_channels * gradient.channels * taps, 0.f);
    return;
  }
  Job job(gradient, x, grad);
  const Bodies& bodies = has_avx512() ? bodies_Floats16 : bodies_Floats8;
  const bool half = x.dtype == DType::bfloat16;
  const int64_t m_step = job.in_panels * panel, group = job.out_panels * panel;
  for (; job.first_out < job.out_channels; job.first_out += group) {
    for (job.grid.first = 0; job.grid.first < job.tiles; job.grid.first += job.block) {
      if (job.first_out == 0 || job.block < job.tiles)
        parallel_for(job.size(), points * job.channels, bodies.input[half], job);
      parallel_for(job.size(), points * job.out_size(), bodies.gradient[half], job);
      parallel_for(points * job.out_panels, job.size() * panel * m_step, bodies.multiply, job);
    }
    parallel_for(job.out_size(), points * taps * m_step, bodies.sums, job);
  }
}

}  // namespace msflow
