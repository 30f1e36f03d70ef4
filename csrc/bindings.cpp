// Every entry point of the compiled module. A tensor comes as None or (address, dtype, stride of n,
// c, p).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/parallel.h"
#include "coupling/coupling.h"
#include "norm/norm.h"
#include "ranking/ranking.h"
#include "resample/resample.h"
#include "score/score.h"
#include "winograd/winograd.h"
#if defined(MSFLOW_EXT_CUDA)
#include "common/device.h"
#endif

namespace py = pybind11;

namespace pybind11::detail {
template <>
struct type_caster<msflow::Tensor> {
  PYBIND11_TYPE_CASTER(msflow::Tensor, const_name("tuple[int, int, int, int, int] | None"));

  bool load(handle from, bool) {
    if (from.is_none()) return true;
    if (!isinstance<tuple>(from)) return false;
    const auto t = reinterpret_borrow<tuple>(from);
    if (t.size() != 5) return false;
    value.data = t[0].cast<uintptr_t>();
    value.dtype = msflow::DType(t[1].cast<int>());
    value.n = t[2].cast<int64_t>(), value.c = t[3].cast<int64_t>(), value.p = t[4].cast<int64_t>();
    return true;
  }
};
}  // namespace pybind11::detail

namespace msflow {
namespace {

using Address = uintptr_t;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

Coupling coupling(const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>& sizes,
                  bool interleaved, int form, double clamp, double limit, Address scale,
                  Address offset, Address perm) {
  const auto& [samples, passive, active, positions, split] = sizes;
  return {samples, passive,        active,          positions,
          split,   interleaved,    ClampForm(form), clamp,
          limit,   pointer(scale), pointer(offset), static_cast<const int64_t*>(pointer(perm))};
}

Norm norm(const std::tuple<int64_t, int64_t, int64_t>& sizes, bool interleaved, bool relu,
          double eps, Address weight, Address bias) {
  const auto& [samples, channels, positions] = sizes;
  return {samples, channels, positions, interleaved, relu, eps, pointer(weight), pointer(bias)};
}

Resample resample(const std::tuple<int64_t, int64_t>& sizes,
                  const std::tuple<int64_t, int64_t>& high, const std::tuple<int64_t, int64_t>& low,
                  bool interleaved) {
  const auto& [samples, channels] = sizes;
  const auto& [height, width] = high;
  const auto& [low_height, low_width] = low;
  return {samples, channels, height, width, low_height, low_width, interleaved};
}

Winograd winograd(const std::tuple<int64_t, int64_t, int64_t, int64_t>& input,
                  const std::tuple<int64_t, int64_t, int64_t>& output, int64_t tile,
                  const std::tuple<int64_t, int64_t>& padding, bool relu, int product,
                  Address weight, Address bias) {
  const auto& [samples, channels, height, width] = input;
  const auto& [out_channels, out_height, out_width] = output;
  const auto& [pad_top, pad_left] = padding;
  return {samples,
          channels,
          height,
          width,
          out_channels,
          out_height,
          out_width,
          tile,
          pad_top,
          pad_left,
          relu,
          DType(product),
          pointer(weight),
          static_cast<const float*>(pointer(bias))};
}

// Dense maps (N, height, width): address, height, width of each.
using Maps = std::vector<std::tuple<Address, int64_t, int64_t>>;

std::vector<Scale> scales(const Maps& maps) {
  std::vector<Scale> all;
  for (const auto& [address, height, width] : maps)
    all.push_back({pointer(address), height, width});
  return all;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const py::call_guard<py::gil_scoped_release> nogil;
  py::class_<Coupling>(m, "Coupling").def(py::init(&coupling));
  py::class_<Norm>(m, "Norm").def(py::init(&norm));
  py::class_<Resample>(m, "Resample").def(py::init(&resample));
  py::class_<Winograd>(m, "Winograd").def(py::init(&winograd));

  m.def("set_parallel_for",
        [](Address f) { torch_parallel_for = reinterpret_cast<ParallelFor>(f); });

  m.def(
      "coupling_forward_cpu",
      [](const Coupling& c, Tensor x1, Tensor x2, Tensor a, Tensor y1, Tensor y2, Address log_det) {
        coupling_forward_cpu(c, x1, x2, a, y1, y2, pointer(log_det));
      },
      nogil);
  m.def(
      "coupling_inverse_cpu",
      [](const Coupling& c, Tensor y1, Tensor y2, Tensor a, Tensor x2, Address log_det) {
        coupling_inverse_cpu(c, y1, y2, a, x2, pointer(log_det));
      },
      nogil);
  m.def(
      "coupling_backward_cpu",
      [](const Coupling& c, Tensor gy1, Tensor gy2, Address grad_log_det, Tensor x1, Tensor x2,
         Tensor a, Tensor gx1, Tensor gx2, Tensor ga, Address grad_scale, Address grad_offset) {
        coupling_backward_cpu(c, gy1, gy2, pointer(grad_log_det), x1, x2, a, gx1, gx2, ga,
                              pointer(grad_scale), pointer(grad_offset));
      },
      nogil);
  m.def(
      "norm_forward_cpu",
      [](const Norm& n, Tensor x, Tensor map, Tensor y, Address statistics) {
        norm_forward_cpu(n, x, map, y, pointer(statistics));
      },
      nogil);
  m.def(
      "norm_backward_cpu",
      [](const Norm& n, Tensor gy, Tensor x, Tensor map, Address statistics, Tensor gx, Tensor gmap,
         Address grad_weight, Address grad_bias) {
        norm_backward_cpu(n, gy, x, map, pointer(statistics), gx, gmap, pointer(grad_weight),
                          pointer(grad_bias));
      },
      nogil);
  m.def("pool_forward_cpu", &pool_forward_cpu, nogil);
  m.def("pool_backward_cpu", &pool_backward_cpu, nogil);
  m.def("upsample_forward_cpu", &upsample_forward_cpu, nogil);
  m.def("upsample_backward_cpu", &upsample_backward_cpu, nogil);
  m.def(
      "square_sums_cpu",
      [](int64_t samples, int64_t channels, int64_t positions, bool interleaved, Tensor z,
         Address per_position, Address per_sample) {
        square_sums_cpu(samples, channels, positions, interleaved, z, pointer(per_position),
                        pointer(per_sample));
      },
      nogil);
  m.def(
      "aggregate_cpu",
      [](int dtype, int64_t samples, int64_t height, int64_t width, int64_t k, const Maps& maps,
         Address score, Address log_score, Address nll_score, Address anomaly_map,
         Address image_map) {
        return aggregate_cpu(DType(dtype), samples, height, width, k, scales(maps), pointer(score),
                             pointer(log_score), pointer(nll_score), pointer(anomaly_map),
                             pointer(image_map));
      },
      nogil);
  m.def(
      "mean_aggregate_cpu",
      [](int dtype, int64_t samples, int64_t height, int64_t width, const Maps& maps, Address score,
         Address anomaly_map) {
        return mean_aggregate_cpu(DType(dtype), samples, height, width, scales(maps),
                                  pointer(score), pointer(anomaly_map));
      },
      nogil);
  m.def(
      "ranking_cpu",
      [](int dtype, Address scores, Address ignored, int64_t size, Address thresholds,
         int64_t count, int64_t threads, Address above, Address reached) {
        ranking_cpu(DType(dtype), pointer(scores), static_cast<const uint8_t*>(pointer(ignored)),
                    size, pointer(thresholds), count, threads,
                    static_cast<int64_t*>(pointer(above)), static_cast<int64_t*>(pointer(reached)));
      },
      nogil);
  m.def("winograd_cpu", &winograd_cpu, nogil);
  m.def(
      "winograd_weight_cpu",
      [](int64_t out_channels, int64_t channels, int64_t points, Address kernel, int64_t out_step,
         int64_t in_step, bool turned, int factors, Address transform, Address correction,
         Address values) {
        winograd_weight_cpu({out_channels, channels, points,
                             static_cast<const float*>(pointer(kernel)), out_step, in_step, turned,
                             DType(factors), static_cast<const float*>(pointer(transform)),
                             static_cast<const float*>(pointer(correction)), pointer(values)});
      },
      nogil);
  m.def("winograd_factors_cpu", [] {
    std::vector<int> numbers;
    for (DType type : winograd_factors_cpu()) numbers.push_back(int(type));
    return numbers;
  });

#if defined(MSFLOW_EXT_CUDA)
  // The last two arguments are scratch memory, of as many bytes as *_scratch says, and a stream of
  // the current device.
  m.attr("cuda_architectures") = MSFLOW_EXT_CUDA;
  m.def("cuda_problem", &cuda_problem, nogil);
  m.def("coupling_scratch", [](const Coupling& c, int x, int a, bool backward) {
    return coupling_scratch(c, DType(x), DType(a), backward);
  });
  m.def(
      "coupling_forward_cuda",
      [](const Coupling& c, Tensor x1, Tensor x2, Tensor a, Tensor y1, Tensor y2, Address log_det,
         Address scratch, Address stream) {
        coupling_forward_cuda(c, x1, x2, a, y1, y2, pointer(log_det), pointer(scratch),
                              pointer(stream));
      },
      nogil);
  m.def(
      "coupling_inverse_cuda",
      [](const Coupling& c, Tensor y1, Tensor y2, Tensor a, Tensor x2, Address log_det,
         Address scratch, Address stream) {
        coupling_inverse_cuda(c, y1, y2, a, x2, pointer(log_det), pointer(scratch),
                              pointer(stream));
      },
      nogil);
  m.def(
      "coupling_backward_cuda",
      [](const Coupling& c, Tensor gy1, Tensor gy2, Address grad_log_det, Tensor x1, Tensor x2,
         Tensor a, Tensor gx1, Tensor gx2, Tensor ga, Address grad_scale, Address grad_offset,
         Address scratch, Address stream) {
        coupling_backward_cuda(c, gy1, gy2, pointer(grad_log_det), x1, x2, a, gx1, gx2, ga,
                               pointer(grad_scale), pointer(grad_offset), pointer(scratch),
                               pointer(stream));
      },
      nogil);
  m.def("norm_scratch",
        [](const Norm& n, int x, bool with_map) { return norm_scratch(n, DType(x), with_map); });
  m.def(
      "norm_forward_cuda",
      [](const Norm& n, Tensor x, Tensor map, Tensor y, Address statistics, Address scratch,
         Address stream) {
        norm_forward_cuda(n, x, map, y, pointer(statistics), pointer(scratch), pointer(stream));
      },
      nogil);
  m.def(
      "norm_backward_cuda",
      [](const Norm& n, Tensor gy, Tensor x, Tensor map, Address statistics, Tensor gx, Tensor gmap,
         Address grad_weight, Address grad_bias, Address scratch, Address stream) {
        norm_backward_cuda(n, gy, x, map, pointer(statistics), gx, gmap, pointer(grad_weight),
                           pointer(grad_bias), pointer(scratch), pointer(stream));
      },
      nogil);
  m.def(
      "pool_forward_cuda",
      [](const Resample& r, Tensor x, Tensor low, Address scratch, Address stream) {
        pool_forward_cuda(r, x, low, pointer(scratch), pointer(stream));
      },
      nogil);
  m.def(
      "pool_backward_cuda",
      [](const Resample& r, Tensor grad_low, Tensor grad_x, Address scratch, Address stream) {
        pool_backward_cuda(r, grad_low, grad_x, pointer(scratch), pointer(stream));
      },
      nogil);
  m.def(
      "upsample_forward_cuda",
      [](const Resample& r, Tensor x, Tensor low, Tensor y, Address scratch, Address stream) {
        upsample_forward_cuda(r, x, low, y, pointer(scratch), pointer(stream));
      },
      nogil);
  m.def(
      "upsample_backward_cuda",
      [](const Resample& r, Tensor grad_y, Tensor grad_low, Address scratch, Address stream) {
        upsample_backward_cuda(r, grad_y, grad_low, pointer(scratch), pointer(stream));
      },
      nogil);
  m.def("square_sums_scratch",
        [](int64_t samples, int64_t channels, int64_t positions, bool interleaved, int dtype) {
          return square_sums_scratch(samples, channels, positions, interleaved, DType(dtype));
        });
  m.def(
      "square_sums_cuda",
      [](int64_t samples, int64_t channels, int64_t positions, bool interleaved, Tensor z,
         Address per_position, Address per_sample, Address scratch, Address stream) {
        square_sums_cuda(samples, channels, positions, interleaved, z, pointer(per_position),
                         pointer(per_sample), pointer(scratch), pointer(stream));
      },
      nogil);
  m.def("aggregate_scratch",
        [](int dtype, int64_t samples, int64_t height, int64_t width, const Maps& maps) {
          return aggregate_scratch(DType(dtype), samples, height, width, scales(maps));
        });
  m.def(
      "aggregate_cuda",
      [](int dtype, int64_t samples, int64_t height, int64_t width, int64_t k, const Maps& maps,
         Address score, Address log_score, Address nll_score, Address anomaly_map,
         Address image_map, Address scratch, Address stream) {
        aggregate_cuda(DType(dtype), samples, height, width, k, scales(maps), pointer(score),
                       pointer(log_score), pointer(nll_score), pointer(anomaly_map),
                       pointer(image_map), pointer(scratch), pointer(stream));
      },
      nogil);
  m.def(
      "mean_aggregate_cuda",
      [](int dtype, int64_t samples, int64_t height, int64_t width, const Maps& maps, Address score,
         Address anomaly_map, Address scratch, Address stream) {
        mean_aggregate_cuda(DType(dtype), samples, height, width, scales(maps), pointer(score),
                            pointer(anomaly_map), pointer(scratch), pointer(stream));
      },
      nogil);
#endif
}

}  // namespace msflow
