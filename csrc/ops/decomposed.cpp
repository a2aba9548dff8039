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

void update(const OptionalTensor& running, const Tensor& observed, const Tensor& momentum) {
  if (running.has_value()) {
    running->copy_(running->to(observed.scalar_type()).lerp(observed, momentum));
  }
}

}  // namespace

Tensor decomposed(const Arguments& a) {
  if (a.input.dim() >= 2 && !a.input.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
    check_inputs(a);
  }
  const bool counts = a.training && a.num_batches_tracked.has_value();
  if (counts) {
    a.num_batches_tracked->add_(1);
  }
  const bool cumulative = counts && !a.momentum.has_value();
  const double momentum = a.momentum.value_or(0);
  if (types_suit_torch(a) && !cumulative) {
    return call_torch(a.input, a.weight, a.bias, a.running_mean, a.running_var, a, momentum);
  }
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
  const Tensor factor =
      cumulative ? a.num_batches_tracked->to(type).reciprocal() : at::zeros({}, options).add(momentum);
  update(a.running_mean, mean, factor);
  update(a.running_var, var, factor);
  return output.to(a.input.scalar_type());
}

ThreeTensors decomposed_backward(const BackwardArguments& a, double eps) {
  const auto type = at::toOpMathType(a.input.scalar_type());
  const Tensor x = a.input.to(type);
  const Tensor dy = a.dy.to(type);
  std::vector<int64_t> others;
  std::vector<int64_t> per_channel(x.dim(), 1);
  per_channel[1] = -1;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (d != 1) {
      others.push_back(d);
    }
  }
  const Tensor xmu = x - (a.training ? x.mean(others, true) : a.mean.to(type).view(per_channel));
  const Tensor invstd =
      a.training ? xmu.square().mean(others, true).add(eps).rsqrt() : a.invstd.to(type).view(per_channel);
  const Tensor x_hat = xmu * invstd;
  const Tensor dbias = dy.sum(others, true);
  const Tensor dweight = (dy * x_hat).sum(others, true);
  Tensor dx = dy;
  if (a.training) {
    const auto count = x.sym_numel() / x.sym_size(1);
    dx = dy - dbias.div(at::Scalar(count)) - x_hat * dweight.div(at::Scalar(count));
  }
  dx = dx * invstd;
  if (a.weight.has_value()) {
    dx = dx * a.weight->to(type).view(per_channel);
  }
  return {dx.to(a.input.scalar_type()), dweight.flatten(), dbias.flatten()};
}

}  // namespace bn::ops
