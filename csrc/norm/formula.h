// LayerNorm, affine map and ReLU of one element, and their derivative.
#pragma once

#include "common/host_device.h"

namespace msflow {

// floor is 0 for a ReLU and -infinity for none; NaN stays NaN, as in torch.
template <class W>
HD W rectified(W y, W floor) {
  return y < floor ? floor : y;
}

// The gradient that reaches y = normal * weight + bias from behind the ReLU.
template <class W>
HD W through_relu(W grad, W normal, W weight, W bias, W floor) {
  return normal * weight + bias > floor ? grad : W(0);
}

// mean_g and mean_gn are the means over channels of g = grad * weight and of g * normal.
template <class W>
HD W norm_gradient(W g, W normal, W deviation_inverse, W mean_g, W mean_gn) {
  return deviation_inverse * (g - mean_g - normal * mean_gn);
}

}  // namespace msflow
