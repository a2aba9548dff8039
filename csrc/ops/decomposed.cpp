#include "ops/inputs.h"

#include <ATen/Context.h>
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/zeros.h>

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

Tensor call_torch(const Tensor& input,
                  const OptionalTensor& weight,
                  const OptionalTensor& bias,
                  const OptionalTensor& mean,
                  const OptionalTensor& var,
                  const Arguments& a,
                  double momentum) {
  return at::batch_norm(input, weight, bias, mean, var, a.training, momentum, a.eps,
                        at::globalContext().userEnabledCuDNN());
}

// Everything in the accumulation type, the running statistics moved by `momentum` towards the batch's own.
Tensor converted(const Arguments& a, const Tensor& momentum) {
  const auto type = at::toOpMathType(a.input.scalar_type());
  const Tensor input = a.input.to(type);
  const auto weight = to(a.weight, type);
  const auto bias = to(a.bias, type);
  if (!a.training) {
    const auto mean = to(a.running_mean, type);
    const auto var = to(a.running_var, type);
    return call_torch(input, weight, bias, mean, var, a, 0).to(a.input.scalar_type());
  }
  // With momentum 1 torch writes the batch's own statistics.
  const auto options = a.input.options().dtype(type);
  const Tensor mean = at::zeros_symint({a.input.sym_size(1)}, options);
  const Tensor var = at::zeros_symint({a.input.sym_size(1)}, options);
  const Tensor output = call_torch(input, weight, bias, mean, var, a, 1);
  const auto update = [&](const OptionalTensor& running, const Tensor& observed) {
    if (running.has_value()) {
      running->copy_(running->to(type).lerp(observed, momentum.to(type)));
    }
  };
  update(a.running_mean, mean);
  update(a.running_var, var);
  return output.to(a.input.scalar_type());
}

Tensor by_torch(const Arguments& a, double momentum) {
  return types_suit_torch(a) ? call_torch(a.input, a.weight, a.bias, a.running_mean, a.running_var, a, momentum)
                             : converted(a, at::zeros({}, a.input.options().dtype(at::kDouble)).add(momentum));
}

}  // namespace

Tensor decomposed(const Arguments& a) {
  if (a.input.dim() >= 2 || a.input.sym_numel() != 0) {  // torch normalizes nothing, sizes (0,), to nothing
    check_inputs(a);
  }
  if (!a.training || !a.num_batches_tracked.has_value()) {
    return by_torch(a, a.momentum.value_or(0));
  }
  const Tensor batches = a.num_batches_tracked->add(1);
  const Tensor output =
      a.momentum.has_value() ? by_torch(a, *a.momentum) : converted(a, batches.to(at::kDouble).reciprocal());
  a.num_batches_tracked->copy_(batches);
  return output;
}

ThreeTensors decomposed_backward(const BackwardArguments& a, double eps) {
  const auto type = at::toOpMathType(a.input.scalar_type());
  std::vector<int64_t> others;
  std::vector<int64_t> per_channel(a.input.dim(), 1);
  per_channel[1] = -1;
  for (int64_t d = 0; d < a.input.dim(); ++d) {
    if (d != 1) {
      others.push_back(d);
    }
  }
  const Tensor dy = a.dy.to(type);
  // The mean is taken off in double precision, as a constant: no derivative knows of it.
  Tensor xmu = (a.input.to(at::kDouble) - a.mean.view(per_channel)).to(type);
  Tensor invstd = a.invstd.to(type).view(per_channel);
  if (a.training) {
    xmu = xmu - xmu.mean(others, true);
    invstd = xmu.square().mean(others, true).add(eps).rsqrt();
  }
  const Tensor x_hat = xmu * invstd;
  const Tensor dy_x_hat = dy * x_hat;
  Tensor dx = dy;
  if (a.training) {
    dx = dy - dy.mean(others, true) - x_hat * dy_x_hat.mean(others, true);
  }
  dx = dx * invstd;
  if (a.weight.has_value()) {
    dx = dx * a.weight->to(type).view(per_channel);
  }
  return {dx.to(a.input.scalar_type()), dy_x_hat.sum(others), dy.sum(others)};
}

}  // namespace bn::ops
