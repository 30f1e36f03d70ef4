// A tensor (N, C, P) as the kernels see it: an address, an element type and three strides.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace msflow {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

struct Tensor {
  uintptr_t data = 0;
  DType dtype = DType::float32;
  int64_t n = 0, c = 0, p = 0;  // strides of sample, channel and position, in elements

  template <class T>
  HD T* at(int64_t sample, int64_t channel, int64_t position = 0) const {
    // Computed with integers, because an empty tensor has a null pointer.
    const uintptr_t address = data + (sample * n + channel * c + position * p) * sizeof(T);
#if defined(__CUDA_ARCH__)
    // Tells the compiler that this is global memory. Generic loads would have to find out.
    return static_cast<T*>(__cvta_global_to_generic(address));
#else
    return reinterpret_cast<T*>(address);
#endif
  }
};

}  // namespace msflow
