// Vectors of sixteen floats as GCC and clang know them; one float elsewhere.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/half.h"

namespace msflow {

#if defined(__GNUC__)
using Vector = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));

HD void load(const float* from, Vector& v) { memcpy(&v, from, sizeof v); }
HD void load(const bfloat16* from, Vector& v) {
  Halves h;
  memcpy(&h, from, sizeof h);
  const Words w = __builtin_convertvector(h, Words) << 16;
  memcpy(&v, &w, sizeof v);
}
HD void store(float* to, const Vector& v) { memcpy(to, &v, sizeof v); }
HD void store(bfloat16* to, const Vector& v) {
  Words w;
  memcpy(&w, &v, sizeof w);
  w = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  w = v != v ? Words{} + 0x7fc0u : w;
  const Halves h = __builtin_convertvector(w, Halves);
  memcpy(to, &h, sizeof h);
}
HD void raise(Vector& v, float floor) { v = v < floor ? Vector{} + floor : v; }
HD void spread(uint32_t word, Vector& v) {
  const Words w = Words{} + word;
  memcpy(&v, &w, sizeof v);
}
#define PREFETCH(address, write, locality) __builtin_prefetch(address, write, locality)
#else
using Vector = float;

HD void load(const float* from, Vector& v) { v = *from; }
HD void load(const bfloat16* from, Vector& v) { v = to_float(*from); }
HD void raise(Vector& v, float floor) { v = v < floor ? floor : v; }
HD void spread(uint32_t word, Vector& v) { memcpy(&v, &word, sizeof v); }
#define PREFETCH(address, write, locality)
#endif

constexpr int64_t vector_size = sizeof(Vector) / sizeof(float);

}  // namespace msflow
