// Winograd's convolution on the CPU: for a block of tiles whose intermediate results stay in the
// caches, transform the input, multiply matrices point by point, transform the products.
#include <limits>
#include <stdexcept>

#include "common/half.h"
#include "common/parallel.h"
#include "winograd/formula.h"
#include "winograd/vector.h"
#include "winograd/winograd.h"

namespace msflow {
namespace {

constexpr int64_t panel = winograd_panel;
// Bytes of intermediate results at once, but tiles enough for the weights' way from memory.
constexpr int64_t cached = 4 << 20, enough = 64;

HD int64_t round_up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

struct Job : Winograd {
  Tensor x, y;
  int64_t points, down, across, tiles;            // tiles of an image, and of all
  int64_t words, v_step, m_step;                  // 32-bit words of a tile at a point
  int64_t first = 0, block = 0;                   // tiles at work
  std::unique_ptr<uint32_t[]> v;                  // (points, block, v_step) transformed input
  std::unique_ptr<float[]> m;                     // (points, block, m_step) products
  std::unique_ptr<uint32_t[]> zeros;

  explicit Job(const Winograd& w) : Winograd(w) {
    points = (tile + 2) * (tile + 2);
    down = (out_height + tile - 1) / tile, across = (out_width + tile - 1) / tile;
    tiles = samples * down * across;
    const int64_t per_word = product == DType::bfloat16 ? 2 : 1;
    words = (channels + per_word - 1) / per_word;
    // Whole vectors, and a step that is no power of two, so that rows do not share cache sets.
    v_step = round_up(words, 16) + 16;
    m_step = round_up(out_channels, panel) + 16;
    const int64_t per_tile = points * (v_step + m_step) * 4;
    const int64_t most = std::max(enough, cached / per_tile);
    const int64_t blocks = std::max<int64_t>(1, (tiles + most - 1) / most);
    block = round_up((tiles + blocks - 1) / blocks, 8);
    v = scratch<uint32_t>(points * block * v_step);
    m = scratch<float>(points * block * m_step);
    zeros.reset(new uint32_t[channels + 16]());
  }

  int64_t panels() const { return (out_channels + panel - 1) / panel; }
  int64_t size() const { return std::min(block, tiles - first); }
};

// Where a tile begins in its image's results.
struct Place {
  int64_t n, row, column;

