// Every entry point of the compiled module. Addresses are integers, a tensor is None or (address,
// dtype, stride of n, c, p), and a map (N, height, width) is (address, height, width).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "checks.h"
#include "common/parallel.h"
#if defined(MSFLOW_EXT_CUDA)
#include "common/device.h"
#endif

namespace py = pybind11;

namespace pybind11::detail {
template <>
struct type_caster<msflow::DType> {
  PYBIND11_TYPE_CASTER(msflow::DType, const_name("int"));

  bool load(handle from, bool) {
    if (!isinstance<int_>(from)) return false;
    const auto number = from.cast<int>();
    value = msflow::DType(number);
    return number >= 0 && number <= int(msflow::DType::float16);
  }
};

template <>
struct type_caster<msflow::Tensor> {
  PYBIND11_TYPE_CASTER(msflow::Tensor, const_name("tuple[int, int, int, int, int] | None"));

  bool load(handle from, bool) {
    if (from.is_none()) return true;
    if (!isinstance<tuple>(from)) return false;
    const auto t = reinterpret_borrow<tuple>(from);
    if (t.size() != 5) return false;
    value.data = t[0].cast<uintptr_t>();
    value.dtype = t[1].cast<msflow::DType>();
    value.n = t[2].cast<int64_t>(), value.c = t[3].cast<int64_t>(), value.p = t[4].cast<int64_t>();
    return true;
  }
};

template <>
struct type_caster<msflow::Scale> {
  PYBIND11_TYPE_CASTER(msflow::Scale, const_name("tuple[int, int, int]"));

  bool load(handle from, bool) {
    if (!isinstance<tuple>(from)) return false;
    const auto t = reinterpret_borrow<tuple>(from);
    if (t.size() != 3) return false;
    value.log_likelihood = reinterpret_cast<const void*>(t[0].cast<uintptr_t>());
    value.height = t[1].cast<int64_t>(), value.width = t[2].cast<int64_t>();
    return true;
  }
};

// Refuses objects that have no value because their __init__ did not run: pybind11 would hand out
// uninitialised memory in its place.
template <class T>
struct initialised_caster : type_caster_base<T> {
  bool load(handle from, bool) {
    if (!isinstance<T>(from)) return false;
    if (!reinterpret_cast<instance*>(from.ptr())->get_value_and_holder().holder_constructed())
      throw type_error(std::string(str(type::handle_of(from).attr("__name__"))) +
                       ": an object whose __init__ did not run cannot be used");
    return type_caster_base<T>::load(from, false);
  }
};
template <>
struct type_caster<msflow::Coupling> : initialised_caster<msflow::Coupling> {};
template <>
struct type_caster<msflow::Norm> : initialised_caster<msflow::Norm> {};
template <>
struct type_caster<msflow::Resample> : initialised_caster<msflow::Resample> {};
template <>
struct type_caster<msflow::Winograd> : initialised_caster<msflow::Winograd> {};
template <>
struct type_caster<msflow::WinogradWeight> : initialised_caster<msflow::WinogradWeight> {};
template <>
struct type_caster<msflow::WinogradGradient> : initialised_caster<msflow::WinogradGradient> {};
}  // namespace pybind11::detail

