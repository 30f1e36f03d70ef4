// Checks of the entry points' arguments, before a kernel runs: sizes, strides, element types and
// null pointers. They cannot check that memory is as large as the caller says.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>

#include "coupling/coupling.h"
#include "norm/norm.h"
#include "ranking/ranking.h"
#include "resample/resample.h"
#include "score/score.h"
#include "winograd/winograd.h"

namespace msflow {

inline void require(bool holds, const char* op, const char* name, const char* expectation) {
  if (!holds) throw std::invalid_argument(std::string(op) + ": " + name + " must " + expectation);
}

// No process can address more bytes. Sizes are checked as doubles, which do not overflow.
constexpr double max_span_bytes = double(int64_t(1) << 48);

// Checks the product of the sizes. A 0 counts as 1, because kernels may multiply the others.
inline void check_sizes(const char* op, std::initializer_list<int64_t> sizes, int64_t minimum = 0) {
  double product = 1;
  for (int64_t size : sizes) {
    require(size >= minimum, op, "every size", minimum ? "be positive" : "not be negative");
    product *= size > 1 ? double(size) : 1;
  }
  require(product <= max_span_bytes, op, "the sizes", "fit in memory");
}

inline void check_span(const char* op, const char* name, uintptr_t address, double bytes) {
  if (bytes == 0) return;
  require(address != 0, op, name, "have memory");
  require(
      bytes <= max_span_bytes && address <= std::numeric_limits<uintptr_t>::max() - uint64_t(bytes),
      op, name, "fit in memory");
}

// Checks a vector of `count` numbers. It assumes one byte per number, the least there can be.
inline void check_vector(const char* op, const char* name, const void* vector, int64_t count) {
  check_span(op, name, reinterpret_cast<uintptr_t>(vector), double(count));
}

inline void check_optional(const char* op, const char* name, const void* vector, int64_t count) {
  if (vector) check_vector(op, name, vector, count);
}

// The sizes that all tensors (N, C, P) of a call share.
struct Shape {
  const char* op;
  int64_t samples, positions;
  bool channels_last;

