// Runs every CPU kernel on four threads, for ThreadSanitizer. The results must be the same as on
// one thread, bit for bit. With the argument "overlapping", neighbouring tasks share an item, which
// is a race to be found.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/half.h"
#include "common/parallel.h"
#include "coupling/coupling.h"
#include "norm/norm.h"
#include "ranking/ranking.h"
#include "resample/resample.h"
#include "score/score.h"
#include "winograd/winograd.h"

using namespace msflow;

namespace {

constexpr int threads = 4;
int64_t overlap = 0, splits = 0, kernels = 0;

int32_t run_in_threads(int64_t begin, int64_t end, int64_t, Body body, void* context) {
  ++splits;
  std::vector<std::thread> running;
  for (int64_t t = 0; t < threads; ++t) {
    const int64_t first = begin + (end - begin) * t / threads;
    const int64_t last = begin + (end - begin) * (t + 1) / threads;
    if (first == last) continue;
    running.emplace_back(body, std::max(begin, first - overlap), last, context);
  }
  for (auto& thread : running) thread.join();
  return 0;
}

// Numbers of one element type.
struct Numbers {
  DType type;
  std::vector<unsigned char> bytes;

  explicit Numbers(DType type, int64_t count, double shift = 0) : type(type) {
    static std::mt19937 random(0);
    std::normal_distribution<double> normal(shift, 0.5);
    for (int64_t i = 0; i < count; ++i) {
      const double x = normal(random);
      if (type == DType::float64) put(x);
      if (type == DType::float32) put(float(x));
      if (type == DType::bfloat16) put(to_bfloat16(float(x)));
    }
  }
  template <class T>
  void put(T x) {
    const auto* from = reinterpret_cast<const unsigned char*>(&x);
    bytes.insert(bytes.end(), from, from + sizeof x);
  }
  void* data() { return bytes.data(); }
};

// Runs a kernel on one thread and on several, and compares what it left in the results.
void check(const std::string& name, std::vector<Numbers*> results,
           const std::function<void()>& kernel) {
  torch_parallel_for = nullptr;
  kernel();
  std::vector<std::vector<unsigned char>> expected;
  for (Numbers* r : results) {
    expected.push_back(r->bytes);
    std::fill(r->bytes.begin(), r->bytes.end(), 0xff);
  }
  torch_parallel_for = run_in_threads;
  splits = 0;
  kernel();
  bool same = splits > 0;
  for (size_t i = 0; i < results.size(); ++i) same = same && results[i]->bytes == expected[i];
  ++kernels;
  if (same || overlap) return;
  std::fprintf(stderr, "%s: %s\n", name.c_str(), splits ? "other bits" : "one thread only");
  std::exit(1);
}

constexpr int64_t samples = 3, conditioning = 7, transformed = 6,
                  channels = conditioning + transformed;
constexpr int64_t height = 44, width = 40, low_height = 9, low_width = 11;
constexpr int64_t positions = height * width, low_positions = low_height * low_width;

DType accumulation_dtype(DType type) { return type == DType::float64 ? type : DType::float32; }

Tensor view(Numbers& x, int64_t channels, int64_t positions, bool channels_last) {
  return {reinterpret_cast<uintptr_t>(x.data()), x.type, channels * positions,
          channels_last ? 1 : positions, channels_last ? channels : 1};
}

void check_coupling(DType type, DType subnet, bool channels_last, const std::string& name) {
  const auto of = [&](DType t, int64_t c) { return Numbers(t, samples * c * positions); };
  Numbers x1 = of(type, conditioning), x2 = of(type, transformed), a = of(subnet, 2 * transformed);
  Numbers y1 = of(type, conditioning), y2 = of(type, transformed),
          log_det(accumulation_dtype(type), samples);
  Numbers gx1 = of(type, conditioning), gx2 = of(type, transformed),
          ga = of(subnet, 2 * transformed);
  Numbers scale(accumulation_dtype(type), channels, 4), offset(accumulation_dtype(type), channels);
  Numbers gscale(accumulation_dtype(type), channels), goffset(accumulation_dtype(type), channels);
  std::vector<int64_t> perm;
  for (int64_t i = 0; i < channels; ++i) perm.push_back((5 * i + 2) % channels);
  const auto t = [&](Numbers& x, int64_t c) { return view(x, c, positions, channels_last); };
  const Coupling job{samples,      conditioning,  transformed,   positions,
                     conditioning, channels_last, ClampForm(0),  2,
                     INFINITY,     scale.data(),  offset.data(), perm.data()};
  Numbers copied = of(subnet, conditioning),
          likelihoods(accumulation_dtype(type), samples * positions);
  const Tensor copy = type == subnet ? Tensor{} : t(copied, conditioning);
  std::vector<Numbers*> results{&y1, &y2, &log_det};
  if (copy.data) results.push_back(&copied);
  check("coupling forward" + name, results, [&] {
    coupling_forward_cpu(job, t(x1, conditioning), t(x2, transformed), t(a, 2 * transformed),
                         t(y1, conditioning), t(y2, transformed), copy, log_det.data());
  });
  check("coupling likelihood" + name, {&likelihoods}, [&] {
    coupling_likelihood_cpu(job, t(x1, conditioning), t(x2, transformed), t(a, 2 * transformed),
                            likelihoods.data());
  });
  check("coupling inverse" + name, {&gx2, &log_det}, [&] {
    coupling_inverse_cpu(job, t(y1, conditioning), t(y2, transformed), t(a, 2 * transformed),
                         t(gx2, transformed), log_det.data());
  });
  check("coupling backward" + name, {&gx1, &gx2, &ga, &gscale, &goffset}, [&] {
    coupling_backward_cpu(job, t(y1, conditioning), t(y2, transformed), copy, log_det.data(),
                          t(x1, conditioning), t(x2, transformed), t(a, 2 * transformed),
                          t(gx1, conditioning), t(gx2, transformed), t(ga, 2 * transformed),
                          gscale.data(), goffset.data());
  });
}

void check_others(DType type, bool channels_last, const std::string& name) {
  const auto whole = [&](DType t, int64_t n) { return Numbers(t, n * channels * positions); };
  Numbers x = whole(type, samples), y = whole(type, samples), gx = whole(type, samples);
  Numbers map = whole(accumulation_dtype(type), 1), gmap = whole(accumulation_dtype(type), 1);
  Numbers low(type, samples * channels * low_positions);
  Numbers weight(accumulation_dtype(type), channels), bias(accumulation_dtype(type), channels);
  Numbers gweight(accumulation_dtype(type), channels), gbias(accumulation_dtype(type), channels);
  Numbers statistics(accumulation_dtype(type), samples * positions * 2);
  Numbers per_position(accumulation_dtype(type), samples * positions),
      per_sample(accumulation_dtype(type), samples);
  const auto t = [&](Numbers& x) { return view(x, channels, positions, channels_last); };
  const Tensor low_shape = view(low, channels, low_positions, channels_last);

  const Norm norm{samples, channels, positions,     channels_last,
                  true,    1e-5,     weight.data(), bias.data()};
  check("norm forward" + name, {&y, &statistics},
        [&] { norm_forward_cpu(norm, t(x), t(map), t(y), statistics.data()); });
  check("norm backward" + name, {&gx, &gmap, &gweight, &gbias}, [&] {
    norm_backward_cpu(norm, t(y), t(x), t(map), statistics.data(), t(gx), t(gmap), gweight.data(),
                      gbias.data());
  });
  const Resample resample{samples, channels, height, width, low_height, low_width, channels_last};
  check("pool forward" + name, {&low}, [&] { pool_forward_cpu(resample, t(x), low_shape); });
  check("pool backward" + name, {&gx}, [&] { pool_backward_cpu(resample, low_shape, t(gx)); });
  check("upsample forward" + name, {&y},
        [&] { upsample_forward_cpu(resample, t(x), low_shape, t(y)); });
  check("upsample backward" + name, {&low},
        [&] { upsample_backward_cpu(resample, t(x), low_shape); });
  check("square sums" + name, {&per_position, &per_sample}, [&] {
    square_sums_cpu(samples, channels, positions, channels_last, t(x), per_position.data(),
                    per_sample.data());
  });
}

void check_scores(DType type, const std::string& name) {
  Numbers large(type, samples * positions, -4), small(type, samples * low_positions, -4);
  constexpr int64_t to = 70;
  Numbers anomaly(type, samples * to * to), image(type, samples * to * to);
  Numbers score(type, samples), log_score(type, samples), nll_score(type, samples);
  const std::vector<Scale> maps{{large.data(), height, width},
                                {small.data(), low_height, low_width}};
  check("aggregate" + name, {&score, &log_score, &nll_score, &anomaly, &image}, [&] {
    aggregate_cpu(type, samples, to, to, 100, maps, score.data(), log_score.data(),
                  nll_score.data(), anomaly.data(), image.data());
  });
  check("mean aggregate" + name, {&score, &anomaly},
        [&] { mean_aggregate_cpu(type, samples, to, to, maps, score.data(), anomaly.data()); });

  constexpr int64_t size = 200000, count = 9;
  Numbers scores(type, size), thresholds(type, 0);
  for (int64_t i = 0; i < count; ++i) {
    const double at = 1 - 0.2 * double(i);
    type == DType::float64 ? thresholds.put(at) : thresholds.put(float(at));
  }
  std::vector<uint8_t> ignored(size, 0);
  Numbers above(DType::float64, count), reached(DType::float64, count);  // 8 bytes, too
  check("ranking" + name, {&above, &reached}, [&] {
    ranking_cpu(type, scores.data(), ignored.data(), size, thresholds.data(), count, threads,
                static_cast<int64_t*>(above.data()), static_cast<int64_t*>(reached.data()));
  });
}

void check_winograd(DType type, DType factors, int64_t tile, const std::string& name) {
  constexpr int64_t from = 34, to = 40, panels = 2;
  const int64_t words = factors == DType::bfloat16 ? from / 2 : from;
  Numbers x(type, samples * from * positions), y(type, samples * to * positions);
  Numbers weight(DType::float32, (tile + 2) * (tile + 2) * panels * words * 32);
  Numbers bias(DType::float32, to);
  const Winograd job{
      samples, from, height, width, to,      height,        width,
      tile,    1,    1,      true,  factors, weight.data(), static_cast<float*>(bias.data())};
  check("winograd" + name, {&y},
        [&] { winograd_cpu(job, view(x, from, positions, true), view(y, to, positions, true)); });
}

void check_winograd_weight(DType factors, const std::string& name) {
  constexpr int64_t from = 34, to = 40, points = 25, panels = 2;
  const int64_t words = factors == DType::bfloat16 ? from / 2 : from;
  Numbers kernel(DType::float32, to * from * 9), transform(DType::float32, points * 9);
  Numbers correction(DType::float32, points * points);
  Numbers values(DType::float32, points * panels * words * 32);  // words of 32 bits
  const auto numbers = [](Numbers& n) { return static_cast<float*>(n.data()); };
  const WinogradWeight job{to,
                           from,
                           points,
                           numbers(kernel),
                           from * 9,
                           9,
                           true,
                           factors,
                           numbers(transform),
                           numbers(correction),
                           values.data()};
  check("winograd_weight" + name, {&values}, [&] { winograd_weight_cpu(job); });
}

void check_winograd_gradient(DType type, const std::string& name) {
  constexpr int64_t from = 34, to = 40;
  Numbers x(type, samples * from * positions), grad(type, samples * to * positions);
  Numbers transform(DType::float32, 36 * 9), kernel(DType::float32, to * from * 9);
  const WinogradGradient job{samples,
                             from,
                             height,
                             width,
                             to,
                             height,
                             width,
                             1,
                             1,
                             static_cast<float*>(transform.data()),
                             static_cast<float*>(kernel.data())};
  check("winograd_gradient" + name, {&kernel}, [&] {
    winograd_gradient_cpu(job, view(x, from, positions, true), view(grad, to, positions, true));
  });
}

// Every task throws. The caller must get one of the exceptions, whole, and the tasks that had not
// begun must not run.
void check_exceptions() {
  std::atomic<int> begun{0};
  const Body throwing = [](int64_t, int64_t, void* begun) {
    ++*static_cast<std::atomic<int>*>(begun);
    throw std::bad_alloc();
  };
  torch_parallel_for = run_in_threads;
  bool caught = false;
  try {
    parallel_for(1000, elements_per_task, throwing, begun);
  } catch (const std::bad_alloc&) {
    caught = true;
  }
  if (caught && begun >= 1 && begun <= threads) return;
  std::fprintf(stderr, "an exception of a task does not reach the caller\n");
  std::exit(1);
}

}  // namespace