namespace msflow {
namespace {

using Address = uintptr_t;

// The Python type of an argument of type T.
template <class T>
struct Argument {
  using From = T;
  static const T& of(const T& value) { return value; }
};
template <class T>
struct Argument<T*> {
  using From = Address;
  static T* of(Address address) { return reinterpret_cast<T*>(address); }
};
template <class T>
struct Argument<const T&> : Argument<T> {
  using From = const T&;
};

// Returns a function that checks the arguments and calls the kernel.
template <class Check, class Result, class... Arguments>
auto checked(Result (*kernel)(Arguments...), Check check) {
  return [=](typename Argument<Arguments>::From... from) {
    check(Argument<Arguments>::of(from)...);
    return kernel(Argument<Arguments>::of(from)...);
  };
}

// Returns the options of a call after checking them.
template <class T>
T checked(const T& options) {
  check(options);
  return options;
}

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

Coupling coupling(const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>& sizes,
                  bool channels_last, int form, double clamp, double limit, Address scale,
                  Address offset, Address perm) {
  const auto& [samples, conditioning, transformed, positions, split] = sizes;
  return checked(Coupling{samples, conditioning, transformed, positions, split, channels_last,
                          ClampForm(form), clamp, limit, pointer(scale), pointer(offset),
                          static_cast<const int64_t*>(pointer(perm))});
}

Norm norm(const std::tuple<int64_t, int64_t, int64_t>& sizes, bool channels_last, bool relu,
          double eps, Address weight, Address bias) {
  const auto& [samples, channels, positions] = sizes;
  return checked(
      Norm{samples, channels, positions, channels_last, relu, eps, pointer(weight), pointer(bias)});
}

Resample resample(const std::tuple<int64_t, int64_t>& sizes,
                  const std::tuple<int64_t, int64_t>& high, const std::tuple<int64_t, int64_t>& low,
                  bool channels_last) {
  const auto& [samples, channels] = sizes;
  const auto& [height, width] = high;
  const auto& [low_height, low_width] = low;
  return checked(Resample{samples, channels, height, width, low_height, low_width, channels_last});
}

Winograd winograd(const std::tuple<int64_t, int64_t, int64_t, int64_t>& input,
                  const std::tuple<int64_t, int64_t, int64_t>& output, int64_t tile,
                  const std::tuple<int64_t, int64_t>& padding, bool relu, DType factors,
                  Address weight, Address bias) {
  const auto& [samples, channels, height, width] = input;
  const auto& [out_channels, out_height, out_width] = output;
  const auto& [pad_top, pad_left] = padding;
  return checked(Winograd{samples, channels, height, width, out_channels, out_height, out_width,
                          tile, pad_top, pad_left, relu, factors, pointer(weight),
                          static_cast<const float*>(pointer(bias))});
}

WinogradWeight winograd_weight(const std::tuple<int64_t, int64_t, int64_t>& sizes, Address kernel,
                               const std::tuple<int64_t, int64_t>& steps, bool rotated,
                               DType factors, Address transform, Address correction,
                               Address values) {
  const auto& [out_channels, channels, points] = sizes;
  const auto& [out_step, in_step] = steps;
  return checked(WinogradWeight{out_channels, channels, points,
                                static_cast<const float*>(pointer(kernel)), out_step, in_step,
                                rotated, factors, static_cast<const float*>(pointer(transform)),
                                static_cast<const float*>(pointer(correction)), pointer(values)});
}

WinogradGradient winograd_gradient(const std::tuple<int64_t, int64_t, int64_t, int64_t>& input,
                                   const std::tuple<int64_t, int64_t, int64_t>& output,
                                   const std::tuple<int64_t, int64_t>& padding, Address transform,
                                   Address kernel) {
  const auto& [samples, channels, height, width] = input;
  const auto& [out_channels, out_height, out_width] = output;
  const auto& [pad_top, pad_left] = padding;
  return checked(WinogradGradient{
      samples, channels, height, width, out_channels, out_height, out_width, pad_top, pad_left,
      static_cast<const float*>(pointer(transform)), static_cast<float*>(pointer(kernel))});
}

// Adds a class whose objects are made by `make`. It can be neither derived from nor changed, and
// no object can be given another class, which would read one struct as another.
template <class T, class... Arguments>
void add_class(py::module_& m, const char* name, T (*make)(Arguments...)) {
  const py::object added = py::class_<T>(m, name, py::is_final()).def(py::init(make));
  reinterpret_cast<PyTypeObject*>(added.ptr())->tp_flags |= Py_TPFLAGS_IMMUTABLETYPE;
}

}  // namespace

PYBIND11_MODULE(kernels, m) {
  const py::call_guard<py::gil_scoped_release> nogil;
  const auto def = [&](const char* name, auto kernel, auto check) {
    m.def(name, checked(kernel, check), nogil);
  };
  add_class(m, "Coupling", &coupling);
  add_class(m, "Norm", &norm);
  add_class(m, "Resample", &resample);
  add_class(m, "Winograd", &winograd);
  add_class(m, "WinogradWeight", &winograd_weight);
  add_class(m, "WinogradGradient", &winograd_gradient);

  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const std::bad_alloc&) {
      PyErr_SetString(PyExc_MemoryError, "no memory for the intermediate results of a kernel");
    }
  });

  m.def("set_parallel_for",
        [](Address f) { torch_parallel_for = reinterpret_cast<ParallelFor>(f); });

  def("coupling_forward_cpu", &coupling_forward_cpu, check_coupling_forward);
  def("coupling_inverse_cpu", &coupling_inverse_cpu, check_coupling_inverse);
  def("coupling_backward_cpu", &coupling_backward_cpu, check_coupling_backward);
  def("coupling_likelihood_cpu", &coupling_likelihood_cpu, check_coupling_likelihood);
  def("norm_forward_cpu", &norm_forward_cpu, check_norm_forward);
  def("norm_backward_cpu", &norm_backward_cpu, check_norm_backward);
  def("pool_forward_cpu", &pool_forward_cpu, check_pool_forward);
  def("pool_backward_cpu", &pool_backward_cpu, check_pool_backward);
  def("upsample_forward_cpu", &upsample_forward_cpu, check_upsample_forward);
  def("upsample_backward_cpu", &upsample_backward_cpu, check_upsample_backward);
  def("square_sums_cpu", &square_sums_cpu, check_square_sums);
  def("aggregate_cpu", &aggregate_cpu, check_aggregate);
  def("mean_aggregate_cpu", &mean_aggregate_cpu, check_mean_aggregate);
  def("ranking_cpu", &ranking_cpu, check_ranking);
  def("winograd_cpu", &winograd_cpu, check_winograd);
  def("winograd_weight_cpu", &winograd_weight_cpu, [](const WinogradWeight&) {});
  def("winograd_gradient_cpu", &winograd_gradient_cpu, check_winograd_gradient);
  m.def("winograd_factors_cpu", [] {
    std::vector<int> numbers;
    for (DType type : winograd_factors_cpu()) numbers.push_back(int(type));
    return numbers;
  });

