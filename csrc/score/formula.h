// Where bilinear upsampling (align_corners=True) reads for one output coordinate.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace msflow {

template <class W>
struct Tap {
  int64_t low, high;  // input coordinates
  W weight;           // of the higher one
};

template <class W>
HD Tap<W> aligned_tap(int64_t output, int64_t output_size, int64_t input_size) {
  const W step = output_size > 1 ? W(input_size - 1) / W(output_size - 1) : W(0);
  const W where = step * W(output);
  int64_t low = int64_t(where);
  if (low > input_size - 1) low = input_size - 1;
  return {low, low + 1 < input_size ? low + 1 : low, where - W(low)};
}

}  // namespace msflow
