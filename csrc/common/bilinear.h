// Where bilinear resampling reads for one output coordinate.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace msflow {

// Output coordinate i reads the input at step * i + shift.
struct Resampling {
  double step, shift;
};

// As in torch: with align_corners the centres of the outermost pixels coincide, otherwise their
// outer edges.
HD Resampling resampling(int64_t input_size, int64_t output_size, bool align_corners) {
  const double step = double(input_size) / double(output_size);
  if (!align_corners) return {step, (step - 1) / 2};
  return {output_size > 1 ? double(input_size - 1) / double(output_size - 1) : 0., 0.};
}

template <class W>
struct Tap {
  int64_t low, high;  // input coordinates
  W weight;           // of the higher one
};

template <class W>
HD Tap<W> tap(const Resampling& resampling, int64_t output, int64_t input_size) {
  double where = resampling.step * double(output) + resampling.shift;
  where = where > 0 ? where : 0;
  int64_t low = int64_t(where);
  if (low > input_size - 1) low = input_size - 1;
  // If the size does not change, torch reads one pixel, so that NaN does not spread to neighbours.
  const bool one_pixel = low + 1 >= input_size || resampling.step == 1;
  return {low, one_pixel ? low : low + 1, W(where - double(low))};
}

// Written as in torch, so that infinite and very large values give the same result.
template <class W>
HD W interpolate(W low, W high, W weight) {
  return (1 - weight) * low + weight * high;
}

}  // namespace msflow
