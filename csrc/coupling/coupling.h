// Entry points of the coupling; msflow_ext/ops/coupling.py says what they compute.
#pragma once

#include "common/tensor.h"
#include "coupling/formula.h"

namespace msflow {

// Options of a coupling call. scale and offset are in the accumulation dtype. They and perm may be
// null pointers.
struct Coupling {
  int64_t samples;
  int64_t conditioning, transformed;  // channels of the conditioning half x1 and the transformed x2
  int64_t positions;
  int64_t split;  // channels of the first result
  bool channels_last;
  ClampForm form;
  double clamp, limit;
  const void* scale;
  const void* offset;
  const int64_t* perm;

  HD int64_t channels() const { return conditioning + transformed; }
};

// A null log_det or copy skips that output. `copy` is y1 in the dtype of the subnet, if that
// differs from the dtype of y1. The gradient of the copy is added to the gradient of y1.
void coupling_forward_cpu(const Coupling&, Tensor x1, Tensor x2, Tensor a, Tensor y1, Tensor y2,
                          Tensor copy, void* log_det);
void coupling_inverse_cpu(const Coupling&, Tensor y1, Tensor y2, Tensor a, Tensor x2,
                          void* log_det);
void coupling_backward_cpu(const Coupling&, Tensor grad_y1, Tensor grad_y2, Tensor grad_copy,
                           const void* grad_log_det, Tensor x1, Tensor x2, Tensor a, Tensor grad_x1,
                           Tensor grad_x2, Tensor grad_a, void* grad_scale, void* grad_offset);

// Writes -1/2 of the mean over channels of the squared results, instead of the results: (N, P), in
// the accumulation dtype.
void coupling_likelihood_cpu(const Coupling&, Tensor x1, Tensor x2, Tensor a, void* likelihoods);

// The same on CUDA's current device and this stream. `scratch` must have as many bytes as
// coupling_scratch returns.
int64_t coupling_scratch(const Coupling&, DType x, DType a, bool backward);
void coupling_forward_cuda(const Coupling&, Tensor x1, Tensor x2, Tensor a, Tensor y1, Tensor y2,
                           Tensor copy, void* log_det, void* scratch, void* stream);
void coupling_inverse_cuda(const Coupling&, Tensor y1, Tensor y2, Tensor a, Tensor x2,
                           void* log_det, void* scratch, void* stream);
void coupling_backward_cuda(const Coupling&, Tensor grad_y1, Tensor grad_y2, Tensor grad_copy,
                            const void* grad_log_det, Tensor x1, Tensor x2, Tensor a,
                            Tensor grad_x1, Tensor grad_x2, Tensor grad_a, void* grad_scale,
                            void* grad_offset, void* scratch, void* stream);
void coupling_likelihood_cuda(const Coupling&, Tensor x1, Tensor x2, Tensor a, void* likelihoods,
                              void* scratch, void* stream);

}  // namespace msflow
