// Winograd's transforms of one row of a tile.
//
// clang-format off
//   transform   interpolation points               why
//   F(2, 3)     0, 1, -1, infinity                 the usual ones
//   F(3, 3)     a, -a, b, -b, infinity             a = 3/8, b = 5/4: error 2.6 roundings; the usual
//                                                  0, 1, -1, 2, infinity: 6; the best possible: 2.62
//   F(4, 3)     0, r, -r, 1/r, -1/r, infinity      r = sqrt(1/2): half the error of the usual
//                                                  0, 1, -1, 2, -2, infinity; exact even coefficients
// clang-format on
#pragma once

#include "common/host_device.h"

namespace msflow {

constexpr float winograd_a = 0.375f, winograd_b = 1.25f;
constexpr float winograd_a2 = winograd_a * winograd_a, winograd_b2 = winograd_b * winograd_b;
constexpr float winograd_r = 0.70710678118654752f, winograd_1_r = 1.41421356237309505f;

// Evaluates a row x of the input at the points.
template <class V>
HD void to_points(const V (&x)[4], V (&t)[4]) {
  t[0] = x[2] - x[0];
  t[1] = x[2] + x[1];
  t[2] = x[2] - x[1];
  t[3] = x[3] - x[1];
}

template <class V>
HD void to_points(const V (&x)[5], V (&t)[5]) {
  const V odd = x[3] - winograd_b2 * x[1], even = winograd_a * (x[2] - winograd_b2 * x[0]);
  t[0] = odd + even;
  t[1] = odd - even;
  const V odd_1 = x[3] - winograd_a2 * x[1], even_1 = winograd_b * (x[2] - winograd_a2 * x[0]);
  t[2] = odd_1 + even_1;
  t[3] = odd_1 - even_1;
  t[4] = x[4] - (winograd_a2 + winograd_b2) * x[2] + (winograd_a2 * winograd_b2) * x[0];
}

template <class V>
HD void to_points(const V (&x)[6], V (&t)[6]) {
  t[0] = x[0] - 2.5f * x[2] + x[4];
  const V even = x[4] - 2.f * x[2], odd = winograd_r * (x[3] - 2.f * x[1]);
  t[1] = even + odd;
  t[2] = even - odd;
  const V even_1 = x[4] - 0.5f * x[2], odd_1 = winograd_1_r * (x[3] - 0.5f * x[1]);
  t[3] = even_1 + odd_1;
  t[4] = even_1 - odd_1;
  t[5] = x[1] - 2.5f * x[3] + x[5];
}

// Computes the results from the products at the points.
template <class V>
HD void output_transform(const V (&m)[4], V (&y)[2]) {
  y[0] = m[0] + m[1] + m[2];
  y[1] = m[1] - m[2] + m[3];
}

template <class V>
HD void output_transform(const V (&m)[5], V (&y)[3]) {
  const V even = m[0] + m[1], even_1 = m[2] + m[3];
  y[0] = even + even_1;
  y[1] = winograd_a * (m[0] - m[1]) + winograd_b * (m[2] - m[3]);
  y[2] = winograd_a2 * even + winograd_b2 * even_1 + m[4];
}

template <class V>
HD void output_transform(const V (&m)[6], V (&y)[4]) {
  const V even = m[1] + m[2], even_1 = m[3] + m[4];
  const V odd = winograd_r * (m[1] - m[2]), odd_1 = winograd_1_r * (m[3] - m[4]);
  y[0] = m[0] + even + even_1;
  y[1] = odd + odd_1;
  y[2] = 0.5f * even + 2.f * even_1;
  y[3] = 0.5f * odd + 2.f * odd_1 + m[5];
}

// Evaluates the gradient of the results at the points: the transpose of output_transform.
template <class V>
HD void to_points(const V (&y)[4], V (&t)[6]) {
  t[0] = y[0];
  const V even = y[0] + 0.5f * y[2], odd = winograd_r * (y[1] + 0.5f * y[3]);
  t[1] = even + odd;
  t[2] = even - odd;
  const V even_1 = y[0] + 2.f * y[2], odd_1 = winograd_1_r * (y[1] + 2.f * y[3]);
  t[3] = even_1 + odd_1;
  t[4] = even_1 - odd_1;
  t[5] = y[3];
}

}  // namespace msflow
