#pragma once

#include "core/activation.h"
#include "core/problem.h"

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <array>
#include <atomic>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

// The operators as C++ values and functions, and what their implementations share. One file per dispatch
// key implements them.
namespace bn::ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// set_size of the schemas: the images of a statistic set, the last of which may have fewer; none: one set has all.
using SetSize = std::optional<int64_t>;

// No tensor has more images; a double holds this number.
constexpr int64_t kMostImages = int64_t{1} << 53;

// activation and activation_param of batch_norm's schema.
using Name = std::optional<std::string_view>;
using Param = std::optional<double>;

// The arguments of batch_norm, in the order of its schema. batch_norm_forward has with_branches besides, and no
// training.
struct Arguments {
  const Tensor& input;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& running_mean;
  const OptionalTensor& running_var;
  const OptionalTensor& num_batches_tracked;
  bool training;
  std::optional<double> momentum;
  double eps;
  const OptionalTensor& residual;
  Activation activation;
  SetSize set_size;
  const OptionalTensor& mask;
};

// The arguments of batch_norm_backward.
struct BackwardArguments {
  const Tensor& dy;
  const OptionalTensor& input;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const Tensor& mean;
  const Tensor& invstd;
  bool training;
  const OptionalTensor& residual;
  const OptionalTensor& branches;
  Activation activation;
  SetSize set_size;
  std::array<bool, 4> output_mask;
  const OptionalTensor& mask;

  // Has the sizes, the dtype and the layout of the input: without an input dy has them.
  const Tensor& like() const { return input.has_value() ? *input : dy; }
};

// The arguments of batch_norm_merge_stats.
struct MergeArguments {
  const Tensor& counts;
  const Tensor& means;
  const Tensor& m2s;
  const OptionalTensor& running_mean;
  const OptionalTensor& running_var;
  const OptionalTensor& num_batches_tracked;
  std::optional<double> momentum;
  double eps;
};

// Whether a backward needs the input: for the statistics, for dweight, and for z where no bit tells its branch.
inline bool needs_input(bool training, bool wants_dweight, const Activation& activation, bool branches) {
  return training || wants_dweight || (activation.kind != ActivationKind::Identity && !branches);
}

// Throws ValueError for a name that is none, or a parameter that the activation does not take.
Activation activation_of(const Name& name, const Param& param);

// The activation of the operators below batch_norm, which take the place of its entry in kActivations. Throws
// ValueError for a number that is no such place.
Activation numbered_activation(int64_t number, double param);

const char* name_of(const Activation& activation);

// The names, each with its parameter unless given, if it has one.
std::vector<std::pair<std::string, Param>> activations();

// Whether a transform of torch.func is under way.
inline bool in_functorch() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Whether forward-mode AD differentiates by a tensor.
inline bool has_tangent(const Tensor& t) {
  return t._fw_grad(/*level=*/0).defined();
}

// Whether a property holds of a tensor that can have a gradient.
inline bool any_of(const Arguments& a, bool (*property)(const Tensor&)) {
  const auto has = [&](const OptionalTensor& t) { return t.has_value() && property(*t); };
  return property(a.input) || has(a.weight) || has(a.bias) || has(a.residual);
}

// Told of each call that torch's own operators answer, or finish: its input, a verb for what they do, and the reason.
// Null unless someone asks.
using FallbackObserver = void (*)(const Tensor& input, const char* how, const char* reason);
inline std::atomic<FallbackObserver> fallback_observer = nullptr;

// batch_norm by standard operators: for transforms that have to see through it, for devices without kernels. `kernels`,
// if given, normalizes: a call without residual and activation, which gets copies of the running statistics to write.
Tensor decomposed(const Arguments& a, const char* reason, Tensor (*kernels)(const Arguments&) = nullptr);

// batch_norm_backward by standard operators, which can be differentiated again. `layout`, the input's, is the order of
// branch bits.
FourTensors decomposed_backward(const BackwardArguments& a, double eps, Layout layout, const char* reason);

}  // namespace bn::ops
