// Likelihoods and their aggregation over scales on the CPU.
#include <cmath>
#include <limits>
#include <stdexcept>

#include "common/elementary.h"
#include "common/half.h"
#include "common/parallel.h"
#include "score/formula.h"
#include "score/score.h"
#include "score/upsample.h"

namespace msflow {
namespace {

// ---- sums of squares over channels ----

// Positions of an item.
constexpr int64_t block = 64;

template <class W>
struct Squares {
  int64_t samples, channels, positions;
  bool channels_last;
  Tensor z;
  W* per_position;
  std::unique_ptr<double[]> parts;  // (items,)

  int64_t blocks() const { return (positions + block - 1) / block; }
};

template <class X, class W>
HD void square_sums(const Squares<W>& job, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / job.blocks(), first = item % job.blocks() * block;
    const int64_t size = std::min(block, job.positions - first);
    W sum[block] = {};
    if (job.channels_last) {
      for (int64_t i = 0; i < size; ++i) {
        const X* z = job.z.template at<X>(n, 0, first + i);
        W lane[lanes] = {};
        int64_t c = 0;
        for (; c + lanes <= job.channels; c += lanes)
          for (int l = 0; l < lanes; ++l) lane[l] += W(load(z[c + l])) * W(load(z[c + l]));
        for (int l = 0; c < job.channels; ++c, ++l) lane[l] += W(load(z[c])) * W(load(z[c]));
        sum[i] = W(sum_lanes(lane));
      }
    } else {
      for (int64_t c = 0; c < job.channels; ++c) {
        const X* z = job.z.template at<X>(n, c, first);
        INDEPENDENT
        for (int64_t i = 0; i < size; ++i) sum[i] += W(load(z[i])) * W(load(z[i]));
      }
    }
    job.parts[item] = ordered_sum(sum, size);
    if (job.per_position) std::copy(sum, sum + size, job.per_position + n * job.positions + first);
  }
}

#define BODY(X)                                                                           \
  MSFLOW_CLONES void square_sums_##X(int64_t begin, int64_t end, void* context) {         \
    square_sums<X>(*static_cast<const Squares<accumulation_t<X>>*>(context), begin, end); \
  }
BODY(float)
BODY(double)
BODY(bfloat16)
#undef BODY

// ---- aggregation: upsample and sum rows, select the lowest pixels, finish rows ----

constexpr int bins = 4096;

template <class W>
struct Level {
  const W* log_likelihood;           // (N, h, w)
  std::unique_ptr<W[]> probability;  // exp(log_likelihood), or relative to the maximum of the map
  Upsampling<W> up;
};

template <class W>
struct Maps {
  int64_t samples, height, width;
  std::vector<Level<W>> levels;
  W* anomaly_map;  // holds the sum of probabilities until it is finished
  W* image_map;    // holds the sum of log-likelihoods until it is finished
  // Per row: the smallest and largest sum of log-likelihoods, the largest sum of probabilities.
  std::unique_ptr<W[]> row_low, row_high, row_probability;
  std::vector<W> high, probability;  // the maxima of each image
};

// Returns the largest sign * x[i]. It works in lanes, so that the loop vectorises.
template <class W>
HD W largest_signed(const W* x, int64_t size, W sign) {
  W lane[lanes];
  for (int l = 0; l < lanes; ++l) lane[l] = sign * x[0];
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes)
    for (int l = 0; l < lanes; ++l) lane[l] = std::max(lane[l], sign * x[i + l]);
  for (; i < size; ++i) lane[0] = std::max(lane[0], sign * x[i]);
  return *std::max_element(lane, lane + lanes);
}

