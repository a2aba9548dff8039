// The operator batch_norm: which way a call goes, and its gradient; what a mask is.

#include "core/pass.h"
#include "ops/fused.h"
#include "ops/output_observer.h"

#include <ATen/OpMathType.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/core/SymBool.h>
#include <c10/util/ScopeExit.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace bn::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// An operator below autograd; it has the signature of a function of fused.h.
template <class Signature>
auto operator_of(const char* name, const char* overload) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

FourTensors call_forward(const Arguments& a, bool with_branches) {
  static const auto training = operator_of<decltype(batch_norm_forward<void>)>("bn_ext::batch_norm_forward", "");
  static const auto evaluation =
      operator_of<decltype(batch_norm_forward_evaluation<void>)>("bn_ext::batch_norm_forward", "evaluation");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto number = static_cast<int64_t>(a.activation.kind);
  return a.training ? training.call(a.input, a.weight, a.bias, a.running_mean, a.running_var, a.num_batches_tracked,
                                    a.momentum, a.eps, a.residual, number, a.activation.param, a.set_size,
                                    with_branches, a.mask)
                    : evaluation.call(a.input, a.weight, a.bias, a.running_mean.value_or(Tensor()),
                                      a.running_var.value_or(Tensor()), a.eps, a.residual, number, a.activation.param,
                                      with_branches, a.mask);
}

FourTensors call_backward(const BackwardArguments& a, Layout layout) {
  static const auto op = operator_of<decltype(batch_norm_backward<void>)>("bn_ext::batch_norm_backward", "");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(a.input.has_value() ? a.dy : laid_out(a.dy, layout), a.input, a.weight, a.bias, a.mean, a.invstd,
                 a.training, a.residual, a.branches, static_cast<int64_t>(a.activation.kind), a.activation.param,
                 a.set_size, a.output_mask, a.mask);
}

// The tensors of the input's size, or bits of them, that autograd keeps because the backward reads them; and whether
// the backward computes z again.
struct Kept {
  bool input;
  bool residual;
  bool branches;
  bool z;  // is computed again, for which the bias is kept
};

Kept kept(const Arguments& a) {
  const bool wants_dweight = a.weight.has_value() && a.weight->requires_grad();
  const bool frozen = !a.training && !wants_dweight;
  const Chain chain = backward_chain(a.activation.kind, a.residual.has_value(), frozen);
  return {needs_input(a.training, wants_dweight, a.activation, chain.branches), chain.residual, chain.branches,
          a.activation.kind != ActivationKind::Identity && !chain.branches};
}

// What a backward has to know besides tensors. Autograd keeps values by name, in a table that small calls would feel:
// all of this is one.
struct Call {
  bool has_bias;
  bool has_residual;
  bool training;
  Layout layout;
  double eps;
  Activation activation;
  SetSize set_size;

  std::vector<double> packed() const {
    return {double(has_bias),
            double(has_residual),
            double(training),
            double(layout),
            eps,
            double(activation.kind),
            activation.param,
            double(std::min(set_size.value_or(0), kMostImages))};
  }
  static Call unpacked(const std::vector<double>& v) {
    return {v[0] != 0,
            v[1] != 0,
            v[2] != 0,
            static_cast<Layout>(v[3]),
            v[4],
            {static_cast<ActivationKind>(v[5]), v[6]},
            v[7] != 0 ? SetSize(v[7]) : std::nullopt};
  }
};

// Whether autograd saves tensors without the hooks that are there, as it does while a compiler traces.
bool passes_hooks_by() {
  return at::SavedTensorDefaultHooks::get_tls_state().is_tracing;
}

class BatchNorm : public torch::autograd::Function<BatchNorm> {
 public:
  static constexpr bool is_traceable = true;

