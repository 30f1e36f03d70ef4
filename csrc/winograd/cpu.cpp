// Winograd's convolution on the CPU. For each block of tiles it transforms the input, multiplies
// matrices point by point, and transforms the products, all within the caches.
#include <limits>
#include <stdexcept>

#include "common/half.h"
#include "common/parallel.h"
#include "winograd/tiles.h"
#include "winograd/winograd.h"

namespace msflow {
namespace {

// A block has at most cache_bytes of intermediate results, but at least min_tiles tiles, because
// each block reads all weights from memory.
constexpr int64_t cache_bytes = 4 << 20, min_tiles = 64;

struct Job : Winograd {
  Tensor x, y;
  Grid grid;
  int64_t points, tiles, block;   // points of a tile; all tiles, and those of a block
  int64_t words, v_step, m_step;  // 32-bit words of a tile at a point; strides of tiles in v and m
  int64_t v_point, m_point;       // strides of points in v and m
  std::unique_ptr<uint32_t[]> buffer, zeros;
  uint32_t* v;  // (points, block, v_step) transformed input
  float* m;     // (points, block, m_step) products

  explicit Job(const Winograd& w) : Winograd(w), grid(tile, out_height, out_width) {
    points = (tile + 2) * (tile + 2);
    tiles = samples * grid.per_image();
    words = factors == DType::bfloat16 ? (channels + 1) / 2 : channels;
    // A stride of whole cache lines, but not a power of two: rows must not share cache sets.
    v_step = round_up(words, cache_line) + cache_line,
    m_step = round_up(out_channels, panel) + cache_line;
    const int64_t max_block = std::max(min_tiles, cache_bytes / (points * (v_step + m_step) * 4));
    const int64_t blocks = std::max<int64_t>(1, (tiles + max_block - 1) / max_block);
    block = round_up((tiles + blocks - 1) / blocks, 8);
    // Nor must the points of a tile share cache sets (64x64 128 -> 192, tiles of 3: 0.44 ->
    // 0.18 ms).
    v_point = block * v_step + cache_line, m_point = block * m_step + cache_line;
    buffer = scratch<uint32_t>(points * (v_point + m_point) + cache_line);
    v = reinterpret_cast<uint32_t*>(
        round_up(reinterpret_cast<intptr_t>(buffer.get()), 4 * cache_line));
    m = reinterpret_cast<float*>(v + points * v_point);
    zeros.reset(new uint32_t[channels]());
  }

