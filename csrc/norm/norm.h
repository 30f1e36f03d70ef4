// Entry points of the channel norm; msflow_ext/ops/norm.py says what they compute.
#pragma once

#include "common/tensor.h"

namespace msflow {

struct Norm {
  int64_t samples, channels, positions;
  bool channels_last, relu;
  double eps;
  const void* weight;  // (C,), in the accumulation dtype, as bias
  const void* bias;
};

// bias_map (1, C, P) and statistics (N, P, 2: mean, 1 / deviation) are in the accumulation dtype,
// and may be null.
void norm_forward_cpu(const Norm&, Tensor x, Tensor bias_map, Tensor y, void* statistics);
void norm_backward_cpu(const Norm&, Tensor grad_y, Tensor x, Tensor bias_map,
                       const void* statistics, Tensor grad_x, Tensor grad_map, void* grad_weight,
                       void* grad_bias);

// The same on CUDA's current device and this stream. The backward's `scratch` must have as many
// bytes as norm_scratch returns.
int64_t norm_scratch(const Norm&, DType x, bool with_map);
void norm_forward_cuda(const Norm&, Tensor x, Tensor bias_map, Tensor y, void* statistics,
                       void* scratch, void* stream);
void norm_backward_cuda(const Norm&, Tensor grad_y, Tensor x, Tensor bias_map,
                        const void* statistics, Tensor grad_x, Tensor grad_map, void* grad_weight,
                        void* grad_bias, void* scratch, void* stream);

}  // namespace msflow
