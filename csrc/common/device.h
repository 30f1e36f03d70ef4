// Whether CUDA kernels can run on the current device.
#pragma once

#include <string>

namespace msflow {

// Returns why CUDA kernels cannot run, for example because the driver is too old or no kernel was
// built for the GPU's architecture. Returns an empty string if they can.
std::string cuda_problem();

}  // namespace msflow
