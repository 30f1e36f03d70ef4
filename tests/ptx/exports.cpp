// What Python calls in a library of translated kernels.
#include "cuda_runtime.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Runs a kernel by its name.
EXPORTED void ptx_run(const char* name, unsigned blocks, unsigned threads, unsigned dynamic,
                      ptx::Parameters parameters) {
  ptx::execute(name, blocks, threads, dynamic, parameters);
}

// The names of all kernels, one on each line.
EXPORTED const char* ptx_kernels() {
  static std::string text;
  text.clear();
  for (const auto& each : ptx::sets()[MSFLOW_EXT_PTX]) text += each.first + "\n";
  return text.c_str();
}

// The instructions that each kernel has executed since the last call: on each line the counts of
// formula, index, control and memory, then the name.
EXPORTED const char* ptx_counts() {
  static std::string text;
  text.clear();
  for (const auto& [name, counts] : ptx::totals) {
    for (uint64_t each : counts) text += std::to_string(each) + " ";
    text += name + "\n";
  }
  ptx::totals.clear();
  return text.c_str();
}
