#pragma once

#include "core/arguments.h"
#include "ops/inputs.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

// batch_norm_forward and batch_norm_backward for any backend: check, view as a problem, allocate, run. A backend has
// two static functions, forward(args, input) and backward(args, input), for inputs with elements.
namespace bn::ops {

// One value per channel to be read; `t` has to outlive the result.
inline PerChannel per_channel(const OptionalTensor& t) {
  if (!t.has_value()) {
    return {};
  }
  const Tensor flat = t->dim() == 1 ? *t : t->view(-1);
  return {const_cast<void*>(flat.const_data_ptr()), dtype_of(flat), flat.stride(0)};
}

inline PerChannel per_channel_to_write(const OptionalTensor& t) {
  if (t.has_value()) {
    t->mutable_data_ptr();  // the data become the tensor's own
  }
  return per_channel(t);
}

// Tells autograd that a tensor was written to.
inline void bump_version(const OptionalTensor& t) {
  if (t.has_value() && !t->is_inference()) {
    t->unsafeGetTensorImpl()->bump_version();
  }
}

template <class Backend>
ThreeTensors batch_norm_forward(const Tensor& input,
                                const OptionalTensor& weight,
                                const OptionalTensor& bias,
                                const OptionalTensor& running_mean,
                                const OptionalTensor& running_var,
                                const OptionalTensor& num_batches_tracked,
                                bool training,
                                std::optional<double> momentum,
                                double eps) {
  check_inputs(Arguments{input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps});
  const View x = view_as_problem(input);
  Tensor output = empty_like(x);
  Tensor mean = empty_statistics(input);
  Tensor invstd = empty_statistics(input);
  const bool counts = training && num_batches_tracked.has_value();
  if (input.numel() == 0) {
    mean.zero_();
    invstd.zero_();
    if (counts) {
      num_batches_tracked->add_(1);
    }
    return {output, mean, invstd};
  }
  Backend::forward({x.problem, x.tensor.const_data_ptr(), per_channel(weight), per_channel(bias),
                    training ? per_channel_to_write(running_mean) : per_channel(running_mean),
                    training ? per_channel_to_write(running_var) : per_channel(running_var),
                    counts ? num_batches_tracked->mutable_data_ptr<int64_t>() : nullptr, training,
                    counts && !momentum.has_value(), momentum.value_or(0), eps, output.mutable_data_ptr(),
                    mean.mutable_data_ptr<double>(), invstd.mutable_data_ptr<double>()},
                   input);
  if (training) {
    bump_version(num_batches_tracked);
    bump_version(running_mean);
    bump_version(running_var);
  }
  return {output, mean, invstd};
}

template <class Backend>
ThreeTensors batch_norm_backward(const Tensor& dy,
                                 const Tensor& input,
                                 const OptionalTensor& weight,
                                 const Tensor& mean,
                                 const Tensor& invstd,
                                 bool training,
                                 std::array<bool, 3> output_mask) {
  check_inputs(BackwardArguments{dy, input, weight, mean, invstd, training, output_mask});
  const View x = view_as_problem(input);
  const Tensor g = laid_out_like(dy, x);
  const auto parameter =
      mean.options().dtype(weight.has_value() ? weight->scalar_type() : at::toOpMathType(input.scalar_type()));
  Tensor dx = output_mask[0] ? empty_like(x) : at::empty({0}, input.options());
  Tensor dweight = at::empty({output_mask[1] ? input.size(1) : 0}, parameter);
  Tensor dbias = at::empty({output_mask[2] ? input.size(1) : 0}, parameter);
  if (input.numel() == 0) {
    dweight.zero_();
    dbias.zero_();
    return {dx, dweight, dbias};
  }
  Backend::backward(
      {x.problem, g.const_data_ptr(), x.tensor.const_data_ptr(), per_channel(weight), mean.const_data_ptr<double>(),
       invstd.const_data_ptr<double>(), training, output_mask[0] ? dx.mutable_data_ptr() : nullptr,
       output_mask[1] ? per_channel_to_write(dweight) : PerChannel{},
       output_mask[2] ? per_channel_to_write(dbias) : PerChannel{}},
      input);
  return {dx, dweight, dbias};
}

}  // namespace bn::ops
