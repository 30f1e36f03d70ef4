// Entry points of Winograd's convolution; msflow_ext/ops/winograd.py says what they compute.
#pragma once

#include <vector>

#include "common/tensor.h"

namespace msflow {

// A convolution in tiles of `tile` x `tile` results, each from (tile + 2) x (tile + 2) points.
struct Winograd {
  int64_t samples, channels, height, width, out_channels, out_height, out_width;
  int64_t tile, pad_top, pad_left;
  bool relu;
  DType factors;
  const void* weight;  // (points, panels of 32 channels, 32-bit words of channels in, 32)
  const float* bias;   // (out_channels)
};

// A 3x3 kernel at the interpolation points.
struct WinogradWeight {
  int64_t out_channels, channels, points;
  const float* kernel;        // nine numbers side by side
  int64_t out_step, in_step;  // from a channel of the result, and of the input, to the next
  bool turned;                // by 180 degrees
  DType factors;
  const float *transform, *correction;  // (points, 9); (points, points), or null
  void* values;                         // (points, panels, words, 32, channels in a word)
};

void winograd_weight_cpu(const WinogradWeight&);

// What a convolution's weight gets of the gradient of its results, in tiles of 4 x 4 of them.
struct WinogradGradient {
  int64_t samples, channels, height, width, out_channels, out_height, out_width;
  int64_t pad_top, pad_left;
  const float* transform;  // (36, 9), as a WinogradWeight's
  float* kernel;           // (out_channels, channels, 9)
};

void winograd_gradient_cpu(const WinogradGradient&, Tensor x, Tensor grad);

// Factors for which this processor has the registers and instructions that make them fast.
std::vector<DType> winograd_factors_cpu();

void winograd_cpu(const Winograd&, Tensor x, Tensor y);

}  // namespace msflow
