// The affine coupling of one element: log-scale, value, inverse and derivatives.
#pragma once

#include "common/elementary.h"
#include "common/host_device.h"

namespace msflow {

// s = amplitude * f(rate * a_s) with f = tanh or atan; t = shift * a_t.
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

// s, and its derivative by a_s.
template <bool Atan, class W>
HD W log_scale(const Clamp<W>& k, W a_s, W& slope) {
  const W z = k.rate * a_s;
  const W f = Atan ? atan_(z) : tanh_(z);
  slope = k.amplitude * k.rate * (Atan ? 1 / (1 + z * z) : 1 - f * f);
  return k.amplitude * f;
}

template <class W>
HD W limited(W v, W limit) {
  v = v > limit ? limit : v;
  return v < -limit ? -limit : v;
}

// The global affine, cut off at +-limit.
template <class W>
HD W affine(W u, W scale, W offset, W limit) {
  return limited(u * scale + offset, limit);
}

// What of a gradient gets through affine()'s cut, to v = u * scale + offset. One comparison: two
// with an "or" between them keep g++ 12 from vectorising.
template <class W>
HD W through_limit(W gradient, W u, W scale, W offset, W limit) {
  const W v = u * scale + offset;
  return limited(v, limit) == v ? gradient : W(0);
}

// The active half's value before the global affine, and its inverse; t = shift * a_t.
template <class W>
HD W coupled(W x, W s, W t) {
  return x * exp_(s) + t;
}

template <class W>
HD W uncoupled(W y, W s, W t, W scale, W offset) {
  return ((y - offset) / scale - t) * exp_(-s);
}

// What the gradient of a result becomes: those of x, a_s and a_t, and the terms of the gradients of
// scale and offset.
template <class W>
struct Gradients {
  W x, a_s, a_t, scale, offset;
};

template <class W>
HD Gradients<W> passive_gradients(W grad_y, W x, W scale, W offset, W limit) {
  const W g = through_limit(grad_y, x, scale, offset, limit);
  return {g * scale, 0, 0, g * x, g};
}

// grad_s is the gradient of the sample's log_det, which every s is a term of; slope is that of s by
// a_s.
template <class W>
HD Gradients<W> active_gradients(const Clamp<W>& k, W grad_y, W grad_s, W x, W s, W slope, W a_t,
                                 W scale, W offset, W limit) {
  const W e = exp_(s);
  const W scaled = x * e;
  const W u = scaled + k.shift * a_t;
  const W gv = through_limit(grad_y, u, scale, offset, limit);
  const W g = gv * scale;
  return {g * e, (g * scaled + grad_s) * slope, g * k.shift, gv * u, gv};
}

}  // namespace msflow
