// exp, tanh and atan to about 1 ulp without a branch, so that loops over them vectorise.
//
// clang-format off
// The polynomials q are Chebyshev fits, computed with 40 digits and then rounded:
//
//                                                   degree and largest error
//   function                     range              float      double
//   exp(r)  = 1 + r + r^2 q(r)   |r| <= ln(2) / 2   4, 8e-9    10, 2e-19
//   atan(t) = t + t^3 q(t^2)     |t| <= 1           8, 2e-8    18, 2e-16
// clang-format on
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/host_device.h"

namespace msflow {

#if defined(__CUDA_ARCH__)

HD float exp_(float x) { return expf(x); }
HD double exp_(double x) { return exp(x); }
HD float tanh_(float x) { return tanhf(x); }
HD double tanh_(double x) { return tanh(x); }
HD float atan_(float x) { return atanf(x); }
HD double atan_(double x) { return atan(x); }

#else

namespace detail {

// Returns c[I] + c[I + 1] x + ... It is recursive, because a loop here would keep the compiler from
// vectorising the caller's loop.
template <int I = 0, int N, class T>
HD T polynomial(const T (&c)[N], T x) {
  if constexpr (I + 1 == N) {
    return c[I];
  } else {
    return polynomial<I + 1>(c, x) * x + c[I];
  }
}

template <class T>
struct Constants;

template <>
struct Constants<float> {
  using Int = int32_t;
  static constexpr float exp_low = -110.f, exp_high = 90.f, tanh_high = 10.f;
  // 1.5 * 2^23: adding it rounds to the nearest integer.
  static constexpr float round = 12582912.f;
  static constexpr float log2_e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int bias = 127, mantissa = 23;
  static constexpr float exp_q[] = {0.5f, 0.166665734f, 0.0416665501f, 0.00836377387f,
                                    0.00139269266f};
  static constexpr float atan_q[] = {-0.333333317f, 0.199997393f,   -0.142785687f,
                                     0.110337641f,  -0.0865688043f, 0.0625016944f,
                                     -0.035871539f, 0.0135077714f,  -0.00238699732f};
};

template <>
struct Constants<double> {
  using Int = int64_t;
  static constexpr double exp_low = -760., exp_high = 720., tanh_high = 22.;
  static constexpr double round = 6755399441055744.;  // 1.5 * 2^52
  static constexpr double log2_e = 1.4426950408889634, ln2_high = 6.93147180369123816490e-01,
                          ln2_low = 1.90821492927058770002e-10;
  static constexpr int bias = 1023, mantissa = 52;
  static constexpr double exp_q[] = {
      0.5,
      0.166666666666666714,
      0.0416666666666666701,
      0.0083333333333255447,
      0.00138888888888833267,
      0.000198412698768643549,
      0.0000248015873270071867,
      2.75572528335169097e-6,
      2.75572718102197996e-7,
      2.51062747335732947e-8,
      2.09154422977801152e-9,
  };
  static constexpr double atan_q[] = {
      -0.333333333333333145,    0.199999999999864102,   -0.142857142840728678,
      0.111111110320458848,     -0.0909090706749639008, 0.0769227590501477158,
      -0.0666633250921101917,   0.0587986548980298119,  -0.052495185843376629,
      0.0470520915307126546,    -0.0416521180235055914, 0.035360661072633815,
      -0.027590832895856106,    0.0188052240436423386,  -0.0105953460436958308,
      0.0046421639380263531,    -0.0014627303082646209, 0.000292217393080868659,
      -0.0000276337933136011439};
};

// Returns 2^n for n within the exponent range.
template <class T>
HD T power_of_two(typename Constants<T>::Int n) {
  using C = Constants<T>;
  // Unsigned, because n is arbitrary if x is NaN, and a signed shift could overflow.
  const auto bits = std::make_unsigned_t<typename C::Int>(n + C::bias) << C::mantissa;
  T f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

// Splits x = n ln2 + r, and returns r, n and e^r - 1.
template <class T>
HD T reduce(T x, T& em1, typename Constants<T>::Int& n) {
  using C = Constants<T>;
  const T shifted = x * C::log2_e + C::round;
  const T whole = shifted - C::round;
  typename C::Int bits, zero;
  const T round = C::round;
  memcpy(&bits, &shifted, sizeof bits);
  memcpy(&zero, &round, sizeof zero);
  n = bits - zero;
  const T r = (x - whole * C::ln2_high) - whole * C::ln2_low;
  em1 = r + r * r * polynomial(C::exp_q, r);
  return r;
}

template <class T>
HD T exp_of(T x) {
  using C = Constants<T>;
  x = x > C::exp_high ? C::exp_high : x;
  x = x < C::exp_low ? C::exp_low : x;
  T em1;
  typename C::Int n;
  reduce(x, em1, n);
  // Two factors, so that the result can be denormal or infinite.
  const typename C::Int half = n >> 1;
  return (1 + em1) * power_of_two<T>(half) * power_of_two<T>(n - half);
}

// Returns E / (E + 2) with E = e^(2x) - 1, computed without cancellation.
template <class T>
HD T tanh_of(T x) {
  using C = Constants<T>;
  x = x > C::tanh_high ? C::tanh_high : x;
  x = x < -C::tanh_high ? -C::tanh_high : x;
  T em1;
  typename C::Int n;
  reduce(x + x, em1, n);
  const T p = power_of_two<T>(n);
  const T e = p * em1 + (p - 1);
  return e / (e + 2);
}

template <class T>
HD T atan_of(T x) {
  using C = Constants<T>;
  const T magnitude = x < 0 ? -x : x;
  const bool outside = magnitude > 1;
  const T t = outside ? 1 / magnitude : magnitude;
  const T square = t * t;
  T y = t + t * square * polynomial(C::atan_q, square);
  y = outside ? T(1.57079632679489661923) - y : y;
  return x < 0 ? -y : y;
}

}  // namespace detail

HD float exp_(float x) { return detail::exp_of(x); }
HD double exp_(double x) { return detail::exp_of(x); }
HD float tanh_(float x) { return detail::tanh_of(x); }
HD double tanh_(double x) { return detail::tanh_of(x); }
HD float atan_(float x) { return detail::atan_of(x); }
HD double atan_(double x) { return detail::atan_of(x); }

#endif

}  // namespace msflow
