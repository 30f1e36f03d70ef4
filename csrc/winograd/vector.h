// Vectors of floats as GCC and clang know them, one float elsewhere: the widest registers' and
// those that every processor of today has.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/half.h"

namespace msflow {

#if defined(__GNUC__)
template <int n>
struct Of {
  typedef float floats __attribute__((vector_size(4 * n)));
  typedef uint32_t words __attribute__((vector_size(4 * n)));
  typedef uint16_t halves __attribute__((vector_size(2 * n)));
};
using Floats16 = Of<16>::floats;
using Floats8 = Of<8>::floats;

template <class V>
constexpr int64_t size_of = sizeof(V) / sizeof(float);
template <class V>
using WordsOf = typename Of<size_of<V>>::words;
template <class V>
using HalvesOf = typename Of<size_of<V>>::halves;

template <class V>
HD void load(const float* from, V& v) {
  memcpy(&v, from, sizeof v);
}
template <class V>
HD void load(const bfloat16* from, V& v) {
  HalvesOf<V> h;
  memcpy(&h, from, sizeof h);
  const WordsOf<V> w = __builtin_convertvector(h, WordsOf<V>) << 16;
  memcpy(&v, &w, sizeof v);
}
template <class V>
HD void store(float* to, const V& v) {
  memcpy(to, &v, sizeof v);
}
template <class V>
HD void store(bfloat16* to, const V& v) {
  WordsOf<V> w;
  memcpy(&w, &v, sizeof w);
  w = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  w = v != v ? WordsOf<V>{} + 0x7fc0u : w;
  const HalvesOf<V> h = __builtin_convertvector(w, HalvesOf<V>);
  memcpy(to, &h, sizeof h);
}
template <class V>
HD void raise(V& v, float floor) {
  v = v < floor ? V{} + floor : v;
}
template <class V>
HD void spread(uint32_t word, V& v) {
  const WordsOf<V> w = WordsOf<V>{} + word;
  memcpy(&v, &w, sizeof v);
}
#define PREFETCH(address, write, locality) __builtin_prefetch(address, write, locality)
#else
using Floats16 = float;
using Floats8 = float;

template <class V>
constexpr int64_t size_of = 1;

HD void load(const float* from, float& v) { v = *from; }
HD void load(const bfloat16* from, float& v) { v = to_float(*from); }
HD void raise(float& v, float floor) { v = v < floor ? floor : v; }
HD void spread(uint32_t word, float& v) { memcpy(&v, &word, sizeof v); }
#define PREFETCH(address, write, locality)
#endif

}  // namespace msflow