  void check(const char* name, const Tensor& t, DType type, int64_t channels) const {
    constexpr int bytes[] = {4, 8, 2, 2};  // in the order of DType
    require(t.dtype == type, op, name, "have the element type of the call");
    require(t.n >= 0 && t.c >= 0 && t.p >= 0, op, name, "have no negative stride");
    if (samples == 0 || channels == 0 || positions == 0) return;
    require((channels_last ? t.c : t.p) == 1, op, name, "have its numbers side by side");
    const double last = double(samples - 1) * double(t.n) + double(channels - 1) * double(t.c) +
                        double(positions - 1) * double(t.p);
    check_span(op, name, t.data, (last + 1) * bytes[int(type)]);
  }
};

// ---- one check per entry point; `auto...` takes the scratch memory and stream of CUDA's ----

inline DType accumulation_dtype(DType type) {
  return type == DType::float64 ? type : DType::float32;
}

inline void check(const Coupling& c) {
  check_sizes("coupling", {c.samples, c.conditioning, c.positions});
  check_sizes("coupling", {c.samples, c.transformed, c.positions});
  const int64_t channels = c.channels();
  check_sizes("coupling", {c.samples, channels, c.positions});
  require(channels < std::numeric_limits<int32_t>::max(), "coupling", "channels", "be below 2^31");
  require(c.split >= 0 && c.split <= channels, "coupling", "split", "be a number of channels");
  require(int(c.form) >= 0 && int(c.form) <= 2, "coupling", "form", "be 0, 1 or 2");
  check_optional("coupling", "scale", c.scale, channels);
  check_optional("coupling", "offset", c.offset, channels);
  check_optional("coupling", "perm", c.perm, channels);
}

inline Shape shape(const Coupling& c) {
  return {"coupling", c.samples, c.positions, c.channels_last};
}

inline void check_inputs(const Coupling& c, const Tensor& x1, const Tensor& x2, const Tensor& a) {
  const Shape s = shape(c);
  s.check("x1", x1, x2.dtype, c.conditioning);
  s.check("x2", x2, x2.dtype, c.transformed);
  s.check("a", a, a.dtype, 2 * c.transformed);
}

inline constexpr auto check_coupling_forward =
    [](const Coupling& c, const Tensor& x1, const Tensor& x2, const Tensor& a, const Tensor& y1,
       const Tensor& y2, const Tensor& copy, const void* log_det, auto...) {
      check_inputs(c, x1, x2, a);
      const Shape s = shape(c);
      s.check("y1", y1, x2.dtype, c.split);
      s.check("y2", y2, x2.dtype, c.channels() - c.split);
      if (copy.data) {
        require(a.dtype != x2.dtype, "coupling", "copy", "differ from y1 in its element type");
        s.check("copy", copy, a.dtype, c.split);
      }
      check_optional("coupling", "log_det", log_det, c.samples);
    };

inline constexpr auto check_coupling_likelihood = [](const Coupling& c, const Tensor& x1,
                                                     const Tensor& x2, const Tensor& a,
                                                     const void* likelihoods, auto...) {
  check_inputs(c, x1, x2, a);
  require(c.channels() > 0, "coupling", "channels", "be at least one");
  check_vector("coupling", "likelihoods", likelihoods, c.samples * c.positions);
};

inline constexpr auto check_coupling_inverse = [](const Coupling& c, const Tensor& y1,
                                                  const Tensor& y2, const Tensor& a,
                                                  const Tensor& x2, const void* log_det, auto...) {
  const Shape s = shape(c);
  s.check("y1", y1, x2.dtype, c.split);
  s.check("y2", y2, x2.dtype, c.channels() - c.split);
  s.check("a", a, a.dtype, 2 * c.transformed);
  s.check("x2", x2, x2.dtype, c.transformed);
  check_vector("coupling", "log_det", log_det, c.samples);
};

inline constexpr auto check_coupling_backward =
    [](const Coupling& c, const Tensor& gy1, const Tensor& gy2, const Tensor& gcopy,
       const void* grad_log_det, const Tensor& x1, const Tensor& x2, const Tensor& a,
       const Tensor& gx1, const Tensor& gx2, const Tensor& ga, const void* grad_scale,
       const void* grad_offset, auto...) {
      check_coupling_forward(c, x1, x2, a, gy1, gy2, gcopy, grad_log_det);
      check_vector("coupling", "grad_log_det", grad_log_det, c.samples);
      const Shape s = shape(c);
      s.check("grad_x1", gx1, x2.dtype, c.conditioning);
      s.check("grad_x2", gx2, x2.dtype, c.transformed);
      s.check("grad_a", ga, a.dtype, 2 * c.transformed);
      check_optional("coupling", "grad_scale", grad_scale, c.channels());
      check_optional("coupling", "grad_offset", grad_offset, c.channels());
      require(!grad_scale || c.scale, "coupling", "grad_scale", "go with a scale");
    };

inline void check(const Norm& n) {
  check_sizes("channel_norm", {n.samples, n.channels, n.positions});
  check_sizes("channel_norm", {n.channels}, 1);
  check_vector("channel_norm", "weight", n.weight, n.channels);
  check_vector("channel_norm", "bias", n.bias, n.channels);
}

inline constexpr auto check_norm_forward = [](const Norm& n, const Tensor& x, const Tensor& map,
                                              const Tensor& y, const void* statistics, auto...) {
  const Shape s{"channel_norm", n.samples, n.positions, n.channels_last};
  const Shape one{"channel_norm", n.samples ? 1 : 0, n.positions, n.channels_last};
  s.check("x", x, x.dtype, n.channels);
  s.check("y", y, x.dtype, n.channels);
  if (map.data) one.check("bias_map", map, accumulation_dtype(x.dtype), n.channels);
  check_optional(s.op, "statistics", statistics, 2 * n.samples * n.positions);
};

inline constexpr auto check_norm_backward =
    [](const Norm& n, const Tensor& gy, const Tensor& x, const Tensor& map, const void* statistics,
       const Tensor& gx, const Tensor& gmap, const void* grad_weight, const void* grad_bias,
       auto...) {
      check_norm_forward(n, x, map, gy, statistics);
      check_norm_forward(n, x, gmap, gx, statistics);
      check_vector("channel_norm", "statistics", statistics, 2 * n.samples * n.positions);
      check_vector("channel_norm", "grad_weight", grad_weight, n.channels);
      check_vector("channel_norm", "grad_bias", grad_bias, n.channels);
    };

inline void check(const Resample& r) {
  check_sizes("resample", {r.samples, r.channels, r.height, r.width});
  check_sizes("resample", {r.samples, r.channels, r.low_height, r.low_width});
  check_sizes("resample", {r.height, r.low_height}, 1);  // window() multiplies them
  check_sizes("resample", {r.width, r.low_width}, 1);
}

inline Shape high_shape(const Resample& r) {
  return {"resample", r.samples, r.height * r.width, r.channels_last};
}

inline void check_pair(const Resample& r, const Tensor& high, const Tensor& low) {
  const Shape low_shape{"resample", r.samples, r.low_height * r.low_width, r.channels_last};
  high_shape(r).check("x", high, high.dtype, r.channels);
  low_shape.check("low", low, high.dtype, r.channels);
}
inline constexpr auto check_pool_forward = [](const Resample& r, const Tensor& x, const Tensor& low,
                                              auto...) { check_pair(r, x, low); };
inline constexpr auto check_pool_backward = [](const Resample& r, const Tensor& grad_low,
                                               const Tensor& grad_x,
                                               auto...) { check_pair(r, grad_x, grad_low); };
inline constexpr auto check_upsample_forward = [](const Resample& r, const Tensor& x,
                                                  const Tensor& low, const Tensor& y, auto...) {
  check_pair(r, y, low);
  require(x.dtype == y.dtype || x.dtype == accumulation_dtype(y.dtype), "resample", "x",
          "be float32 or have the element type of the call");
  high_shape(r).check("x", x, x.dtype, r.channels);
};
inline constexpr auto check_upsample_backward = [](const Resample& r, const Tensor& grad_y,
                                                   const Tensor& grad_low,
                                                   auto...) { check_pair(r, grad_y, grad_low); };

inline constexpr auto check_square_sums =
    [](int64_t samples, int64_t channels, int64_t positions, bool channels_last, const Tensor& z,
       const void* per_position, const void* per_sample, auto...) {
      check_sizes("score", {samples, channels, positions});
      const Shape s{"score", samples, positions, channels_last};
      s.check("z", z, z.dtype, channels);
      check_optional("score", "per_position", per_position, samples * positions);
      check_optional("score", "per_sample", per_sample, samples);
    };

inline constexpr auto check_square_sums_scratch = [](int64_t samples, int64_t channels,
                                                     int64_t positions, auto...) {
  check_sizes("score", {samples, channels, positions});
};

inline void check_maps(int64_t samples, int64_t height, int64_t width,
                       const std::vector<Scale>& scales) {
  check_sizes("score", {samples, height, width});
  check_sizes("score", {height, width}, 1);
  require(!scales.empty(), "score", "maps", "be at least one");
  for (const Scale& scale : scales) {
    check_sizes("score", {samples, scale.height, scale.width});
    check_sizes("score", {scale.height, scale.width}, 1);
    require(scale.height * scale.width <= std::numeric_limits<int32_t>::max(), "score",
            "positions of a map", "be below 2^31");
    check_vector("score", "maps", scale.log_likelihood, samples * scale.height * scale.width);
  }
}

inline constexpr auto check_aggregate_scratch =
    [](DType, int64_t samples, int64_t height, int64_t width, const std::vector<Scale>& scales) {
      check_maps(samples, height, width, scales);
    };

inline constexpr auto check_mean_aggregate =
    [](DType, int64_t samples, int64_t height, int64_t width, const std::vector<Scale>& scales,
       const void* score, const void* anomaly_map, auto...) {
      check_maps(samples, height, width, scales);
      check_vector("score", "score", score, samples);
      check_vector("score", "anomaly_map", anomaly_map, samples * height * width);
    };

inline constexpr auto check_aggregate =
    [](DType type, int64_t samples, int64_t height, int64_t width, int64_t k,
       const std::vector<Scale>& scales, const void* score, const void* log_score,
       const void* nll_score, const void* anomaly_map, const void* image_map, auto...) {
      check_mean_aggregate(type, samples, height, width, scales, score, anomaly_map);
      require(k >= 1 && k <= height * width, "score", "k", "be a number of pixels");
      check_vector("score", "log_score", log_score, samples);
      check_vector("score", "nll_score", nll_score, samples);
      check_vector("score", "image_map", image_map, samples * height * width);
    };

inline constexpr auto check_ranking = [](DType, const void* scores, const uint8_t* ignored,
                                         int64_t size, const void* thresholds, int64_t count,
                                         int64_t, const int64_t* above, const int64_t* reached) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  require(size >= 0 && size <= limit, "ranking", "scores", "be fewer than 2^31");
  require(count >= 0 && count <= limit, "ranking", "thresholds", "be fewer than 2^31");
  check_vector("ranking", "scores", scores, size);
  check_vector("ranking", "ignored", ignored, size);
  check_vector("ranking", "thresholds", thresholds, count);
  check_vector("ranking", "above", above, count);
  check_vector("ranking", "reached", reached, count);
};