int main(int count, char** arguments) {
  overlap = count > 1 && !std::strcmp(arguments[1], "overlapping");
  const DType f32 = DType::float32, f64 = DType::float64, bf16 = DType::bfloat16;
  const char* names[] = {" float32", " float64", " bfloat16"};
  for (const bool channels_last : {false, true}) {
    const std::string layout = channels_last ? " channels_last" : " contiguous";
    for (DType type : {f32, f64, bf16}) {
      check_coupling(type, type, channels_last, names[int(type)] + layout);
      check_others(type, channels_last, names[int(type)] + layout);
    }
    check_coupling(f32, bf16, channels_last, " float32 with bfloat16" + layout);
  }
  for (DType type : {f32, f64}) check_scores(type, names[int(type)]);
  for (DType type : {f32, bf16})
    for (int64_t tile : {2, 3, 4})
      check_winograd(type, f32, tile, names[int(type)] + (" " + std::to_string(tile)));
  for (DType type : winograd_factors_cpu())
    if (type == bf16)
      for (int64_t tile : {2, 3}) check_winograd(bf16, bf16, tile, " bfloat16 factors");
  for (DType type : {f32, bf16}) check_winograd_weight(type, names[int(type)]);
  for (DType type : {f32, bf16}) check_winograd_gradient(type, names[int(type)]);
  check_exceptions();
  std::printf("%d threads: %d kernels give the bits of one\n", threads, int(kernels));
}
