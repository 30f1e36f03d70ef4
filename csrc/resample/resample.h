// Entry points of the fusion flow's resampling; msflow_ext/ops/resample.py says what they compute.
#pragma once

#include "common/tensor.h"

namespace msflow {

// One scale of the fusion flow: its maps are `height` x `width`, those of the coarsest scale
// `low_height` x `low_width`.
struct Resample {
  int64_t samples, channels, height, width, low_height, low_width;
  bool channels_last;
};

void pool_forward_cpu(const Resample&, Tensor x, Tensor low);
void pool_backward_cpu(const Resample&, Tensor grad_low, Tensor grad_x);
// y = x + upsampled low. x may be float32 if y has half precision.
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
