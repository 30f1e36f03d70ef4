// How the emulator launches translated PTX: a kernel of C++ is looked up by its name in a set of
// kernels of PTX.
//
// Included by tests/cuda_emulator/cuda_runtime.h where MSFLOW_EXT_PTX is defined. The environment
// variable MSFLOW_EXT_PTX_SET chooses the set; a kernel that it lacks comes from the set that
// MSFLOW_EXT_PTX names.
#pragma once

#include <dlfcn.h>

#include <array>
#include <map>
#include <tuple>

namespace ptx {

using Parameters = const void* const*;
using Kernel = void (*)(Parameters, uint32_t);

inline std::string running;             // name of the kernel that is running
inline unsigned block = 0;              // counts the blocks of all launches
inline unsigned first_block = 1;        // of this launch
inline unsigned current_index = ~0u;    // blockIdx.x of `block`
inline std::array<uint64_t, 4> counts;  // executed instructions: formula, index, control, memory
inline std::map<std::string, std::array<uint64_t, 4>> totals;

inline std::map<std::string, std::map<std::string, Kernel>>& sets() {
  static std::map<std::string, std::map<std::string, Kernel>> all;
  return all;
}

// nvcc and the C++ compiler give unnamed namespaces different names, with their length before.
inline std::string without_unnamed(std::string name) {
  const std::string marker = "_GLOBAL__N_";
  for (size_t at; (at = name.find(marker)) != std::string::npos;) {
    size_t digits = at;
    while (digits > 0 && std::isdigit(name[digits - 1])) --digits;
    name.replace(digits, at - digits + std::stoul(name.substr(digits, at - digits)), "(unnamed)");
  }
  return name;
}

inline void add(const char* set, const char* name, Kernel kernel) {
  sets()[set][without_unnamed(name)] = kernel;
}

// The mangled name of a kernel in this library, by nm: kernels are local symbols, which dladdr does
// not know.
inline std::string name_of(const void* kernel) {
  static const auto names = [] {
    Dl_info library;
    dladdr(reinterpret_cast<void*>(&name_of), &library);
    std::map<uintptr_t, std::string> found;
    FILE* symbols = popen((std::string("nm '") + library.dli_fname + "'").c_str(), "r");
    char line[8192], name[8000];
    unsigned long at;
    while (symbols && std::fgets(line, sizeof line, symbols))
      if (std::sscanf(line, "%lx %*c %7999s", &at, name) == 2)
        found[reinterpret_cast<uintptr_t>(library.dli_fbase) + at] = name;
    if (symbols) pclose(symbols);
    return found;
  }();
  const auto at = names.find(reinterpret_cast<uintptr_t>(kernel));
  return at == names.end() ? "" : without_unnamed(at->second);
}

inline Kernel find(const std::string& name) {
  const char* chosen = std::getenv("MSFLOW_EXT_PTX_SET");
  for (const char* set : {chosen ? chosen : MSFLOW_EXT_PTX, MSFLOW_EXT_PTX}) {
    const auto all = sets().find(set);
    if (all == sets().end()) {
      std::fprintf(stderr, "ptx: no set of kernels is called %s\n", set);
      std::abort();
    }
    const auto at = all->second.find(name);
    if (at != all->second.end()) return at->second;
  }
  std::fprintf(stderr, "ptx: no kernel is called %s\n", name.c_str());
  std::abort();
}

// Runs a kernel in all threads of a grid. `dynamic`: bytes of shared memory beside what the kernel
// declares.
inline void execute(const std::string& name, unsigned blocks, unsigned threads, size_t dynamic,
                    Parameters parameters) {
  running = name;
  const Kernel kernel = find(name);
  emulator::shared.assign(emulator::max_shared, 0xff);
  emulator::kernel = [&] { kernel(parameters, uint32_t(dynamic)); };
  counts = {}, first_block = block + 1, current_index = ~0u;
  emulator::run(blocks, threads);
  for (size_t i = 0; i < counts.size(); ++i) totals[running][i] += counts[i];
}

template <class... Types>
void run(void (*kernel)(Types...), unsigned blocks, unsigned threads, size_t dynamic,
         Types... arguments) {
  const void* parameters[] = {&arguments..., nullptr};
  execute(name_of(reinterpret_cast<const void*>(kernel)), blocks, threads, dynamic, parameters);
}

}  // namespace ptx
