// The operator batch_norm: which way a call goes, and its gradient.

#include "ops/inputs.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace bn::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

ThreeTensors batch_norm_forward(const Arguments& a) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("bn_ext::batch_norm_forward", "")
          .typed<ThreeTensors(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                              const OptionalTensor&, const OptionalTensor&, bool, std::optional<double>, double)>();
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(a.input, a.weight, a.bias, a.running_mean, a.running_var, a.num_batches_tracked, a.training,
                 a.momentum, a.eps);
}

ThreeTensors batch_norm_backward(const BackwardArguments& a) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("bn_ext::batch_norm_backward", "")
                             .typed<ThreeTensors(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                                 const Tensor&, bool, std::array<bool, 3>)>();
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(a.dy, a.input, a.weight, a.mean, a.invstd, a.training, a.output_mask);
}

bool has_tangent(const Tensor& t) {
  return t._fw_grad(/*level=*/0).defined();
}

class BatchNorm : public torch::autograd::Function<BatchNorm> {
 public:
  static constexpr bool is_traceable = true;

  // The three that can have gradients stand apart, where autograd finds them.
  static Tensor forward(AutogradContext* ctx,
                        const Tensor& input,
                        const OptionalTensor& weight,
                        const OptionalTensor& bias,
                        const Arguments& a) {
    const auto [output, mean, invstd] = batch_norm_forward(a);
    ctx->save_for_backward({input, weight.value_or(Tensor()), mean, invstd});
    ctx->saved_data["biased"] = bias.has_value();
    ctx->saved_data["training"] = a.training;
    ctx->saved_data["eps"] = a.eps;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const Tensor& dy = gradients[0];
    if (!dy.defined()) {
      return variable_list(4);
    }
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor weight = saved[1].defined() ? OptionalTensor(saved[1]) : std::nullopt;
    // Autograd numbers the tensors that are there.
    size_t edge = 0;
    std::array<bool, 3> wanted{};
    wanted[0] = ctx->needs_input_grad(edge++);
    wanted[1] = weight.has_value() && ctx->needs_input_grad(edge++);
    wanted[2] = ctx->saved_data["biased"].toBool() && ctx->needs_input_grad(edge++);
    const BackwardArguments a{dy, saved[0], weight, saved[2], saved[3], ctx->saved_data["training"].toBool(), wanted};
    // Whatever has to see through the gradient gets it by standard operators.
    const bool transformed =
        c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) || has_tangent(dy) ||
        has_tangent(a.input) || (weight.has_value() && has_tangent(*weight));
    const bool differentiable = at::GradMode::is_enabled() || transformed;
    const auto [dx, dweight, dbias] =
        differentiable ? decomposed_backward(a, ctx->saved_data["eps"].toDouble()) : batch_norm_backward(a);
    return {wanted[0] ? dx : Tensor(), wanted[1] ? dweight : Tensor(), wanted[2] ? dbias : Tensor(), Tensor()};
  }
};

bool any_of(const Arguments& a, bool (*property)(const Tensor&)) {
  return property(a.input) || (a.weight.has_value() && property(*a.weight)) ||
         (a.bias.has_value() && property(*a.bias));
}

bool requires_grad(const Tensor& t) {
  return t.requires_grad();
}

bool compiled_for_gpus() {
  static const bool compiled = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("bn_ext::batch_norm_forward", "")
                                   .hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  return compiled;
}

// Whether there are kernels for this; torch answers for what is not like that, with results or errors.
bool has_kernels(const Arguments& a) {
  const bool on_device = a.input.is_cpu() || a.input.is_meta() || (a.input.is_cuda() && compiled_for_gpus());
  return on_device && a.input.layout() == at::kStrided && a.input.dim() >= 2 &&
         (!a.num_batches_tracked.has_value() || a.num_batches_tracked->scalar_type() == at::kLong);
}

bool is_inference(const OptionalTensor& t) {
  return t.has_value() && t->is_inference();
}

// What autograd would object to too late, the statistics updated, or not at all.
void check_gradients(const Arguments& a, bool recorded) {
  for (const OptionalTensor* t : {&a.running_mean, &a.running_var}) {
    TORCH_CHECK(!at::GradMode::is_enabled() || !t->has_value() || !(*t)->requires_grad(),
                "batch_norm: running_mean and running_var cannot require gradients");
    TORCH_CHECK(!recorded || !a.training || !is_inference(*t),
                "Inplace update to inference tensor outside InferenceMode is not allowed: clone running_mean and "
                "running_var");
  }
  TORCH_CHECK(!recorded || !(a.input.is_inference() || is_inference(a.weight)),
              "Inference tensors cannot be saved for backward: clone input and weight");
}

Tensor batch_norm(const Tensor& input,
                  const OptionalTensor& weight,
                  const OptionalTensor& bias,
                  const OptionalTensor& running_mean,
                  const OptionalTensor& running_var,
                  const OptionalTensor& num_batches_tracked,
                  bool training,
                  std::optional<double> momentum,
                  double eps) {
  const Arguments a{input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps};
  TORCH_CHECK_TYPE(input.defined(), "batch_norm(): argument 'input' must be Tensor, not NoneType");
  if (!has_kernels(a) || any_of(a, has_tangent)) {
    return decomposed(a);
  }
  check_inputs(a);  // here too: fake kernels do not
  const bool recorded = at::GradMode::is_enabled() && any_of(a, requires_grad);
  check_gradients(a, recorded);
  return recorded ? BatchNorm::apply(input, weight, bias, a) : std::get<0>(batch_norm_forward(a));
}

// Under functorch's transforms, which the C++ autograd function does not know.
Tensor batch_norm_transformed(const Tensor& input,
                              const OptionalTensor& weight,
                              const OptionalTensor& bias,
                              const OptionalTensor& running_mean,
                              const OptionalTensor& running_var,
                              const OptionalTensor& num_batches_tracked,
                              bool training,
                              std::optional<double> momentum,
                              double eps) {
  return decomposed({input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps});
}

}  // namespace

TORCH_LIBRARY_IMPL(bn_ext, CompositeImplicitAutograd, m) {
  m.impl("batch_norm", batch_norm);
}

TORCH_LIBRARY_IMPL(bn_ext, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("batch_norm", batch_norm_transformed);
}

}  // namespace bn::ops
