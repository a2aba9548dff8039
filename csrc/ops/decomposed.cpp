#include "ops/inputs.h"

#include <ATen/Context.h>
#include <ATen/ExpandUtils.h>
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/hardsigmoid.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardswish_backward.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/relu6.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/SymBool.h>

namespace bn::ops {
namespace {

OptionalTensor to(const OptionalTensor& t, at::ScalarType type) {
  return t.has_value() ? OptionalTensor(t->to(type)) : std::nullopt;
}

// torch takes parameters and statistics either all of the input's type or all float.
bool types_suit_torch(const Arguments& a) {
  std::optional<at::ScalarType> common;
  for (const OptionalTensor* t : {&a.weight, &a.bias, &a.running_mean, &a.running_var}) {
    if (t->has_value()) {
      if (common.has_value() && *common != (*t)->scalar_type()) {
        return false;
      }
      common = (*t)->scalar_type();
    }
  }
  return true;
}

// A copy of a value per channel, with one dimension: torch's backward ignores the strides of what it reads per channel,
// and refuses running statistics that were written to since.
OptionalTensor copied(const OptionalTensor& t) {
  return t.has_value() ? OptionalTensor(t->reshape(-1).clone(at::MemoryFormat::Contiguous)) : std::nullopt;
}

Tensor call_torch(const Tensor& input,
                  const OptionalTensor& weight,
                  const OptionalTensor& bias,
                  const OptionalTensor& mean,
                  const OptionalTensor& var,
                  const Arguments& a,
                  double momentum) {
  const auto dense = [](const OptionalTensor& t) { return t.has_value() ? OptionalTensor(t->contiguous()) : t; };
  return at::batch_norm(input, dense(weight), dense(bias), mean, var, a.training, momentum, a.eps,
                        at::globalContext().userEnabledCuDNN());
}

// The normalized input, and the running statistics that are to be written.
struct Normalized {
  Tensor output;
  OptionalTensor running_mean = std::nullopt;
  OptionalTensor running_var = std::nullopt;
};

// Everything in the accumulation type, the running statistics moved by `momentum` towards the batch's own.
Normalized converted(const Arguments& a, const Tensor& momentum) {
  const auto type = at::toOpMathType(a.input.scalar_type());
  const Tensor input = a.input.to(type);
  const auto weight = to(a.weight, type);
  const auto bias = to(a.bias, type);
  if (!a.training) {
    const auto mean = copied(to(a.running_mean, type));
    const auto var = copied(to(a.running_var, type));
    return {call_torch(input, weight, bias, mean, var, a, 0).to(a.input.scalar_type())};
  }
  // With momentum 1 torch writes the batch's own statistics, if the batch has any values.
  const auto options = a.input.options().dtype(type);
  const Tensor mean = at::zeros_symint({a.input.sym_size(1)}, options);
  const Tensor var = at::zeros_symint({a.input.sym_size(1)}, options);
  const Tensor output = call_torch(input, weight, bias, mean, var, a, 1).to(a.input.scalar_type());
  const bool empty = TORCH_GUARD_OR_FALSE(a.input.sym_numel().sym_eq(0));
  const auto moved = [&](const OptionalTensor& running, const Tensor& observed) {
    return running.has_value() && !empty
               ? OptionalTensor(running->to(type).lerp(observed.view_as(*running), momentum.to(type)))
               : std::nullopt;
  };
  return {output, moved(a.running_mean, mean), moved(a.running_var, var)};
}

Normalized by_torch(const Arguments& a, double momentum) {
  if (!types_suit_torch(a)) {
    return converted(a, at::zeros({}, a.input.options().dtype(at::kDouble)).add(momentum));
  }
  if (a.training && in_functorch()) {  // where only torch's own batch norm may write to captured statistics
    const auto flat = [](const OptionalTensor& t) { return t.has_value() ? OptionalTensor(t->view(-1)) : t; };
    return {call_torch(a.input, a.weight, a.bias, flat(a.running_mean), flat(a.running_var), a, momentum)};
  }
  const auto mean = copied(a.running_mean);
  const auto var = copied(a.running_var);
  const Tensor output = call_torch(a.input, a.weight, a.bias, mean, var, a, momentum);
  return a.training ? Normalized{output, mean, var} : Normalized{output};
}

// The activation of z.
Tensor activated(const Tensor& z, const Activation& activation) {
  switch (activation.kind) {
    case ActivationKind::ReLU:
      return at::relu(z);
    case ActivationKind::ReLU6:
      return at::relu6(z);
    case ActivationKind::LeakyReLU:
      return at::leaky_relu(z, activation.param);
    case ActivationKind::ELU:
      return at::elu(z, activation.param);
    case ActivationKind::SiLU:
      return at::silu(z);
    case ActivationKind::GELU:
      return at::gelu(z);
    case ActivationKind::Hardswish:
      return at::hardswish(z);
    case ActivationKind::Hardsigmoid:
      return at::hardsigmoid(z);
    case ActivationKind::Sigmoid:
      return at::sigmoid(z);
    case ActivationKind::Tanh:
      return at::tanh(z);
    default:
      return z;
  }
}

// The gradient of z.
Tensor behind(const Tensor& dy, const Tensor& z, const Activation& activation) {
  switch (activation.kind) {
    case ActivationKind::ReLU:
      return at::threshold_backward(dy, z, 0);
    case ActivationKind::ReLU6:
      return at::hardtanh_backward(dy, z, 0, 6);
    case ActivationKind::LeakyReLU:
      return at::leaky_relu_backward(dy, z, activation.param, /*self_is_result=*/false);
    case ActivationKind::ELU:
      return at::elu_backward(dy, activation.param, /*scale=*/1, /*input_scale=*/1, /*is_result=*/false, z);
    case ActivationKind::SiLU: {  // torch's own operator cannot be differentiated
      const Tensor s = at::sigmoid(z);
      return dy * (s * (1 + z * (1 - s)));
    }
    case ActivationKind::GELU:
      return at::gelu_backward(dy, z);
    case ActivationKind::Hardswish:
      return at::hardswish_backward(dy, z);
    case ActivationKind::Hardsigmoid:
      return at::where((z > -3).logical_and(z < 3), dy / 6, at::zeros_like(dy));  // as above
    case ActivationKind::Sigmoid:
      return at::sigmoid_backward(dy, at::sigmoid(z));
    case ActivationKind::Tanh:
      return at::tanh_backward(dy, at::tanh(z));
    default:
      return dy;
  }
}

// Some z on the branch of each element.
Tensor on_branches(const Tensor& mask, const Tensor& input, const Activation& activation, at::ScalarType type) {
  const View x = view_as_problem(input);
  const Tensor bit = at::arange(8, mask.options());
  Tensor bits = mask.unsqueeze(1).bitwise_right_shift(bit).bitwise_and(1).flatten().slice(0, 0, input.numel());
  bits = bits.as_strided(x.tensor.sizes(), x.tensor.strides()).to(at::kBool);
  const auto z = [&](double value) { return at::scalar_tensor(value, input.options().dtype(type)); };
  switch (activation.kind) {
    case ActivationKind::LeakyReLU:
      return at::where(bits, z(1), z(-1));
    case ActivationKind::Hardsigmoid:
      return at::where(bits, z(0), z(-4));
    default:
      return at::where(bits, z(-1), z(1));
  }
}

// Whether torch can add the residual, before it has normalized anything.
void check_addition(const Tensor& input, const Tensor& residual) {
  try {
    at::infer_size_symint(input.sym_sizes(), residual.sym_sizes());
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, "batch_norm: residual of sizes ", residual.sym_sizes(), " for an input of sizes ",
                input.sym_sizes(), ": ", error.what_without_backtrace());
  }
  TORCH_CHECK(residual.device() == input.device() || residual.dim() == 0, "batch_norm: residual is on ",
              residual.device(), " but input is on ", input.device());
  TORCH_CHECK(!residual.is_complex(), "batch_norm: residual is of type ", residual.scalar_type());
}

void tell(const Tensor& input, const char* reason) {
  if (const FallbackObserver observer = fallback_observer) {
    observer(input, reason);
  }
}

}  // namespace

