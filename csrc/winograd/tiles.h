// Tiles of maps, and their transform to the interpolation points, for Winograd's convolution and
// the gradient of its weight.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/tensor.h"
#include "winograd/formula.h"
#include "winograd/vector.h"

namespace msflow {

constexpr int64_t panel = 32;       // channels that the products handle together
constexpr int64_t cache_line = 16;  // 32-bit words

// Channels to prefetch ahead. Without it, the transforms wait for memory (64x64 192 -> 256, tiles
// of 4: 1.9 -> 1.1 ms).
constexpr int64_t prefetch_distance = 2 * cache_line;

HD int64_t round_up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// How the results are cut into tiles, and the first tile of the current block.
struct Grid {
  int64_t tile, tile_rows, tile_columns, first = 0;

  Grid(int64_t tile, int64_t height, int64_t width)
      : tile(tile),
        tile_rows((height + tile - 1) / tile),
        tile_columns((width + tile - 1) / tile) {}

  HD int64_t per_image() const { return tile_rows * tile_columns; }
};

// Where a tile starts in the results of its image.
struct Place {
  int64_t n, row, column;

  HD Place(const Grid& grid, int64_t tile)
      : n(tile / grid.per_image()),
        row(tile / grid.tile_columns % grid.tile_rows * grid.tile),
        column(tile % grid.tile_columns * grid.tile) {}
};

// A channels_last map. Its tiles start `top` rows above and `left` columns left of the results'.
struct Map {
  Tensor tensor;
  int64_t channels, height, width, top, left;
  const uint32_t* zeros;  // (channels,), read outside the map
};

// Where the values at the points are stored: the strides of points, panels of channels and tiles.
struct Values {
  void* data;
  int64_t point, panel, tile;

  HD int64_t at(int64_t item, int64_t channel) const {
    return channel / msflow::panel * panel + item * tile + channel % msflow::panel;
  }
};

template <class V, class T>
HD void load_part(const T* from, int64_t size, V& v) {
  if (size >= lanes_of<V>) return load(from, v);
  T part[lanes_of<V>] = {};
  memcpy(part, from, size * sizeof(T));
  load(part, v);
}

template <class V, class T>
HD void store_part(T* to, int64_t size, const V& v) {
  if (size >= lanes_of<V>) return store(to, v);
  T part[lanes_of<V>];
  store(part, v);
  memcpy(to, part, size * sizeof(T));
}

// Transforms input_side x input_side numbers of a map to side x side values of type F.
template <class V, class X, class F, int input_side, int side>
HD void transform_tiles(const Grid& grid, const Map& map, const Values& values, int64_t begin,
                        int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const Place place(grid, grid.first + item);
    const X* from[input_side][input_side];
    for (int i = 0; i < input_side; ++i) {
      for (int j = 0; j < input_side; ++j) {
        const int64_t h = place.row + i - map.top, w = place.column + j - map.left;
        const bool inside = h >= 0 && h < map.height && w >= 0 && w < map.width;
        from[i][j] = inside ? map.tensor.at<X>(place.n, 0, h * map.width + w)
                            : reinterpret_cast<const X*>(map.zeros);
      }
    }
    for (int64_t c = 0; c < map.channels; c += lanes_of<V>) {
      F* to = static_cast<F*>(values.data) + values.at(item, c);
      V half[side][input_side];
      for (int j = 0; j < input_side; ++j) {
        V x[input_side], t[side];
        for (int i = 0; i < input_side; ++i) {
          PREFETCH(from[i][j] + c + prefetch_distance, 0, 3);
          load_part(from[i][j] + c, map.channels - c, x[i]);
        }
        to_points(x, t);
        for (int i = 0; i < side; ++i) half[i][j] = t[i];
      }
      for (int i = 0; i < side; ++i) {
        V t[side];
        to_points(half[i], t);
        for (int j = 0; j < side; ++j) store(to + (i * side + j) * values.point, t[j]);
      }
    }
  }
}

}  // namespace msflow
