// Marks a function for the host and, where CUDA compiles it, for the device.
#pragma once

#if defined(__CUDACC__)
#define HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define HD inline __attribute__((always_inline))
#else
#define HD inline
#endif

// Copies of a hot loop for several instruction sets; CMake says which of them this compiler can
// build.
#ifndef MSFLOW_CLONES
#define MSFLOW_CLONES
#endif

// Before a loop whose iterations touch nothing of each other's: without it, the compiler checks
// every pair of pointers for overlap, and gives up on vectorising where there are many.
#if defined(__CUDACC__)
#define INDEPENDENT
#elif defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define INDEPENDENT _Pragma("GCC ivdep")
#else
#define INDEPENDENT
#endif