template <class W>
HD void upsample_rows(const Maps<W>& maps, int64_t begin, int64_t end) {
  std::vector<UpsampledRows<W>> log_rows, rows;
  for (const auto& level : maps.levels) {
    log_rows.emplace_back(level.up, maps.width);
    rows.emplace_back(level.up, maps.width);
  }
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / maps.height, y = item % maps.height;
    W* log_sum = maps.image_map + item * maps.width;
    W* sum = maps.anomaly_map + item * maps.width;
    for (size_t i = 0; i < maps.levels.size(); ++i) {
      const auto& level = maps.levels[i];
      const int64_t image = n * level.up.size();
      const W *log_map = level.log_likelihood + image, *map = level.probability.get() + image;
      log_rows[i].add(log_map, y, log_sum, i == 0);
      rows[i].add(map, y, sum, i == 0);
    }
    maps.row_low[item] = -largest_signed(log_sum, maps.width, W(-1));
    maps.row_high[item] = largest_signed(log_sum, maps.width, W(1));
    maps.row_probability[item] = largest_signed(sum, maps.width, W(1));
  }
}

template <class W>
HD void finish_rows(const Maps<W>& maps, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const W high = maps.high[item / maps.height],
            probability = maps.probability[item / maps.height];
    W* image = maps.image_map + item * maps.width;
    W* anomaly = maps.anomaly_map + item * maps.width;
    INDEPENDENT
    for (int64_t x = 0; x < maps.width; ++x) {
      image[x] = 1 - exp_(image[x] - high);
      anomaly[x] = probability - anomaly[x];
    }
  }
}

// The anomaly map of FastFlow: minus the mean of the probabilities.
template <class W>
HD void mean_rows(const Maps<W>& maps, int64_t begin, int64_t end) {
  std::vector<UpsampledRows<W>> rows;
  for (const auto& level : maps.levels) rows.emplace_back(level.up, maps.width);
  const W mean_factor = W(-1) / W(maps.levels.size());
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / maps.height, y = item % maps.height;
    W* to = maps.anomaly_map + item * maps.width;
    for (size_t i = 0; i < maps.levels.size(); ++i) {
      const auto& level = maps.levels[i];
      const W* map = level.probability.get() + n * level.up.size();
      rows[i].add(map, y, to, i == 0);
    }
    INDEPENDENT
    for (int64_t x = 0; x < maps.width; ++x) to[x] *= mean_factor;
    maps.row_probability[item] = largest_signed(to, maps.width, W(1));
  }
}

// Computes histogram bins, which grow with x.
template <class W>
HD void bin_of(const W* x, int64_t size, W low, W rate, int32_t* bin) {
  INDEPENDENT
  for (int64_t i = 0; i < size; ++i) {
    const int32_t b = int32_t((x[i] - low) * rate);
    bin[i] = b < bins ? b : bins - 1;
  }
}

#define BODIES(W)                                                                      \
  MSFLOW_CLONES void upsample_rows_##W(int64_t begin, int64_t end, void* context) {    \
    upsample_rows(*static_cast<const Maps<W>*>(context), begin, end);                  \
  }                                                                                    \
  MSFLOW_CLONES void finish_rows_##W(int64_t begin, int64_t end, void* context) {      \
    finish_rows(*static_cast<const Maps<W>*>(context), begin, end);                    \
  }                                                                                    \
  MSFLOW_CLONES void mean_rows_##W(int64_t begin, int64_t end, void* context) {        \
    mean_rows(*static_cast<const Maps<W>*>(context), begin, end);                      \
  }                                                                                    \
  MSFLOW_CLONES void bins_##W(const W* x, int64_t size, W low, W rate, int32_t* bin) { \
    bin_of(x, size, low, rate, bin);                                                   \
  }
BODIES(float)
BODIES(double)

inline void bins_of(const float* x, int64_t size, float low, float rate, int32_t* bin) {
  bins_float(x, size, low, rate, bin);
}
inline void bins_of(const double* x, int64_t size, double low, double rate, int32_t* bin) {
  bins_double(x, size, low, rate, bin);
}

// Estimates the quantile of x, whose values are in [low, high], from a histogram of a sample of x.
template <class W>
W estimate_quantile(const W* x, int64_t size, double quantile, W low, W high) {
  // The step rarely divides the length of a row, so that the sample covers all columns.
  constexpr int64_t line = 16, step = 9 * line;
  const W rate = W(bins) / (high - low);
  if (!(high > low) || !std::isfinite(rate)) return high;
  int32_t bin[line];
  std::vector<int64_t> count(bins);
  int64_t seen = 0;
  for (int64_t start = 0; start < size; start += step) {
    const int64_t length = std::min(line, size - start);
    bins_of(x + start, length, low, rate, bin);
    for (int64_t i = 0; i < length; ++i) ++count[bin[i]];
    seen += length;
  }
  int64_t last = 0;
  for (int64_t sum = count[0]; last + 1 < bins && double(sum) < quantile * double(seen);)
    sum += count[++last];
  return low + W(last + 1) / rate;
}

