// For pooling and upsampling along one axis: the inputs of an output, and the outputs of an input.
#pragma once

#include "common/bilinear.h"

namespace msflow {

struct Range {
  int64_t begin, end;

  HD int64_t size() const { return end - begin; }
};

// Returns the inputs that output i of an adaptive average pool covers along one axis. With the
// sizes exchanged, returns the outputs whose windows contain input i.
HD Range window(int64_t i, int64_t input_size, int64_t output_size) {
  return {i * input_size / output_size, ((i + 1) * input_size + output_size - 1) / output_size};
}

// Returns the weight of input i in what a tap reads.
template <class W>
HD W tap_weight(const Tap<W>& t, int64_t i) {
  return (t.low == i ? 1 - t.weight : W(0)) + (t.high == i ? t.weight : W(0));
}

// Returns the outputs of an upsampling (align_corners) that read input i along one axis.
template <class W>
HD Range readers(const Resampling& grid, int64_t i, int64_t input_size, int64_t output_size) {
  if (input_size == 1) return {0, output_size};
  const int64_t steps = output_size - 1, per = input_size - 1;
  Range range = {i > 0 ? (i - 1) * steps / per : 0, (i + 1) * steps / per + 2};
  if (range.end > output_size) range.end = output_size;
  const auto reads = [&](int64_t output) {
    return tap_weight(tap<W>(grid, output, input_size), i) != 0;
  };
  while (range.size() > 0 && !reads(range.begin)) ++range.begin;
  while (range.size() > 0 && !reads(range.end - 1)) --range.end;
  return range;
}

}  // namespace msflow
