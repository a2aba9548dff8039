// The operators below batch_norm without data, for meta tensors and fake tensors: their checks, and results of the
// sizes, types and strides that real ones have.

#include "python/fakes.h"

#include "ops/fused.h"
#include "ops/stages.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

namespace {

namespace py = pybind11;
using bn::ops::Fake;
using bn::ops::OptionalTensor;

// An argument of an operator from Python, where None is a tensor that is not there. The last ones may be left out.
template <class T>
std::decay_t<T> taken(const py::args& given, size_t i) {
  const py::object value = i < given.size() ? py::object(given[i]) : py::none();
  if constexpr (std::is_same_v<T, const at::Tensor&>) {
    return value.cast<OptionalTensor>().value_or(at::Tensor());
  } else {
    return value.cast<std::decay_t<T>>();
  }
}

// A function of an operator for Python, which gets torch's exceptions.
template <class Result, class... Args>
auto callable(Result (*function)(Args...)) {
  return torch::wrap_pybind_function([function](const py::args& given) {
    return [&]<size_t... i>(std::index_sequence<i...>) {
      return function(taken<Args>(given, i)...);
    }(std::index_sequence_for<Args...>());
  });
}

}  // namespace

void define_fakes(py::module_& m) {
  py::dict fakes;
  const auto add = [&](const char* name, auto function) { fakes[name] = py::cpp_function(callable(function)); };
  add("batch_norm_forward", bn::ops::batch_norm_forward<Fake>);
  add("batch_norm_forward.evaluation", bn::ops::batch_norm_forward_evaluation<Fake>);
  add("batch_norm_backward", bn::ops::batch_norm_backward<Fake>);
  add("batch_norm_stats", bn::ops::batch_norm_stats<Fake>);
  add("batch_norm_merge_stats", bn::ops::batch_norm_merge_stats<Fake>);
  add("batch_norm_elemt", bn::ops::batch_norm_elemt<Fake>);
  add("batch_norm_backward_reduce", bn::ops::batch_norm_backward_reduce<Fake>);
  add("batch_norm_backward_elemt", bn::ops::batch_norm_backward_elemt<Fake>);
  m.attr("fakes") = fakes;
  m.def("empty_output", torch::wrap_pybind_function(bn::ops::empty_output), py::arg("input"));
}
