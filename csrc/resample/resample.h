// Entry points of the fusion flow's resampling; msflow_ext/ops/resample.py says what they compute.
#pragma once

#include "common/tensor.h"

namespace msflow {

// One scale: maps of `height` x `width` on its own side, of `low_height` x `low_width` on the
// coarsest scale's.
struct Resample {
  int64_t samples, channels, height, width, low_height, low_width;
  bool interleaved;
};

void pool_forward_cpu(const Resample&, Tensor x, Tensor low);
void pool_backward_cpu(const Resample&, Tensor grad_low, Tensor grad_x);
// y = x + upsampled low; x may be float32 beside half precision
void upsample_forward_cpu(const Resample&, Tensor x, Tensor low, Tensor y);
void upsample_backward_cpu(const Resample&, Tensor grad_y, Tensor grad_low);

// The same on CUDA's current device and this stream.
void pool_forward_cuda(const Resample&, Tensor x, Tensor low, void* scratch, void* stream);
void pool_backward_cuda(const Resample&, Tensor grad_low, Tensor grad_x, void* scratch,
                        void* stream);
void upsample_forward_cuda(const Resample&, Tensor x, Tensor low, Tensor y, void* scratch,
                           void* stream);
void upsample_backward_cuda(const Resample&, Tensor grad_y, Tensor grad_low, void* scratch,
                            void* stream);

}  // namespace msflow
