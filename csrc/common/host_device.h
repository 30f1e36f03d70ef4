// Marks of functions and loops: for host and device (HD), several instruction sets (MSFLOW_CLONES),
// vectorisation (INDEPENDENT).
#pragma once

#if defined(__CUDACC__)
#define HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define HD inline __attribute__((always_inline))
#else
#define HD inline
#endif

// Compiles a function once per instruction set. CMake defines it as far as the compiler can.
#ifndef MSFLOW_CLONES
#define MSFLOW_CLONES
#endif

// Promises that the iterations of the next loop do not depend on each other. Without it, the
// compiler checks every pair of pointers for overlap, and does not vectorise if there are many.
#if defined(__CUDACC__)
#define INDEPENDENT
#elif defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define INDEPENDENT _Pragma("GCC ivdep")
#else
#define INDEPENDENT
#endif