  HD Place(const Job& job, int64_t tile)
      : n(tile / (job.down * job.across)),
        row(tile / job.across % job.down * job.tile),
        column(tile % job.across * job.tile) {}
};

template <class T>
HD void load_part(const T* from, int64_t size, Vector& v) {
  if (size >= vector_size) return load(from, v);
  T part[vector_size] = {};
  memcpy(part, from, size * sizeof(T));
  load(part, v);
}

template <class T>
HD void store_part(T* to, int64_t size, const Vector& v) {
  if (size >= vector_size) return store(to, v);
  T part[vector_size];
  store(part, v);
  memcpy(to, part, size * sizeof(T));
}

// P: type of the products' factors.
template <class X, class P, int tile>
HD void transform_tiles(const Job& job, int64_t begin, int64_t end) {
  constexpr int side = tile + 2;
  const int64_t step = job.v_step * 4 / int64_t(sizeof(P));
  for (int64_t item = begin; item < end; ++item) {
    const Place place(job, job.first + item);
    const X* from[side][side];
    for (int i = 0; i < side; ++i) {
      for (int j = 0; j < side; ++j) {
        const int64_t h = place.row + i - job.pad_top, w = place.column + j - job.pad_left;
        const bool inside = h >= 0 && h < job.height && w >= 0 && w < job.width;
        from[i][j] = inside ? job.x.at<X>(place.n, 0, h * job.width + w)
                            : reinterpret_cast<const X*>(job.zeros.get());
      }
    }
    P* to = reinterpret_cast<P*>(job.v.get()) + item * step;
    for (int64_t c = 0; c < job.channels; c += vector_size) {
      Vector half[side][side];
      for (int j = 0; j < side; ++j) {
        Vector x[side], t[side];
        for (int i = 0; i < side; ++i) load_part(from[i][j] + c, job.channels - c, x[i]);
        input_transform(x, t);
        for (int i = 0; i < side; ++i) half[i][j] = t[i];
      }
      for (int i = 0; i < side; ++i) {
        Vector t[side];
        input_transform(half[i], t);
        for (int j = 0; j < side; ++j)
          store(to + (i * side + j) * job.block * step + c, t[j]);
      }
    }
  }
}

template <class X, int tile>
HD void transform_products(const Job& job, int64_t begin, int64_t end) {
  constexpr int side = tile + 2;
  const float floor = job.relu ? 0.f : -std::numeric_limits<float>::infinity();
  for (int64_t item = begin; item < end; ++item) {
    const Place place(job, job.first + item);
    const float* from = job.m.get() + item * job.m_step;
    const int64_t rows = std::min<int64_t>(tile, job.out_height - place.row);
    const int64_t columns = std::min<int64_t>(tile, job.out_width - place.column);
    for (int64_t c = 0; c < job.out_channels; c += vector_size) {
      Vector half[tile][side], bias;
      load_part(job.bias + c, job.out_channels - c, bias);
      for (int j = 0; j < side; ++j) {
        Vector m[side], y[tile];
        for (int i = 0; i < side; ++i)
          load(from + (i * side + j) * job.block * job.m_step + c, m[i]);
        output_transform(m, y);
        for (int i = 0; i < tile; ++i) half[i][j] = y[i];
      }
      for (int i = 0; i < rows; ++i) {
        Vector y[tile];
        output_transform(half[i], y);
        X* to = job.y.at<X>(place.n, 0, (place.row + i) * job.out_width + place.column) + c;
        for (int j = 0; j < columns; ++j) {
          y[j] += bias;
          raise(y[j], floor);
          store_part(to + j * job.y.p, job.out_channels - c, y[j]);
        }
      }
    }
  }
}

#define PREFETCH(x) __builtin_prefetch(x, 0, 2)
#define PREFETCH_W(x) __builtin_prefetch(x, 1, 3)
// ---- products: rows of tiles times panels of channels ----

struct MultiplyFloat {
  HD static void add(Vector& sum, const Vector& a, const Vector& b) { sum += a * b; }
};

// A row's words times a panel's: sums stay in registers from the first channel to the last.
template <class Multiply, int rows, int vectors>
HD void multiply_block(const uint32_t* a, int64_t a_step, const float* b, int64_t words, float* m,
                       int64_t m_step, const float* soon) {
  Vector sum[rows][vectors] = {};
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) PREFETCH_W(m + i * m_step + j * vector_size);
  for (int64_t k = 0; k < words; ++k) {
    PREFETCH(soon + k * vector_size);
    Vector w[vectors];
    for (int j = 0; j < vectors; ++j) load(b + k * panel + j * vector_size, w[j]);
    for (int i = 0; i < rows; ++i) {
      const Words word = Words{} + a[i * a_step + k];
      Vector x;
      memcpy(&x, &word, sizeof x);
      for (int j = 0; j < vectors; ++j) Multiply::add(sum[i][j], x, w[j]);
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) store(m + i * m_step + j * vector_size, sum[i][j]);
}

// An item is a panel at a point.
template <class Multiply, int rows, int vectors>
HD void multiply(const Job& job, int64_t begin, int64_t end) {
  const int64_t size = job.size();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t point = item / job.panels(), channel = item % job.panels() * panel;
    const float* b = static_cast<const float*>(job.weight) + item * job.words * panel;
    const uint32_t* a = job.v.get() + point * job.block * job.v_step;
    float* m = job.m.get() + point * job.block * job.m_step + channel;
    for (int64_t c = 0; c < panel; c += vectors * vector_size) {
      int64_t i = 0;
      for (; i + rows <= size; i += rows)
        multiply_block<Multiply, rows, vectors>(a + i * job.v_step, job.v_step, b + c, job.words,
                                                m + i * job.m_step + c, job.m_step, b + c + job.words * (panel + i / rows % 2 * vector_size));
      for (; i < size; ++i)
        multiply_block<Multiply, 1, vectors>(a + i * job.v_step, job.v_step, b + c, job.words,
                                             m + i * job.m_step + c, job.m_step, b);
    }
  }
}

// Sixteen 512-bit sums hide the latency of their additions; half as many fit where there are
// sixteen 256-bit registers.
MSFLOW_CLONES void multiply_wide(int64_t begin, int64_t end, void* context) {
  multiply<MultiplyFloat, 8, 2>(*static_cast<const Job*>(context), begin, end);
}
MSFLOW_CLONES void multiply_narrow(int64_t begin, int64_t end, void* context) {
  multiply<MultiplyFloat, 6, 1>(*static_cast<const Job*>(context), begin, end);
}

#if defined(__GNUC__) && defined(__x86_64__)
struct MultiplyPairs {
  // Not the intrinsic, which no template without the target's attribute may hold.
  HD static void add(Vector& sum, const Vector& a, const Vector& b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
};
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))) void multiply_pairs(
    int64_t begin, int64_t end, void* context) {
  multiply<MultiplyPairs, 8, 2>(*static_cast<const Job*>(context), begin, end);
}
#endif

#define BODIES(X, P, tile)                                                                       \
  MSFLOW_CLONES void input_##X##_##P##_##tile(int64_t begin, int64_t end, void* context) {       \
    transform_tiles<X, P, tile>(*static_cast<const Job*>(context), begin, end);                  \
  }
#define RESULTS(X, tile)                                                                \
  MSFLOW_CLONES void output_##X##_##tile(int64_t begin, int64_t end, void* context) {   \
    transform_products<X, tile>(*static_cast<const Job*>(context), begin, end);         \
  }
BODIES(float, float, 2)
BODIES(float, float, 4)
BODIES(bfloat16, float, 2)
BODIES(bfloat16, float, 4)
BODIES(bfloat16, bfloat16, 2)
BODIES(bfloat16, bfloat16, 4)
RESULTS(float, 2)
RESULTS(float, 4)
RESULTS(bfloat16, 2)
RESULTS(bfloat16, 4)

bool wide_registers() {
#if defined(__GNUC__) && defined(__x86_64__)
  return __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

}  // namespace

bool winograd_has_bfloat16() {
#if defined(__GNUC__) && defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

void winograd_cpu(const Winograd& winograd, Tensor x, Tensor y) {
  Job job(winograd);
  job.x = x, job.y = y;
  const bool large = job.tile == 4, half = x.dtype == DType::bfloat16;
  Body input = large ? input_float_float_4 : input_float_float_2;
  if (half) input = large ? input_bfloat16_float_4 : input_bfloat16_float_2;
  Body output = large ? output_float_4 : output_float_2;
  if (half) output = large ? output_bfloat16_4 : output_bfloat16_2;
  Body products = wide_registers() ? multiply_wide : multiply_narrow;
  if (job.product == DType::bfloat16) {
    input = large ? input_bfloat16_bfloat16_4 : input_bfloat16_bfloat16_2;
    products = multiply_pairs;
  }
  for (; job.first < job.tiles; job.first += job.block) {
    const int64_t work = job.size() * job.words * panel;
    parallel_for(job.size(), job.points * job.channels, input, job);
    parallel_for(job.points * job.panels(), work, products, job);
    parallel_for(job.size(), job.points * job.out_channels, output, job);
  }
}

}  // namespace msflow
