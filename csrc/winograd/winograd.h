// Entry points of Winograd's convolution; msflow_ext/ops/winograd.py says what they compute.
#pragma once

#include "common/tensor.h"

namespace msflow {

// Results of a tile, in one direction and in both numbers of points.
struct Winograd {
  int64_t samples, channels, height, width, out_channels, out_height, out_width;
  int64_t tile, pad_top, pad_left;
  bool relu;
  DType product;        // of the numbers that are multiplied
  const void* weight;   // (points, panels, words, panel, 4 / size of the numbers)
  const float* bias;    // (out_channels)
};

// Channels of the result whose weights lie side by side.
constexpr int64_t winograd_panel = 32;

// Whether this processor multiplies pairs of bfloat16.
bool winograd_has_bfloat16();

void winograd_cpu(const Winograd&, Tensor x, Tensor y);

}  // namespace msflow