Tensor decomposed(const Arguments& a, const char* reason) {
  if (a.input.dim() >= 2 || a.input.sym_numel() != 0) {  // torch normalizes nothing, sizes (0,), to nothing
    check_inputs(a);
  }
  if (a.residual.has_value()) {
    check_addition(a.input, *a.residual);
  }
  check_running_statistics(a, /*tracked=*/!in_functorch());
  tell(a.input, reason);  // before anything is written: it may throw
  const bool counts = a.training && a.num_batches_tracked.has_value();
  const bool cumulative = counts && !a.momentum.has_value();
  const Tensor factor = cumulative ? a.num_batches_tracked->add(1).to(at::kDouble).reciprocal() : Tensor();
  if (counts && in_functorch()) {  // functorch refuses a captured counter, so before torch's batch norm writes anything
    a.num_batches_tracked->add_(1);
  }
  const Normalized n = cumulative ? converted(a, factor) : by_torch(a, a.momentum.value_or(0));
  const Tensor output = activated(a.residual.has_value() ? n.output + *a.residual : n.output, a.activation);
  if (n.running_mean.has_value()) {
    const Tensor mean = n.running_mean->view_as(*a.running_mean);
    const Tensor var = n.running_var->view_as(*a.running_var);
    a.running_mean->copy_(mean);  // from here on nothing can fail
    a.running_var->copy_(var);
  }
  if (counts && !in_functorch()) {
    a.num_batches_tracked->add_(1);
  }
  return output;
}

