// Loads and stores of V neighbouring elements, 16 bytes at a time where alignment allows.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <initializer_list>

#include "common/half.h"
#include "common/tensor.h"

namespace msflow {

// How many elements of type T fit in 16 bytes, the widest load of a thread.
template <class T>
constexpr int packet_of = 16 / int(sizeof(T));

template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Packet {
  T element[V];
};

// A packet as raw 32-bit words. Loading words and converting them later lets several loads overlap;
// converting elements at once would wait for each load.
template <class T, int V>
struct alignas(Packet<T, V>) Words {
  uint32_t word[sizeof(T) * V / 4];
};

// Reads `count` elements and fills the rest with zeros. If `vectorized`, the caller guarantees V
// aligned elements. To overlap loads, fetch all packets before unpacking the first.
template <int V, class T>
__device__ __forceinline__ Words<T, V> fetch(const T* from, int64_t count, bool vectorized) {
  if (vectorized) return *reinterpret_cast<const Words<T, V>*>(from);
  T element[V];
#pragma unroll
  for (int i = 0; i < V; ++i) element[i] = i < count ? from[i] : T{};
  Words<T, V> words;
  memcpy(&words, element, sizeof words);
  return words;
}

template <class T, int V, class W>
__device__ __forceinline__ void unpack(W (&to)[V], const Words<T, V>& words) {
  T element[V];
  memcpy(element, &words, sizeof words);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = W(load(element[i]));
}

template <class T, int V, class W>
__device__ __forceinline__ void load(W (&to)[V], const T* from, int64_t count, bool vectorized) {
  unpack(to, fetch<V>(from, count, vectorized));
}

template <class T, int V, class W>
__device__ __forceinline__ void store(T* to, const W (&from)[V], int64_t count, bool vectorized) {
  if (vectorized) {
    Packet<T, V> packet;
#pragma unroll
    for (int i = 0; i < V; ++i) store(&packet.element[i], from[i]);
    *reinterpret_cast<Packet<T, V>*>(to) = packet;
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < count) store(to + i, from[i]);
  }
}

// Returns whether every full packet of these tensors starts at a multiple of 16 bytes.
inline bool aligned(std::initializer_list<Tensor> tensors) {
  constexpr int64_t sizes[] = {4, 8, 2, 2};  // in the order of DType
  for (const Tensor& t : tensors) {
    const int64_t size = sizes[int(t.dtype)];
    if (t.data % 16) return false;
    for (int64_t stride : {t.n, t.c, t.p})
      if (stride != 1 && stride * size % 16) return false;
  }
  return true;
}

}  // namespace msflow
