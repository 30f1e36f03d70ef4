// LayerNorm, affine map and ReLU of one element, and their derivatives.
#pragma once

#include "common/host_device.h"

namespace msflow {

// floor is 0 with a ReLU and -infinity without. NaN stays NaN, as in torch.
template <class W>
HD W rectified(W y, W floor) {
  return y < floor ? floor : y;
}

// Gradient of the ReLU, with respect to its input normal * weight + bias.
template <class W>
HD W relu_gradient(W grad, W normal, W weight, W bias, W floor) {
  return normal * weight + bias > floor ? grad : W(0);
}

// Gradient of the normalisation. mean_g and mean_gn are the means over channels of g = grad *
// weight and of g * normal.
template <class W>
HD W norm_gradient(W g, W normal, W deviation_inverse, W mean_g, W mean_gn) {
  return deviation_inverse * (g - mean_g - normal * mean_gn);
}

}  // namespace msflow