FourTensors decomposed_backward(const BackwardArguments& a, double eps, const char* reason) {
  tell(a.input, reason);
  const auto type = at::toOpMathType(a.input.scalar_type());
  std::vector<int64_t> others;
  std::vector<int64_t> per_channel(a.input.dim(), 1);
  per_channel[1] = -1;
  for (int64_t d = 0; d < a.input.dim(); ++d) {
    if (d != 1) {
      others.push_back(d);
    }
  }
  // The mean is taken off in double precision, as a constant: no derivative knows of it.
  Tensor xmu = (a.input.to(at::kDouble) - a.mean.view(per_channel)).to(type);
  Tensor invstd = a.invstd.to(type).view(per_channel);
  if (a.training) {
    xmu = xmu - xmu.mean(others, true);
    invstd = xmu.square().mean(others, true).add(eps).rsqrt();
  }
  const Tensor x_hat = xmu * invstd;
  Tensor dz = a.dy.to(type);
  if (a.mask.has_value()) {
    dz = behind(dz, on_branches(*a.mask, a.input, a.activation, type), a.activation);
  } else if (a.activation.kind != ActivationKind::Identity) {
    Tensor z = a.weight.has_value() ? x_hat * a.weight->to(type).view(per_channel) : x_hat;
    z = a.bias.has_value() ? z + a.bias->to(type).view(per_channel) : z;
    z = a.residual.has_value() ? z + a.residual->to(type) : z;
    dz = behind(dz, z, a.activation);
  }
  const auto [wants_dx, wants_dweight, wants_dbias, wants_dresidual] = a.output_mask;
  const auto dx = [&] {
    Tensor centred = a.training ? dz - dz.mean(others, true) - x_hat * (dz * x_hat).mean(others, true) : dz;
    centred = centred * invstd;
    return (a.weight.has_value() ? centred * a.weight->to(type).view(per_channel) : centred).to(a.input.scalar_type());
  };
  return {wants_dx ? dx() : Tensor(), wants_dweight ? (dz * x_hat).sum(others) : Tensor(),
          wants_dbias ? dz.sum(others) : Tensor(), wants_dresidual ? dz.to(a.input.scalar_type()) : Tensor()};
}

}  // namespace bn::ops