// For Winograd's convolution, and for the gradient of its weight.
template <class W>
void check_maps(const char* op, const W& w) {
  check_sizes(op, {w.samples, w.channels, w.height, w.width});
  check_sizes(op, {w.samples, w.out_channels, w.out_height, w.out_width});
  check_sizes(op, {w.channels, w.out_channels});
  check_sizes(op, {w.pad_top, w.pad_left});
  require(w.out_height == w.height + 2 * w.pad_top - 2 && w.out_height > 0, op, "out_height",
          "be height + 2 * padding - 2");
  require(w.out_width == w.width + 2 * w.pad_left - 2 && w.out_width > 0, op, "out_width",
          "be width + 2 * padding - 2");
}

inline void check(const Winograd& w) {
  check_maps("winograd", w);
  require(w.tile >= 2 && w.tile <= 4, "winograd", "tile", "be 2, 3 or 4");
  const bool half = w.factors == DType::bfloat16;
  require(w.factors == DType::float32 || (half && w.tile < 4), "winograd", "factors",
          "be float32, or bfloat16 in tiles of 2 or 3");
  const int64_t points = (w.tile + 2) * (w.tile + 2), panels = (w.out_channels + 31) / 32;
  check_vector("winograd", "weight", w.weight, points * panels * (w.channels / (half ? 2 : 1)));
  check_vector("winograd", "bias", w.bias, w.out_channels);
}