// Returns the k smallest values of x, the largest of them last. All values are in [low, high]. It
// selects among the values below an estimated quantile, which should be k and a quarter more. If
// they are too few, it selects among all.
template <class W>
std::vector<W> smallest(const W* x, int64_t size, int64_t k, W low, W high) {
  const auto found = scratch<W>(size + 1);
  const auto up_to = [&](W limit) {
    int64_t length = 0;
    for (int64_t i = 0; i < size; ++i) {
      found[length] = x[i];
      length += x[i] <= limit;
    }
    return length;
  };
  int64_t length = up_to(estimate_quantile(x, size, 1.25 * double(k) / double(size), low, high));
  if (length < k) length = up_to(high);
  std::nth_element(found.get(), found.get() + (k - 1), found.get() + length);
  return std::vector<W>(found.get(), found.get() + k);
}

template <class W>
struct Selection {
  const Maps<W>* maps;
  int64_t k;
  W *score, *log_score, *nll_score;
};

template <class W>
void select(int64_t begin, int64_t end, void* context) {
  const auto& job = *static_cast<const Selection<W>*>(context);
  const auto& maps = *job.maps;
  const int64_t size = maps.height * maps.width;
  for (int64_t n = begin; n < end; ++n) {
    const W* row_low = maps.row_low.get() + n * maps.height;
    const W low = *std::min_element(row_low, row_low + maps.height);
    const auto lowest = smallest(maps.image_map + n * size, size, job.k, low, maps.high[n]);
    const double largest = double(lowest.back());
    double sum = 0, exponentials = 0;
    for (W value : lowest) {
      sum += double(value);
      exponentials += std::exp(double(value) - largest);
    }
    const auto scores = scores_of(double(maps.high[n]), largest, sum, exponentials, double(job.k));
    job.score[n] = W(scores.score);
    job.log_score[n] = W(scores.log_score);
    job.nll_score[n] = W(scores.nll_score);
  }
}

template <class W>
bool all_within(const W* x, int64_t size, W bound) {
  return std::all_of(x, x + size, [bound](W value) { return std::abs(value) <= bound; });
}

// Adds the maps and their probabilities. Returns false if one is not finite, or so large that sums
// and differences might overflow.
template <class W>
bool add_levels(Maps<W>& maps, const std::vector<Scale>& scales, bool align_corners,
                bool relative) {
  const W bound = std::numeric_limits<W>::max() / W(8 * scales.size());
  for (const Scale& scale : scales) {
    const auto* log_likelihood = static_cast<const W*>(scale.log_likelihood);
    const Upsampling<W> up(scale.height, scale.width, maps.height, maps.width, align_corners);
    auto probability = scratch<W>(maps.samples * up.size());
    for (int64_t n = 0; n < maps.samples; ++n) {
      const W* from = log_likelihood + n * up.size();
      W* to = probability.get() + n * up.size();
      if (!all_within(from, up.size(), bound)) return false;
      const W high = relative ? *std::max_element(from, from + up.size()) : W(0);
      for (int64_t i = 0; i < up.size(); ++i) to[i] = exp_(from[i] - high);
      if (!all_within(to, up.size(), bound)) return false;
    }
    maps.levels.push_back({log_likelihood, std::move(probability), up});
  }
  return true;
}

// Returns the maximum of each image from the maxima of its rows.
template <class W>
std::vector<W> largest(const Maps<W>& maps, const std::unique_ptr<W[]>& rows) {
  std::vector<W> found;
  for (int64_t n = 0; n < maps.samples; ++n) {
    const W* row = rows.get() + n * maps.height;
    found.push_back(*std::max_element(row, row + maps.height));
  }
  return found;
}

