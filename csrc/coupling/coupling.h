// Entry points of the coupling; msflow_ext/ops/coupling.py says what they compute.
#pragma once

#include "common/tensor.h"
#include "coupling/formula.h"

namespace msflow {

// Everything a coupling call needs. scale and offset hold wide elements, perm int64; each may be
// null.
struct Coupling {
  int64_t samples, passive, active, positions;
  int64_t split;  // channels of the first result
  bool interleaved;
  ClampForm form;
  double clamp, limit;
  const void* scale;
  const void* offset;
  const int64_t* perm;

  HD int64_t channels() const { return passive + active; }
};

// Of no address is what is not wanted: log_det, and `copy`, y1 once more in the subnet's type,
// which is another. The gradient of a copy adds to that of y1.
void coupling_forward_cpu(const Coupling&, Tensor x1, Tensor x2, Tensor a, Tensor y1, Tensor y2,
                          Tensor copy, void* log_det);
void coupling_inverse_cpu(const Coupling&, Tensor y1, Tensor y2, Tensor a, Tensor x2,
                          void* log_det);
void coupling_backward_cpu(const Coupling&, Tensor grad_y1, Tensor grad_y2, Tensor grad_copy,
                           const void* grad_log_det, Tensor x1, Tensor x2, Tensor a, Tensor grad_x1,
                           Tensor grad_x2, Tensor grad_a, void* grad_scale, void* grad_offset);

// Instead of the results, -1/2 of the mean over their channels of their squares: (N, P), wide.
void coupling_likelihood_cpu(const Coupling&, Tensor x1, Tensor x2, Tensor a, void* likelihoods);

// The same on CUDA's current device and this stream; `scratch` is memory of as many bytes as
// *_scratch says.
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
