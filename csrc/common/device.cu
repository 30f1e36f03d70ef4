// Whether CUDA kernels can run on the current device.
#include <cuda_runtime.h>

#include "common/device.h"

namespace msflow {
namespace {

__global__ void probe() {}

}  // namespace

std::string cuda_problem() {
  cudaFuncAttributes attributes;
  const cudaError_t status =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&probe));
  if (status == cudaSuccess) return "";
  cudaGetLastError();
  return cudaGetErrorString(status);
}

}  // namespace msflow
