// bfloat16 and float16 as their bits. Loads are exact; stores round to nearest even and keep NaN.
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
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  bfloat16 h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h.bits) : "f"(f));
  return h;
#else
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t(f != f ? 0x7fc0u : rounded)};
#endif
}

struct float16 {
  uint16_t bits;
};

HD float to_float(float16 h) {
#if defined(__CUDA_ARCH__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits));
  return f;
#else
  // Read the bits as a float, whose exponent is then 112 too small. The multiplication corrects it,
  // and makes denormals normal.
  const uint32_t wide = uint32_t(h.bits & 0x7fffu) << 13;
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16;
  float f;
  memcpy(&f, &wide, sizeof f);
  f *= 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  bits = sign | (f >= 65536.f ? wide | 0x7f800000u : bits);
  memcpy(&f, &bits, sizeof f);
  return f;
#endif
}

HD float16 to_float16(float f) {
#if defined(__CUDA_ARCH__)
  float16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(f));
  return h;
#else
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (size >= 0x47800000u) return {uint16_t(sign | 0x7c00u)};
  float magnitude;
  memcpy(&magnitude, &size, sizeof magnitude);
  // Denormal: adding 0.5 leaves the rounded multiple of 2^-24 in the last bits.
  if (size < 0x38800000u) {
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, sizeof bits);
    return {uint16_t(sign | (bits - 0x3f000000u))};
  }
  return {uint16_t(sign | ((size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13))};
#endif
}

// The accumulation dtype: values of T are computed in it.
template <class T>
struct Accumulation {
  using type = T;
};
template <>
struct Accumulation<bfloat16> {
  using type = float;
};
template <>
struct Accumulation<float16> {
  using type = float;
};
template <class T>
using accumulation_t = typename Accumulation<T>::type;

HD float load(float x) { return x; }
HD double load(double x) { return x; }
HD float load(bfloat16 x) { return to_float(x); }
HD float load(float16 x) { return to_float(x); }
HD int load(int16_t x) { return x; }

HD void store(float* to, float x) { *to = x; }
HD void store(double* to, double x) { *to = x; }
HD void store(bfloat16* to, float x) { *to = to_bfloat16(x); }
HD void store(float16* to, float x) { *to = to_float16(x); }

}  // namespace msflow