  int64_t panels() const { return (out_channels + panel - 1) / panel; }
  int64_t size() const { return std::min(block, tiles - grid.first); }
};

template <class V, class X, class F, int tile>
HD void transform_input(const Job& job, int64_t begin, int64_t end) {
  constexpr int64_t per_word = 4 / int64_t(sizeof(F));
  const Map map{job.x,       job.channels, job.height,     job.width,
                job.pad_top, job.pad_left, job.zeros.get()};
  const Values values{job.v, job.v_point * per_word, panel, job.v_step * per_word};
  transform_tiles<V, X, F, tile + 2, tile + 2>(job.grid, map, values, begin, end);
}

template <class V, class X, int tile>
HD void transform_products(const Job& job, int64_t begin, int64_t end) {
  constexpr int side = tile + 2;
  const float floor = job.relu ? 0.f : -std::numeric_limits<float>::infinity();
  for (int64_t item = begin; item < end; ++item) {
    const Place place(job.grid, job.grid.first + item);
    const float* from = job.m + item * job.m_step;
    const int64_t rows = std::min<int64_t>(tile, job.out_height - place.row);
    const int64_t columns = std::min<int64_t>(tile, job.out_width - place.column);
    for (int64_t c = 0; c < job.out_channels; c += lanes_of<V>) {
      V half[tile][side], bias;
      load_part(job.bias + c, job.out_channels - c, bias);
      for (int j = 0; j < side; ++j) {
        V m[side], y[tile];
        for (int i = 0; i < side; ++i) load(from + (i * side + j) * job.m_point + c, m[i]);
        output_transform(m, y);
        for (int i = 0; i < tile; ++i) half[i][j] = y[i];
      }
      for (int i = 0; i < rows; ++i) {
        V y[tile];
        output_transform(half[i], y);
        X* to = job.y.at<X>(place.n, 0, (place.row + i) * job.out_width + place.column) + c;
        for (int j = 0; j < columns; ++j) {
          PREFETCH(to + j * job.y.p + prefetch_distance, 1, 3);
          y[j] += bias;
          clamp_below(y[j], floor);
          store_part(to + j * job.y.p, job.out_channels - c, y[j]);
        }
      }
    }
  }
}

// ---- products: rows of tiles times panels of channels ----

struct MultiplyFloats {
  template <class V>
  HD static void add(V& sum, const V& a, const V& b) {
    sum += a * b;
  }
};

// Multiplies the words of `rows` tiles by those of a panel. Sums stay in registers over all
// channels. Meanwhile it prefetches `next`, half of the next panel (16x16 576 -> 1024, float32,
// from memory: 7.1 -> 5.5 ms).
template <class Multiply, class V, int rows, int vectors>
HD void multiply_block(const uint32_t* a, int64_t a_step, const float* b, const float* next,
                       int64_t words, float* m, int64_t m_step) {
  V sum[rows][vectors] = {};
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) PREFETCH(m + i * m_step + j * lanes_of<V>, 1, 3);
  for (int64_t k = 0; k < words; ++k) {
    PREFETCH(next + k * cache_line, 0, 2);
    V w[vectors], x;
    for (int j = 0; j < vectors; ++j) load(b + k * panel + j * lanes_of<V>, w[j]);
    for (int i = 0; i < rows; ++i) {
      broadcast(a[i * a_step + k], x);
      for (int j = 0; j < vectors; ++j) Multiply::add(sum[i][j], x, w[j]);
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) store(m + i * m_step + j * lanes_of<V>, sum[i][j]);
}

// An item is a panel at a point. The last rows may lie beyond the last tile; the buffers have room.
template <class Multiply, class V, int rows, int vectors>
HD void multiply(const Job& job, int64_t begin, int64_t end) {
  const int64_t size = job.words * panel;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t point = item / job.panels(), channel = item % job.panels() * panel;
    const float* b = static_cast<const float*>(job.weight) + item * size;
    for (int64_t c = 0; c < panel; c += vectors * lanes_of<V>) {
      for (int64_t i = 0; i < job.size(); i += rows) {
        const float* next = b + size + i / rows % 2 * (size / 2);
        multiply_block<Multiply, V, rows, vectors>(
            job.v + point * job.v_point + i * job.v_step, job.v_step, b + c, next, job.words,
            job.m + point * job.m_point + i * job.m_step + channel + c, job.m_step);
      }
    }
  }
}

#if defined(__GNUC__) && defined(__x86_64__) && !defined(__clang__)
struct MultiplyPairs {
  // Inline assembly, because a template without the target attribute cannot use the intrinsic.
  // clang refuses 512-bit operands there as well.
  HD static void add(Floats16& sum, const Floats16& a, const Floats16& b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
};
AVX512 void multiply_pairs(int64_t begin, int64_t end, void* context) {
  multiply<MultiplyPairs, Floats16, 8, 2>(*static_cast<const Job*>(context), begin, end);
}
bool has_pairs() { return has_avx512() && SUPPORTS("avx512bf16"); }
#else
constexpr Body multiply_pairs = nullptr;
bool has_pairs() { return false; }
#endif

// The number of sums hides the latency of their additions: sixteen 512-bit registers, or eight
// 256-bit ones, of which there are only sixteen.
AVX512 void multiply_avx512(int64_t begin, int64_t end, void* context) {
  multiply<MultiplyFloats, Floats16, 8, 2>(*static_cast<const Job*>(context), begin, end);
}
MSFLOW_CLONES void multiply_portable(int64_t begin, int64_t end, void* context) {
  multiply<MultiplyFloats, Floats8, 4, 2>(*static_cast<const Job*>(context), begin, end);
}

#define TRANSFORM(mark, V, name, function, ...)                              \
  mark void name##_##V(int64_t begin, int64_t end, void* context) {          \
    function<V, __VA_ARGS__>(*static_cast<const Job*>(context), begin, end); \
  }
#define INPUT(X, F, tile)                                                            \
  TRANSFORM(AVX512, Floats16, input_##X##_##F##_##tile, transform_input, X, F, tile) \
  TRANSFORM(MSFLOW_CLONES, Floats8, input_##X##_##F##_##tile, transform_input, X, F, tile)
#define OUTPUT(X, tile)                                                         \
  TRANSFORM(AVX512, Floats16, output_##X##_##tile, transform_products, X, tile) \
  TRANSFORM(MSFLOW_CLONES, Floats8, output_##X##_##tile, transform_products, X, tile)
#define TILES(each) each(2) each(3) each(4)
#define TRANSFORMS(tile)                                                                           \
  INPUT(float, float, tile)                                                                        \
  INPUT(bfloat16, float, tile)                                                                     \
  OUTPUT(float, tile)                                                                              \
  OUTPUT(bfloat16, tile)                                                                           \
  TRANSFORM(AVX512, Floats16, input_bfloat16_bfloat16_##tile, transform_input, bfloat16, bfloat16, \
            tile)
TILES(TRANSFORMS)

// One function per tile size.
#define BODY(name, V) {name##_2_##V, name##_3_##V, name##_4_##V}
struct Bodies {
  Body input[2][3], multiply, output[2][3];  // [float32 or bfloat16][tile size]
};
const Bodies avx512{{BODY(input_float_float, Floats16), BODY(input_bfloat16_float, Floats16)},
                    multiply_avx512,
                    {BODY(output_float, Floats16), BODY(output_bfloat16, Floats16)}};
const Bodies portable{{BODY(input_float_float, Floats8), BODY(input_bfloat16_float, Floats8)},
                      multiply_portable,
                      {BODY(output_float, Floats8), BODY(output_bfloat16, Floats8)}};
const Body input_pairs[] = BODY(input_bfloat16_bfloat16, Floats16);

}  // namespace

std::vector<DType> winograd_factors_cpu() {
  std::vector<DType> types;
  if (has_avx512() || (SUPPORTS("avx2") && SUPPORTS("fma"))) types.push_back(DType::float32);
  if (has_pairs()) types.push_back(DType::bfloat16);
  return types;
}

void winograd_cpu(const Winograd& winograd, Tensor x, Tensor y) {
  if (winograd.samples == 0) return;
  Job job(winograd);
  job.x = x, job.y = y;
  const bool half = x.dtype == DType::bfloat16, pairs = job.factors == DType::bfloat16;
  if (pairs && !has_pairs())
    throw std::invalid_argument("winograd: this processor does not multiply bfloat16");
  const Bodies& bodies = has_avx512() ? avx512 : portable;
  const int64_t size = job.tile - 2;
  const Body input = pairs ? input_pairs[size] : bodies.input[half][size];
  const Body multiply = pairs ? multiply_pairs : bodies.multiply;
  for (; job.grid.first < job.tiles; job.grid.first += job.block) {
    const int64_t work = job.size() * job.words * panel;
    parallel_for(job.size(), job.points * job.channels, input, job);
    parallel_for(job.points * job.panels(), work, multiply, job);
    parallel_for(job.size(), job.points * job.out_channels, bodies.output[half][size], job);
  }
}

}  // namespace msflow
