// The affine coupling of one element: log-scale s, value, inverse and derivatives.
#pragma once

#include "common/elementary.h"
#include "common/host_device.h"

namespace msflow {

// Constants of the soft clamp: s = amplitude * f(rate * a_s), f = tanh or atan; t = shift * a_t.
template <class W>
struct Clamp {
  W amplitude, rate, shift;
};

enum class ClampForm : int { freia02 = 0, freia_head = 1, atan = 2 };

template <class W>
inline Clamp<W> make_clamp(ClampForm form, double alpha) {
  switch (form) {
    case ClampForm::freia02:
      return {W(alpha), W(0.1), W(0.1)};
    case ClampForm::freia_head:
      return {W(alpha), W(0.1 / alpha), W(0.1)};
    default:
      return {W(0.636 * alpha), W(1 / alpha), W(1)};
  }
}

template <bool Atan, class W>
HD W log_scale(const Clamp<W>& k, W a_s) {
  return k.amplitude * (Atan ? atan_(k.rate * a_s) : tanh_(k.rate * a_s));
}

// Returns s, and its derivative with respect to a_s in `slope`.
template <bool Atan, class W>
HD W log_scale(const Clamp<W>& k, W a_s, W& slope) {
  const W z = k.rate * a_s;
  const W f = Atan ? atan_(z) : tanh_(z);
  slope = k.amplitude * k.rate * (Atan ? 1 / (1 + z * z) : 1 - f * f);
  return k.amplitude * f;
}

template <class W>
HD W clamped(W v, W limit) {
  v = v > limit ? limit : v;
  return v < -limit ? -limit : v;
}

// The global affine map, clamped to [-limit, limit].
template <class W>
HD W affine(W u, W scale, W offset, W limit) {
  return clamped(u * scale + offset, limit);
}

// Gradient of the clamp in affine(), with respect to v = u * scale + offset. It compares once,
// because g++ 12 does not vectorise two comparisons joined by "or".
template <class W>
HD W limit_gradient(W gradient, W u, W scale, W offset, W limit) {
  const W v = u * scale + offset;
  return clamped(v, limit) == v ? gradient : W(0);
}

// A value of the transformed half before the global affine map. t = shift * a_t.
template <class W>
HD W couple(W x, W s, W t) {
  return x * exp_(s) + t;
}

// The inverse of couple() and the global affine map.
template <class W>
HD W uncouple(W y, W s, W t, W scale, W offset) {
  return ((y - offset) / scale - t) * exp_(-s);
}

// Gradients of one element with respect to x, a_s and a_t, and its terms in the gradients of scale
// and offset.
template <class W>
struct Gradients {
  W x, a_s, a_t, scale, offset;
};

template <class W>
HD Gradients<W> conditioning_gradients(W grad_y, W x, W scale, W offset, W limit) {
  const W g = limit_gradient(grad_y, x, scale, offset, limit);
  return {g * scale, 0, 0, g * x, g};
}

// grad_s is the gradient of the sample's log_det, the sum of all s. slope is the derivative of s
// with respect to a_s.
template <class W>
HD Gradients<W> transformed_gradients(const Clamp<W>& k, W grad_y, W grad_s, W x, W s, W slope,
                                      W a_t, W scale, W offset, W limit) {
  const W e = exp_(s);
  const W scaled = x * e;
  const W u = scaled + k.shift * a_t;
  const W gv = limit_gradient(grad_y, u, scale, offset, limit);
  const W g = gv * scale;
  return {g * e, (g * scaled + grad_s) * slope, g * k.shift, gv * u, gv};
}

}  // namespace msflow
