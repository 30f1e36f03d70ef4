// Bilinear upsampling of a map, row by row.
#pragma once

#include <vector>

#include "common/bilinear.h"
#include "common/host_device.h"

namespace msflow {

// The taps of every output coordinate of one axis.
template <class W>
struct Axis {
  std::vector<int32_t> low, high;
  std::vector<W> weight;

  Axis(int64_t input_size, int64_t output_size, bool align_corners) {
    const auto grid = resampling(input_size, output_size, align_corners);
    for (int64_t i = 0; i < output_size; ++i) {
      const auto t = tap<W>(grid, i, input_size);
      low.push_back(int32_t(t.low));
      high.push_back(int32_t(t.high));
      weight.push_back(t.weight);
    }
  }
};

// How maps of one size become maps of another.
template <class W>
struct Upsampling {
  int64_t height, width;  // of the input
  Axis<W> rows, columns;

  Upsampling(int64_t height, int64_t width, int64_t to_height, int64_t to_width, bool align_corners)
      : height(height),
        width(width),
        rows(height, to_height, align_corners),
        columns(width, to_width, align_corners) {}

  int64_t size() const { return height * width; }
};

// to[x] (+)= row y of the upsampled map; scratch holds a row of the map.
template <class W>
HD void add_row(const W* map, const Upsampling<W>& up, int64_t y, W* scratch, W* to,
                int64_t to_width, bool first) {
  const W* upper = map + up.rows.low[y] * up.width;
  const W* lower = map + up.rows.high[y] * up.width;
  const W share = up.rows.weight[y];
  for (int64_t x = 0; x < up.width; ++x) scratch[x] = between(upper[x], lower[x], share);
  const int32_t* low = up.columns.low.data();
  const int32_t* high = up.columns.high.data();
  const W* weight = up.columns.weight.data();
  if (first) {
    INDEPENDENT
    for (int64_t x = 0; x < to_width; ++x)
      to[x] = between(scratch[low[x]], scratch[high[x]], weight[x]);
  } else {
    INDEPENDENT
    for (int64_t x = 0; x < to_width; ++x)
      to[x] += between(scratch[low[x]], scratch[high[x]], weight[x]);
  }
}

}  // namespace msflow