  // Those that can have gradients stand apart, where autograd finds them.
  static Tensor forward(AutogradContext* ctx,
                        const Tensor& input,
                        const OptionalTensor& weight,
                        const OptionalTensor& bias,
                        const OptionalTensor& residual,
                        const Arguments& a) {
    const Kept keep = kept(a);
    const auto [output, mean, invstd, branches] = call_forward(a, keep.branches);
    if (const OutputObserver& observe = output_observer(); keep.input && observe && !passes_hooks_by()) {
      at::SavedTensorDefaultHooks::set_tracing(observe(output, mean, invstd, a, keep.residual));
    }
    const Layout layout = output.is_contiguous() ? Layout::Planar : Layout::Interleaved;
    ctx->save_for_backward({keep.input ? input : Tensor(), weight.value_or(Tensor()),
                            keep.z ? bias.value_or(Tensor()) : Tensor(), mean, invstd,
                            keep.residual ? *residual : Tensor(), branches, a.mask.value_or(Tensor())});
    ctx->saved_data["call"] =
        Call{bias.has_value(), residual.has_value(), a.training, layout, a.eps, a.activation, a.set_size}.packed();
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const Tensor& dy = gradients[0];
    if (!dy.defined()) {
      return variable_list(5);
    }
    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [&](size_t i) { return saved[i].defined() ? OptionalTensor(saved[i]) : std::nullopt; };
    const OptionalTensor input = optional(0), weight = optional(1), bias = optional(2), residual = optional(5),
                         branches = optional(6), mask = optional(7);
    const auto [has_bias, has_residual, training, layout, eps, activation, set_size] =
        Call::unpacked(ctx->saved_data["call"].toDoubleVector());
    // Autograd numbers the tensors that are there.
    size_t edge = 0;
    const auto wants = [&](bool there) { return there && ctx->needs_input_grad(edge++); };
    const bool wants_dx = wants(true);
    const bool wants_dweight = wants(weight.has_value());
    const bool wants_dbias = wants(has_bias);
    const bool wants_dresidual = wants(has_residual);
    const bool passes_on = dresidual_is_dy(activation.kind, mask.has_value());
    const BackwardArguments a{
        dy,       input,      weight,   bias,
        saved[3], saved[4],   training, residual,
        branches, activation, set_size, {wants_dx, wants_dweight, wants_dbias, wants_dresidual && !passes_on},
        mask};
    // Whatever has to see through the gradient gets it by standard operators.
    const auto tangent = [](const OptionalTensor& t) { return t.has_value() && has_tangent(*t); };
    const bool transformed =
        in_functorch() || has_tangent(dy) || tangent(input) || tangent(weight) || tangent(bias) || tangent(residual);
    const char* reason = transformed ? "a transform of torch.func or forward-mode AD differentiates its gradient"
                         : at::GradMode::is_enabled() ? "its gradient may be differentiated again"
                                                      : nullptr;
    const auto [dx, dweight, dbias, dresidual] =
        reason == nullptr ? call_backward(a, layout) : decomposed_backward(a, eps, layout, reason);
    return {dx, dweight, dbias, wants_dresidual && passes_on ? dy : dresidual, Tensor()};
  }
};

bool requires_grad(const Tensor& t) {
  return t.requires_grad();
}

bool compiled_for_gpus() {
  static const bool compiled = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("bn_ext::batch_norm_forward", "")
                                   .hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  return compiled;
}

// Whether a residual is one that kernels add: elsewhere torch's rules of broadcasting and promotion hold.
bool is_like(const Tensor& residual, const Tensor& input) {
  if (residual.dim() != input.dim() || residual.scalar_type() != input.scalar_type() ||
      residual.device() != input.device() || residual.layout() != at::kStrided) {
    return false;
  }
  for (int64_t d = 0; d < input.dim(); ++d) {
    if (!TORCH_GUARD_OR_FALSE(residual.sym_size(d).sym_eq(input.sym_size(d)))) {
      return false;
    }
  }
  return true;
}

bool is_inference(const OptionalTensor& t) {
  return t.has_value() && t->is_inference();
}

// Autograd saves no tensor that was made in inference mode. Of separate calls the activation saves its own input, and
// the addition nothing, so that only a normalization with gradients has to refuse.
bool saves_inference(const Arguments& a) {
  const Kept keep = kept(a);
  return (keep.input && a.input.is_inference()) || is_inference(a.weight) || (keep.z && is_inference(a.bias)) ||
         (keep.residual && is_inference(a.residual));
}

// Why torch's own operators answer a call, with a result or an error; null if kernels normalize.
const char* obstacle(const Arguments& a) {
  const bool on_device = a.input.is_cpu() || a.input.is_meta() || (a.input.is_cuda() && compiled_for_gpus());
  if (!on_device) {
    return "there are no kernels for this device";
  }
  if (a.input.layout() != at::kStrided) {
    return "the input is not strided";
  }
  if (a.input.is_quantized()) {
    return "the input is quantized";  // to be refused with torch's error
  }
  if (a.input.dim() < 2) {
    return "the input has fewer than two dimensions";
  }
  if (any_of(a, has_tangent)) {
    return "an input has a tangent of forward-mode AD";
  }
  return nullptr;
}

// Why kernels normalize, and torch's own operators do the rest; null if kernels do all.
const char* obstacle_behind(const Arguments& a, bool recorded) {
  if (a.num_batches_tracked.has_value() && a.num_batches_tracked->scalar_type() != at::kLong) {
    return "the counter of batches is not int64";
  }
  if (a.residual.has_value() && !is_like(*a.residual, a.input)) {
    return "the residual differs from the input in sizes, dtype, device or layout";
  }
  if (recorded && saves_inference(a)) {
    return "autograd saves no tensor that was made in inference mode";
  }
  return nullptr;
}

