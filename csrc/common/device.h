// Whether CUDA kernels can run on the current device.
#pragma once

#include <string>

namespace msflow {

// Empty, or why not: a driver that is too old, or a GPU of an architecture that was not built.
std::string cuda_problem();

}  // namespace msflow