inline constexpr auto check_winograd = [](const Winograd& w, const Tensor& x, const Tensor& y) {
  const Shape from{"winograd", w.samples, w.height * w.width, true};
  const Shape to{"winograd", w.samples, w.out_height * w.out_width, true};
  const bool half = x.dtype == DType::bfloat16;
  require(half || (x.dtype == DType::float32 && w.factors == DType::float32), "winograd", "x",
          "be float32, or bfloat16 as bfloat16 factors are");
  from.check("x", x, x.dtype, w.channels);
  to.check("y", y, x.dtype, w.out_channels);
};

inline void check(const WinogradWeight& w) {
  const char* op = "winograd_weight";
  check_sizes(op, {w.out_channels, w.channels, w.points});
  check_sizes(op, {w.out_step, w.in_step});
  require(w.points == 16 || w.points == 25 || w.points == 36, op, "points", "be 16, 25 or 36");
  const bool half = w.factors == DType::bfloat16;
  require(half || w.factors == DType::float32, op, "factors", "be float32 or bfloat16");
  const int64_t panels = (w.out_channels + 31) / 32, words = (w.channels + half) / (1 + half);
  const bool empty = w.out_channels == 0 || w.channels == 0;
  const double last = double(w.out_channels - 1) * double(w.out_step) +
                      double(w.channels - 1) * double(w.in_step) + 9;
  const double bytes = empty ? 0 : last * sizeof(float);
  check_span(op, "kernel", reinterpret_cast<uintptr_t>(w.kernel), bytes);
  check_vector(op, "transform", w.transform, w.points * 9);
  check_optional(op, "correction", w.correction, w.points * w.points);
  check_vector(op, "values", w.values, w.points * panels * words * 32);
}

inline void check(const WinogradGradient& w) {
  check_maps("winograd_gradient", w);
  check_vector("winograd_gradient", "transform", w.transform, 36 * 9);
  check_vector("winograd_gradient", "kernel", w.kernel, w.out_channels * w.channels * 9);
}

inline constexpr auto check_winograd_gradient = [](const WinogradGradient& w, const Tensor& x,
                                                   const Tensor& grad) {
  const Shape from{"winograd_gradient", w.samples, w.height * w.width, true};
  const Shape to{"winograd_gradient", w.samples, w.out_height * w.out_width, true};
  require(x.dtype == DType::float32 || x.dtype == DType::bfloat16, "winograd_gradient", "x",
          "be float32 or bfloat16");
  from.check("x", x, x.dtype, w.channels);
  to.check("grad", grad, x.dtype, w.out_channels);
};

}  // namespace msflow
