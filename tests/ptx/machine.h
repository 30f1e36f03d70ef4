// The machine that translated PTX runs on: registers, arithmetic, and memory whose every access is
// checked for alignment, for the bounds of shared memory, and for races.
//
// Threads of a block are fibers of tests/cuda_emulator, which run one after the other. So a race is
// not seen by what it does, but by its order: two threads use a byte, one of them writes, and no
// barrier lies between (nor, in one warp, a shuffle). A fault ends the process with a message.
#pragma once

#include <immintrin.h>

#include <cfenv>
#include <cmath>
#include <limits>
#include <map>
#include <type_traits>
#include <unordered_map>

#include "cuda_runtime.h"

namespace ptx {

class Register {
 public:
  template <class T>
  T as() const {
    T value;
    std::memcpy(&value, &bits_, sizeof value);
    return value;
  }
  template <class T>
  void set(T value) {
    std::memcpy(&bits_, &value, sizeof value);
  }

 private:
  uint64_t bits_;
};

template <class T, class Bits>
T from_bits(Bits bits) {
  T value;
  static_assert(sizeof value == sizeof bits);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
T loaded(uintptr_t at) {
  T value;
  std::memcpy(&value, reinterpret_cast<const void*>(at), sizeof value);
  return value;
}
template <class T>
void store(uintptr_t at, T value) {
  std::memcpy(reinterpret_cast<void*>(at), &value, sizeof value);
}

// Checks of memory.

[[noreturn]] inline void fault(const char* what, uintptr_t at) {
  std::fprintf(stderr, "ptx: %s at %#lx in block %u, thread %u of %s\n", what,
               static_cast<unsigned long>(at), blockIdx.x, threadIdx.x, running.c_str());
  std::abort();
}

// An access to a byte. Barriers are counted for each thread, and so are shuffles.
struct Access {
  unsigned block = 0, thread = 0, barriers = 0, shuffles = 0;
  bool atomic = false;

  bool same_warp(const Access& other) const {
    return block == other.block && thread / emulator::warp == other.thread / emulator::warp;
  }
};
// The last write, the last read, and the last read before it by another warp.
struct Byte {
  unsigned block = 0;  // of shared memory: the one that it belongs to
  Access write, read, other_warp;
};

inline unsigned barriers[emulator::max_threads], shuffles[emulator::max_threads];
inline uint32_t shared_bytes = 0;
inline std::vector<Byte> shared_history(emulator::max_shared);
inline std::unordered_map<uintptr_t, Byte> global_history;
inline const bool global_checked = std::getenv("MSFLOW_EXT_PTX_GLOBAL") != nullptr;

// Whether nothing orders two accesses of one launch. Blocks have no order; what an earlier launch
// did is over.
inline bool unordered(const Access& earlier, const Access& now) {
  if (earlier.block < first_block || (earlier.atomic && now.atomic)) return false;
  if (earlier.block != now.block) return true;
  if (earlier.thread == now.thread || earlier.barriers != now.barriers) return false;
  return !earlier.same_warp(now) || earlier.shuffles == now.shuffles;
}

inline void record(Byte& byte, bool write, bool atomic, uintptr_t at) {
  const unsigned t = threadIdx.x;
  const Access now{block, t, barriers[t], shuffles[t], atomic};
  if (unordered(byte.write, now))
    fault(write ? "two writes race" : "a read races with a write", at);
  if (write) {
    if (unordered(byte.read, now) || unordered(byte.other_warp, now))
      fault("a write races with a read", at);
    byte.write = now;
  } else {
    if (!byte.read.same_warp(now)) byte.other_warp = byte.read;
    byte.read = now;
  }
}

template <size_t size, bool write, bool atomic = false>
uintptr_t shared_address(uintptr_t at) {
  if (at % size) fault("a misaligned access to shared memory", at);
  if (at + size > shared_bytes) fault("an access beyond shared memory", at);
  for (size_t i = 0; i < size; ++i) {
    Byte& byte = shared_history[at + i];
    if (byte.block != block) byte = Byte{block};  // each block has its own
    record(byte, write, atomic, at);
  }
  return reinterpret_cast<uintptr_t>(emulator::shared.data()) + at;
}

template <size_t size, bool write, bool atomic = false>
uintptr_t global_address(uintptr_t at) {
  if (at % size) fault("a misaligned access to global memory", at);
  // Numbers have two bytes or more. Single bytes are only read.
  if (global_checked)
    for (size_t i = 0; i < size; i += 2) record(global_history[at + i], write, atomic, at);
  return at;
}

template <size_t size, bool write>
uintptr_t param_address(uintptr_t at) {
  static_assert(!write, "parameters are constant");
  return at;
}

// Called by each thread when it begins a block.
inline void begin(uint32_t bytes) {
  if (bytes > emulator::max_shared) fault("more shared memory than a block has", bytes);
  if (blockIdx.x != current_index) ++block, current_index = blockIdx.x;
  shared_bytes = bytes;
  barriers[threadIdx.x] = shuffles[threadIdx.x] = 0;
}

inline void barrier() {
  __syncthreads();
  ++barriers[threadIdx.x];
}

// shfl.sync.bfly of a whole warp; `clamp` 31 makes no smaller groups.
inline uint32_t shuffled(uint32_t value, uint32_t lanes, uint32_t clamp, uint32_t mask) {
  if (clamp != 31) fault("a shuffle in groups of less than a warp", clamp);
  value = __shfl_xor_sync(mask, value, int(lanes));
  ++shuffles[threadIdx.x];
  return value;
}

inline void count(unsigned formula, unsigned index, unsigned control, unsigned memory) {
  counts[0] += formula, counts[1] += index, counts[2] += control, counts[3] += memory;
}

// Arithmetic that C++ does not define as PTX does. Built with -fwrapv, so that integers overflow as
// in PTX.

template <class T>
constexpr unsigned bits_of = 8 * sizeof(T);

template <class T>
T left(T x, uint32_t n) {
  return n < bits_of<T> ? T(x << n) : T(0);
}
template <class T>
T right(T x, uint32_t n) {
  if (n < bits_of<T>) return T(x >> n);
  return std::is_signed_v<T> && x < 0 ? T(-1) : T(0);
}
inline uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t n) {
  n &= 31;
  return n ? high << n | low >> (32 - n) : high;
}
template <class T>
T bits(T x, uint32_t begin, uint32_t length) {
  begin &= 255, length &= 255;
  if (begin >= bits_of<T> || length == 0) return T(0);
  const T rest = T(x >> begin);
  return length >= bits_of<T> ? rest : T(rest & ((T(1) << length) - 1));
}
template <class T>
T quotient(T a, T b) {
  if (b == 0) fault("a division by 0", 0);
  return T(a / b);
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) fault("a division by 0", 0);
  return T(a % b);
}
template <class T>
T smaller(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
  return a < b ? a : b;
}
template <class T>
T larger(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
  return a > b ? a : b;
}
template <class T>
T absolute(T a) {
  if constexpr (std::is_floating_point_v<T>) return std::fabs(a);
  return a < 0 ? T(-a) : a;
}
template <class T>
T inverted(T a) {
  if constexpr (std::is_same_v<T, bool>) return !a;
  return T(~a);
}
inline float flushed(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.f, x) : x;
}
inline float ex2_approx(float x) { return flushed(std::exp2(flushed(x))); }
inline float rcp_approx(float x) { return flushed(1 / flushed(x)); }
// In double precision, the upper half of the result.
inline double rcp_approx(double x) {
  return from_bits<double>(from_bits<uint64_t>(1 / x) & ~uint64_t(0xffffffff));
}
inline float saturated(float x) { return x > 0 ? std::fmin(x, 1.f) : 0.f; }  // NaN: 0
__attribute__((noinline)) inline float fma_down(float a, float b, float c) {
  const int before = std::fegetround();
  std::fesetround(FE_DOWNWARD);
  volatile float x = a, y = b, z = c;  // so that nothing is computed before the rounding is set
  const volatile float result = std::fma(float(x), float(y), float(z));
  std::fesetround(before);
  return result;
}
template <class T, class F>
T whole(F x) {
  if (x != x) return bits_of<T> == 64 ? std::numeric_limits<T>::min() : T(0);
  if (x <= F(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (x >= F(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return T(x);
}
inline float from_half(uint16_t bits) { return _cvtsh_ss(bits); }
inline uint16_t to_half(float x) { return x != x ? 0x7fff : uint16_t(_cvtss_sh(x, 0)); }
inline uint16_t to_bfloat16(float x) {
  if (x != x) return 0x7fff;
  const auto bits = from_bits<uint32_t>(x);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to the nearest, ties to even
}
inline uint32_t permuted_bytes(uint32_t low, uint32_t high, uint32_t selectors) {
  const uint64_t both = low | uint64_t(high) << 32;
  uint32_t result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const uint32_t selector = selectors >> (4 * i) & 15;
    const auto byte = uint8_t(both >> (8 * (selector & 7)));
    result |= uint32_t(selector & 8 ? uint8_t(int8_t(byte) >> 7) : byte) << (8 * i);
  }
  return result;
}

}  // namespace ptx