template <class W>
bool aggregate(int64_t samples, int64_t height, int64_t width, int64_t k,
               const std::vector<Scale>& scales, Body upsample, Body finish, W* score, W* log_score,
               W* nll_score, W* anomaly_map, W* image_map) {
  if (samples == 0) return true;  // other sizes may be huge
  const int64_t rows = samples * height;
  Maps<W> maps{
      samples,          height,           width, {}, anomaly_map, image_map, scratch<W>(rows),
      scratch<W>(rows), scratch<W>(rows), {},    {}};
  if (!add_levels(maps, scales, true, true)) return false;
  parallel_for(rows, width * int64_t(2 * scales.size()), upsample, maps);
  maps.high = largest(maps, maps.row_high);
  maps.probability = largest(maps, maps.row_probability);
  Selection<W> selection{&maps, k, score, log_score, nll_score};
  parallel_for(samples, height * width, select<W>, selection);
  parallel_for(rows, width, finish, maps);
  return true;
}

template <class W>
bool mean_aggregate(int64_t samples, int64_t height, int64_t width,
                    const std::vector<Scale>& scales, Body body, W* score, W* anomaly_map) {
  if (samples == 0) return true;
  Maps<W> maps{samples, height,      width,
               {},      anomaly_map, nullptr,
               nullptr, nullptr,     scratch<W>(samples * height),
               {},      {}};
  if (!add_levels(maps, scales, false, false)) return false;
  parallel_for(samples * height, width * int64_t(scales.size()), body, maps);
  const auto scores = largest(maps, maps.row_probability);
  std::copy(scores.begin(), scores.end(), score);
  return true;
}

}  // namespace

void square_sums_cpu(int64_t samples, int64_t channels, int64_t positions, bool channels_last,
                     Tensor z, void* per_position, void* per_sample) {
  const auto run = [&](auto zero, Body body) {
    using W = decltype(zero);
    Squares<W> job{samples, channels, positions, channels_last, z, static_cast<W*>(per_position),
                   nullptr};
    const int64_t items = samples * job.blocks();
    job.parts = scratch<double>(items);
    parallel_for(items, block * channels, body, job);
    if (!per_sample) return;
    for (int64_t n = 0; n < samples; ++n) {
      double sum = 0;
      for (int64_t i = 0; i < job.blocks(); ++i) sum += job.parts[n * job.blocks() + i];
      static_cast<W*>(per_sample)[n] = W(sum);
    }
  };
  if (z.dtype == DType::float32) return run(float(), square_sums_float);
  if (z.dtype == DType::float64) return run(double(), square_sums_double);
  if (z.dtype == DType::bfloat16) return run(float(), square_sums_bfloat16);
  throw std::invalid_argument("score: no kernel for this element type");
}

bool aggregate_cpu(DType dtype, int64_t samples, int64_t height, int64_t width, int64_t k,
                   const std::vector<Scale>& scales, void* score, void* log_score, void* nll_score,
                   void* anomaly_map, void* image_map) {
  const auto run = [&](auto zero, Body upsample, Body finish) {
    using W = decltype(zero);
    return aggregate<W>(samples, height, width, k, scales, upsample, finish, static_cast<W*>(score),
                        static_cast<W*>(log_score), static_cast<W*>(nll_score),
                        static_cast<W*>(anomaly_map), static_cast<W*>(image_map));
  };
  if (dtype == DType::float32) return run(float(), upsample_rows_float, finish_rows_float);
  if (dtype == DType::float64) return run(double(), upsample_rows_double, finish_rows_double);
  throw std::invalid_argument("score: maps must be float32 or float64");
}

bool mean_aggregate_cpu(DType dtype, int64_t samples, int64_t height, int64_t width,
                        const std::vector<Scale>& scales, void* score, void* anomaly_map) {
  const auto run = [&](auto zero, Body body) {
    using W = decltype(zero);
    return mean_aggregate<W>(samples, height, width, scales, body, static_cast<W*>(score),
                             static_cast<W*>(anomaly_map));
  };
  if (dtype == DType::float32) return run(float(), mean_rows_float);
  if (dtype == DType::float64) return run(double(), mean_rows_double);
  throw std::invalid_argument("score: maps must be float32 or float64");
}

}  // namespace msflow