#if defined(MSFLOW_EXT_CUDA)
  // The last two arguments are scratch memory, with as many bytes as *_scratch returns, and a
  // stream of the current device.
  m.attr("cuda_architectures") = MSFLOW_EXT_CUDA;
  m.def("cuda_problem", &cuda_problem, nogil);
  m.def("coupling_scratch", &coupling_scratch);
  m.def("norm_scratch", &norm_scratch);
  def("square_sums_scratch", &square_sums_scratch, check_square_sums_scratch);
  def("aggregate_scratch", &aggregate_scratch, check_aggregate_scratch);
  def("coupling_forward_cuda", &coupling_forward_cuda, check_coupling_forward);
  def("coupling_inverse_cuda", &coupling_inverse_cuda, check_coupling_inverse);
  def("coupling_backward_cuda", &coupling_backward_cuda, check_coupling_backward);
  def("coupling_likelihood_cuda", &coupling_likelihood_cuda, check_coupling_likelihood);
  def("norm_forward_cuda", &norm_forward_cuda, check_norm_forward);
  def("norm_backward_cuda", &norm_backward_cuda, check_norm_backward);
  def("pool_forward_cuda", &pool_forward_cuda, check_pool_forward);
  def("pool_backward_cuda", &pool_backward_cuda, check_pool_backward);
  def("upsample_forward_cuda", &upsample_forward_cuda, check_upsample_forward);
  def("upsample_backward_cuda", &upsample_backward_cuda, check_upsample_backward);
  def("square_sums_cuda", &square_sums_cuda, check_square_sums);
  def("aggregate_cuda", &aggregate_cuda, check_aggregate);
  def("mean_aggregate_cuda", &mean_aggregate_cuda, check_mean_aggregate);
#endif
}

}  // namespace msflow

// Python's entry point. In another interpreter than the main one, pybind11 would wait for ever for
// the global lock, which this thread holds.
PyMODINIT_FUNC PyInit__C() {
  if (PyInterpreterState_Get() == PyInterpreterState_Main()) return msflow::PyInit_kernels();
  PyErr_SetString(PyExc_ImportError, "msflow_ext.ops._C works in Python's main interpreter only");
  return nullptr;
}
