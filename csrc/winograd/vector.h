// Vectors of 16 floats (AVX-512) and of 8 (AVX2), by an extension of GCC and clang. Other compilers
// use single floats.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/half.h"

namespace msflow {

#if defined(__GNUC__)
template <int n>
struct VectorTypes {
  typedef float floats __attribute__((vector_size(4 * n)));
  typedef uint32_t words __attribute__((vector_size(4 * n)));
  typedef uint16_t halves __attribute__((vector_size(2 * n)));
};
using Floats16 = VectorTypes<16>::floats;
using Floats8 = VectorTypes<8>::floats;

template <class V>
constexpr int64_t lanes_of = sizeof(V) / sizeof(float);
template <class V>
using WordsOf = typename VectorTypes<lanes_of<V>>::words;
template <class V>
using HalvesOf = typename VectorTypes<lanes_of<V>>::halves;

template <class V>
HD void load(const float* from, V& v) {
  memcpy(&v, from, sizeof v);
}
// Rounds floats to bfloat16. The result has their bits in the upper half of each word.
template <class V>
HD void round_to_half(const V& v, WordsOf<V>& w) {
  memcpy(&w, &v, sizeof w);
  w = (w + 0x7fffu + ((w >> 16) & 1u)) & 0xffff0000u;
  w = v != v ? WordsOf<V>{} + 0x7fc00000u : w;
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
  round_to_half(v, w);
  const HalvesOf<V> h = __builtin_convertvector(w >> 16, HalvesOf<V>);
  memcpy(to, &h, sizeof h);
}
template <class V>
HD void clamp_below(V& v, float floor) {
  v = v < floor ? V{} + floor : v;
}
template <class V>
HD void broadcast(uint32_t word, V& v) {
  const WordsOf<V> w = WordsOf<V>{} + word;
  memcpy(&v, &w, sizeof v);
}
#define PREFETCH(address, write, locality) __builtin_prefetch(address, write, locality)
#else
using Floats16 = float;
using Floats8 = float;

template <class V>
constexpr int64_t lanes_of = 1;
template <class V>
using WordsOf = uint32_t;

HD void load(const float* from, float& v) { v = *from; }
HD void round_to_half(float v, uint32_t& w) { w = uint32_t(to_bfloat16(v).bits) << 16; }
HD void load(const bfloat16* from, float& v) { v = to_float(*from); }
HD void clamp_below(float& v, float floor) { v = v < floor ? floor : v; }
HD void broadcast(uint32_t word, float& v) { memcpy(&v, &word, sizeof v); }
#define PREFETCH(address, write, locality)
#endif

// Marks functions that use 512-bit registers. has_avx512() returns whether the processor has them.
#if defined(__GNUC__) && defined(__x86_64__)
#define SUPPORTS(set) __builtin_cpu_supports(set)
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#else
#define SUPPORTS(set) false
#define AVX512
#endif
inline bool has_avx512() {
  return SUPPORTS("avx512vl") && SUPPORTS("avx512bw") && SUPPORTS("avx512dq");
}

}  // namespace msflow
