// Tiles of maps, and their transform to the interpolation points: what Winograd's convolution and
// the gradient of its weight share.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/tensor.h"
#include "winograd/formula.h"
#include "winograd/vector.h"

namespace msflow {

constexpr int64_t panel = 32;  // channels that the products handle side by side
constexpr int64_t line = 16;   // words

// Channels: the transforms wait for memory (64x64 192 -> 256, tiles of 4: 1.9 -> 1.1 ms).
constexpr int64_t ahead = 2 * line;

HD int64_t round_up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// How the maps of results are cut: tiles of an image, and the first of those at work.
struct Grid {
  int64_t tile, down, across, first = 0;

  Grid(int64_t tile, int64_t height, int64_t width)
      : tile(tile), down((height + tile - 1) / tile), across((width + tile - 1) / tile) {}

  HD int64_t per_image() const { return down * across; }
};

// Where a tile begins in its image's results.
struct Place {
  int64_t n, row, column;

  HD Place(const Grid& grid, int64_t tile)
      : n(tile / grid.per_image()),
        row(tile / grid.across % grid.down * grid.tile),
        column(tile % grid.across * grid.tile) {}
};

// Interleaved maps whose tiles begin so far above and left of the results'.
struct Map {
  Tensor tensor;
  int64_t channels, height, width, top, left;
  const uint32_t* zeros;  // as many as channels
};

// Where values at the points go: steps from a point, a panel of channels and a tile to the next.
struct Values {
  void* data;
  int64_t point, panel, tile;

  HD int64_t at(int64_t item, int64_t channel) const {
    return channel / msflow::panel * panel + item * tile + channel % msflow::panel;
  }
};

template <class V, class T>
HD void load_part(const T* from, int64_t size, V& v) {
  if (size >= size_of<V>) return load(from, v);
  T part[size_of<V>] = {};
  memcpy(part, from, size * sizeof(T));
  load(part, v);
}

template <class V, class T>
HD void store_part(T* to, int64_t size, const V& v) {
  if (size >= size_of<V>) return store(to, v);
  T part[size_of<V>];
  store(part, v);
  memcpy(to, part, size * sizeof(T));
}

// `taken` x `taken` numbers of a map give side x side values; F: their type.
template <class V, class X, class F, int taken, int side>
HD void transform_tiles(const Grid& grid, const Map& map, const Values& values, int64_t begin,
                        int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const Place place(grid, grid.first + item);
    const X* from[taken][taken];
    for (int i = 0; i < taken; ++i) {
      for (int j = 0; j < taken; ++j) {
        const int64_t h = place.row + i - map.top, w = place.column + j - map.left;
        const bool inside = h >= 0 && h < map.height && w >= 0 && w < map.width;
        from[i][j] = inside ? map.tensor.at<X>(place.n, 0, h * map.width + w)
                            : reinterpret_cast<const X*>(map.zeros);
      }
    }
    for (int64_t c = 0; c < map.channels; c += size_of<V>) {
      F* to = static_cast<F*>(values.data) + values.at(item, c);
      V half[side][taken];
      for (int j = 0; j < taken; ++j) {
        V x[taken], t[side];
        for (int i = 0; i < taken; ++i) {
          PREFETCH(from[i][j] + c + ahead, 0, 3);
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