void check_saved(const Arguments& a) {
  const auto wants = [](const OptionalTensor& t) { return t.has_value() && t->requires_grad(); };
  const bool normalization = a.input.requires_grad() || wants(a.weight) || wants(a.bias);
  TORCH_CHECK(!normalization || !(a.input.is_inference() || is_inference(a.weight)),
              "Inference tensors cannot be saved for backward: clone input and weight");
}

bool is_recorded(const Arguments& a) {
  return at::GradMode::is_enabled() && any_of(a, requires_grad);
}

Tensor by_kernels(const Arguments& a) {
  if (!is_recorded(a)) {
    return std::get<0>(call_forward(a, /*with_branches=*/false));
  }
  // An observer may have hooks passed by while the call's tensors are saved.
  const auto restore =
      c10::make_scope_exit([before = passes_hooks_by()] { at::SavedTensorDefaultHooks::set_tracing(before); });
  return BatchNorm::apply(a.input, a.weight, a.bias, a.residual, a);
}

Tensor batch_norm(const Arguments& a) {
  TORCH_CHECK_TYPE(a.input.defined(), "batch_norm(): argument 'input' must be Tensor, not NoneType");
  const bool recorded = is_recorded(a);
  if (recorded) {
    check_saved(a);
  }
  if (const char* reason = obstacle(a)) {
    return decomposed(a, reason);
  }
  if (const char* reason = obstacle_behind(a, recorded)) {
    return decomposed(a, reason, by_kernels);
  }
  check_running_statistics(a, recorded);  // the operators below check the rest
  return by_kernels(a);
}

// Under functorch's transforms, which the C++ autograd function does not know.
Tensor transformed(const Arguments& a) {
  return decomposed(a, "a transform of torch.func has to see through it");
}

// How much each value counts: what is not positive does not.
Tensor batch_norm_mask(const Tensor& input, const Tensor& mask, bool relative) {
  check_mask(input, mask);
  const auto type = at::toOpMathType(input.scalar_type());
  if (mask.scalar_type() == at::kBool || TORCH_GUARD_OR_FALSE(mask.sym_numel().sym_eq(0))) {
    return mask.to(type).contiguous();
  }
  const Tensor weights = mask.to(at::kDouble);
  const Tensor positive = at::where(weights > 0, weights, at::zeros({}, weights.options()));
  if (!relative) {
    return positive.to(type).contiguous();
  }
  const Tensor largest = positive.amax();
  return at::where(largest > 0, positive / largest, positive).to(type).contiguous();
}

// To batch_norm only the ratios of weights matter. The largest is 1, so that neither squares of weights nor gradients
// over their sum leave the range of the type.
OptionalTensor weights_of(const OptionalTensor& mask, const Tensor& input) {
  return mask.has_value() ? OptionalTensor(batch_norm_mask(input, *mask, /*relative=*/true)) : std::nullopt;
}

// A function as the dispatcher calls it.
template <Tensor (*function)(const Arguments&)>
Tensor with_arguments(const Tensor& input,
                      const OptionalTensor& weight,
                      const OptionalTensor& bias,
                      const OptionalTensor& running_mean,
                      const OptionalTensor& running_var,
                      const OptionalTensor& num_batches_tracked,
                      bool training,
                      std::optional<double> momentum,
                      double eps,
                      const OptionalTensor& residual,
                      Name activation,
                      Param activation_param,
                      SetSize set_size,
                      const OptionalTensor& mask) {
  check_set_size("batch_norm", set_size);
  // Of one dimension; autograd gives the gradients the parameters' shapes.
  const auto flat = [](const OptionalTensor& t, OptionalTensor& made) -> const OptionalTensor& {
    return !t.has_value() || t->dim() == 1 ? t : made = t->reshape(-1);
  };
  OptionalTensor flat_weight, flat_bias;
  const OptionalTensor weights = weights_of(mask, input);
  return function({input, flat(weight, flat_weight), flat(bias, flat_bias), running_mean, running_var,
                   num_batches_tracked, training, momentum, eps, residual, activation_of(activation, activation_param),
                   training ? set_size : std::nullopt, weights});
}

}  // namespace

TORCH_LIBRARY_IMPL(bn_ext, CompositeImplicitAutograd, m) {
  m.impl("batch_norm", with_arguments<batch_norm>);
  m.impl("batch_norm_mask", batch_norm_mask);
}

TORCH_LIBRARY_IMPL(bn_ext, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("batch_norm", with_arguments<transformed>);
}

}  // namespace bn::ops
