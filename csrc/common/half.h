// bfloat16 as its bits: loads widen exactly, stores round to nearest even and keep NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace msflow {

struct bfloat16 {
  uint16_t bits;
};

HD float to_float(bfloat16 h) {
  const uint32_t wide = uint32_t(h.bits) << 16;
  float f;
  memcpy(&f, &wide, sizeof f);
  return f;
}

HD bfloat16 to_bfloat16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t(f != f ? 0x7fc0u : rounded)};
}

// The type in which values of T are computed.
template <class T>
struct Wide {
  using type = T;
};
template <>
struct Wide<bfloat16> {
  using type = float;
};
template <class T>
using wide_t = typename Wide<T>::type;

HD float load(float x) { return x; }
HD double load(double x) { return x; }
HD float load(bfloat16 x) { return to_float(x); }

HD void store(float* to, float x) { *to = x; }
HD void store(double* to, double x) { *to = x; }
HD void store(bfloat16* to, float x) { *to = to_bfloat16(x); }

}  // namespace msflow
