// How many scores stand above each threshold, on the CPU: every score is looked up, none is sorted.
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "common/parallel.h"
#include "ranking/ranking.h"

namespace msflow {
namespace {

template <class T>
using Key = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// Keys rise where scores fall, and both zeros have the same one.
template <class T>
HD Key<T> key_of(T score) {
  using K = Key<T>;
  K bits;
  score += T(0);
  memcpy(&bits, &score, sizeof bits);
  constexpr K sign = K(1) << (8 * sizeof(K) - 1);
  return bits & sign ? bits : bits ^ (sign - 1);
}

// The thresholds' keys, in buckets of one width: the first lies before them, the last behind them.
template <class T>
struct Table {
  using K = Key<T>;
  static constexpr int64_t most_buckets = 1 << 20;

  std::unique_ptr<K[]> keys;  // (count + 1,), rising; one more, so that every index may be read
  std::unique_ptr<uint32_t[]> start;  // of each bucket, and behind the last
  K low, high;
  int shift = 0;

  Table(const T* thresholds, int64_t count) : keys(scratch<K>(count + 1)) {
    for (int64_t i = 0; i < count; ++i) keys[i] = key_of(thresholds[i]);
    keys[count] = std::numeric_limits<K>::max();
    low = keys[0], high = keys[count - 1];
    while (int64_t((high - low) >> shift) >= std::min(4 * count, most_buckets)) ++shift;
    const uint32_t last = bucket_of(high) + 1;
    start = scratch<uint32_t>(last + 2);
    uint32_t filled = 0;
    for (int64_t i = 0; i < count; ++i)
      for (const uint32_t bucket = bucket_of(keys[i]); filled <= bucket; ++filled)
        start[filled] = uint32_t(i);
    start[last] = start[last + 1] = uint32_t(count);
  }

  HD uint32_t bucket_of(K key) const {
    const uint32_t inside = 1 + uint32_t((std::min(key, high) - low) >> shift);
    return key < low ? 0 : inside + (key > high);
  }

  // Twice the number of keys below, and one more if the key itself is there.
  HD uint32_t bin_of(K key, uint32_t bucket) const {
    uint32_t first = start[bucket];
    for (uint32_t last = start[bucket + 1]; first < last;) {
      const uint32_t middle = first + (last - first) / 2;
      if (keys[middle] < key)
        first = middle + 1;
      else
        last = middle;
    }
    return 2 * first + (keys[first] == key);
  }
};

template <class T>
struct Counting {
  const T* scores;
  const uint8_t* ignored;
  int64_t size, tasks, bins;
  Table<T> table;
  std::unique_ptr<uint32_t[]> counts;  // (tasks, bins)
};

template <class T>
HD void count(const Counting<T>& job, int64_t begin, int64_t end) {
  constexpr int64_t block = 256;
  Key<T> key[block];
  uint32_t bucket[block];
  const Table<T>& table = job.table;
  for (int64_t task = begin; task < end; ++task) {
    uint32_t* counts = job.counts.get() + task * job.bins;
    std::fill(counts, counts + job.bins, 0);
    const int64_t stop = job.size * (task + 1) / job.tasks;
    for (int64_t first = job.size * task / job.tasks; first < stop; first += block) {
      const T* scores = job.scores + first;
      const uint8_t* ignored = job.ignored + first;
      const int64_t size = std::min(block, stop - first);
      INDEPENDENT
      for (int64_t i = 0; i < size; ++i) {
        key[i] = key_of(scores[i]);
        bucket[i] = table.bucket_of(key[i]);
      }
      for (int64_t i = 0; i < size; ++i)
        if (!ignored[i]) ++counts[table.bin_of(key[i], bucket[i])];
    }
  }
}

#define BODY(T)                                                             \
  MSFLOW_CLONES void count_##T(int64_t begin, int64_t end, void* context) { \
    count(*static_cast<const Counting<T>*>(context), begin, end);           \
  }
BODY(float)
BODY(double)
#undef BODY

template <class T>
void rank(Body body, const T* scores, const uint8_t* ignored, int64_t size, const T* thresholds,
          int64_t count, int64_t threads, int64_t* above, int64_t* reached) {
  if (count == 0) return;
  const int64_t bins = 2 * (count + 1);
  // Every task has its own counts: all of them together take no more memory than the scores.
  const int64_t tasks = std::max<int64_t>(1, std::min(threads, size / bins));
  Counting<T> job{scores,
                  ignored,
                  size,
                  tasks,
                  bins,
                  Table<T>(thresholds, count),
                  scratch<uint32_t>(tasks * bins)};
  parallel_for(tasks, size / tasks, body, job);
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t task = 0; task < tasks; ++task) sum += job.counts[task * bins + 2 * i];
    above[i] = sum;
    for (int64_t task = 0; task < tasks; ++task) sum += job.counts[task * bins + 2 * i + 1];
    reached[i] = sum;
  }
}

}  // namespace

void ranking_cpu(DType dtype, const void* scores, const uint8_t* ignored, int64_t size,
                 const void* thresholds, int64_t count, int64_t threads, int64_t* above,
                 int64_t* reached) {
  const auto run = [&](auto type, Body body) {
    using T = decltype(type);
    rank(body, static_cast<const T*>(scores), ignored, size, static_cast<const T*>(thresholds),
         count, threads, above, reached);
  };
  if (dtype == DType::float32) return run(float(), count_float);
  if (dtype == DType::float64) return run(double(), count_double);
  throw std::invalid_argument("ranking: scores must be float32 or float64");
}

}  // namespace msflow
