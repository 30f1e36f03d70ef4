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
  const void* weight;  // (points, panels, 32-bit words of input channels, 32 output channels)
  const float* bias;   // (out_channels)
};

// Options of the transform of a 3x3 kernel to the interpolation points.
struct WinogradWeight {
  int64_t out_channels, channels, points;
  const float* kernel;        // the nine numbers of a kernel are contiguous
  int64_t out_step, in_step;  // strides of output and input channels
  bool rotated;               // by 180 degrees, for the gradient of the input
  DType factors;
  const float *transform, *correction;  // (points, 9); (points, points), or null
  void* values;                         // (points, panels, words, 32, channels in a word)
};

void winograd_weight_cpu(const WinogradWeight&);

// Options of the gradient of a convolution's weight, in tiles of 4 x 4 results.
struct WinogradGradient {
  int64_t samples, channels, height, width, out_channels, out_height, out_width;
  int64_t pad_top, pad_left;
  const float* transform;  // (36, 9), as in WinogradWeight
  float* kernel;           // (out_channels, channels, 9)
};

void winograd_gradient_cpu(const WinogradGradient&, Tensor x, Tensor grad);

// Returns the dtypes of factors that are fast on this processor.
std::vector<DType> winograd_factors_cpu();

void winograd_cpu(const Winograd&, Tensor x, Tensor y);

}  // namespace msflow
