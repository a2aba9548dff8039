#pragma once

#include "ops/fused.h"

#include <ATen/ops/sum.h>

// The stages of batch_norm_forward and batch_norm_backward as operators of their own, for whatever stands between them:
// a collective, other statistics, more batches. Statistics and sums are of type float64: a row of channels for each
// statistic set if there is a set_size, else without the dimension of sets. Nothing is too small: an input may have one
// value per channel, or none.
namespace bn::ops {

using TwoTensors = std::tuple<Tensor, Tensor>;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

template <class Backend>
ThreeTensors batch_norm_stats(const Tensor& input, SetSize set_size, const OptionalTensor& mask) {
  Checks("batch_norm_stats", input, set_size).mask(mask);
  Tensor counts = empty_counts(input, set_size);
  Tensor mean = empty_statistics(input, set_size);
  Tensor m2 = empty_statistics(input, set_size);
  if constexpr (!computes<Backend>) {
    return {counts, mean, m2};
  }
  if (input.numel() == 0) {
    return {counts.zero_(), mean.zero_(), m2.zero_()};
  }
  const View x = view_as_problem(input, set_size);
  Backend::forward({.problem = x.problem,
                    .stages = Stages::Reduce,
                    .x = x.tensor.const_data_ptr(),
                    .mask = mask_of(mask),
                    .training = true,
                    .mean = mean.mutable_data_ptr<double>(),
                    .m2 = m2.mutable_data_ptr<double>(),
                    .counts = counts.mutable_data_ptr<double>()},
                   input);
  return {counts, mean, m2};
}

template <class Backend>
ThreeTensors batch_norm_merge_stats(const Tensor& counts,
                                    const Tensor& means,
                                    const Tensor& m2s,
                                    const OptionalTensor& running_mean,
                                    const OptionalTensor& running_var,
                                    const OptionalTensor& num_batches_tracked,
                                    std::optional<double> momentum,
                                    double eps) {
  check_merge({counts, means, m2s, running_mean, running_var, num_batches_tracked, momentum, eps});
  Tensor count = at::empty({}, counts.options());
  Tensor mean = at::empty_symint({means.sym_size(-1)}, counts.options());
  Tensor invstd = at::empty_symint({means.sym_size(-1)}, counts.options());
  if constexpr (!computes<Backend>) {
    return {count, mean, invstd};
  }
  const int64_t c = means.size(-1);
  if (num_batches_tracked.has_value()) {
    count_batch(*num_batches_tracked);
  }
  if (c == 0) {
    return {counts.sum(), mean, invstd};
  }
  const bool cumulative = num_batches_tracked.has_value() && !momentum.has_value();
  Backend::merge_rows(
      {counts.numel(), c, counts.const_data_ptr<double>(), means.const_data_ptr<double>(), m2s.const_data_ptr<double>(),
       per_channel_to_write(running_mean), per_channel_to_write(running_var),
       cumulative ? num_batches_tracked->const_data_ptr<int64_t>() : nullptr, momentum.value_or(0), eps,
       count.mutable_data_ptr<double>(), mean.mutable_data_ptr<double>(), invstd.mutable_data_ptr<double>()},
      counts);
  bump_version(running_mean);
  bump_version(running_var);
  return {count, mean, invstd};
}

// Weight or bias: of two dimensions, where there is a set_size, they have a row for each set.
inline PerChannel parameter(const OptionalTensor& t, SetSize set_size) {
  if (!t.has_value() || t->dim() != 2 || !set_size.has_value()) {
    return per_channel(t);
  }
  return {const_cast<void*>(t->const_data_ptr()), dtype_of(*t), t->stride(1), t->stride(0)};
}

inline Checks check_stage(const char* op, const BackwardArguments& a) {
  const Checks checks(op, a.like(), a.set_size);
  checks.backward(a);
  checks.parameter("weight", a.weight);
  checks.parameter("bias", a.bias);
  return checks;
}

inline BackwardArgs to_read_stage(
    const BackwardArguments& a, Stages stages, const View& x, const Operand& dy, const Operand& residual) {
  BackwardArgs args = to_read(a, stages, x, dy, residual);
  args.weight = parameter(a.weight, a.set_size);
  args.bias = parameter(a.bias, a.set_size);
  return args;
}

// Statistics that are read, as the arguments of a backend have them.
inline double* given(const Tensor& statistics) {
  return const_cast<double*>(statistics.const_data_ptr<double>());
}

template <class Backend>
TwoTensors batch_norm_elemt(const Tensor& input,
                            const OptionalTensor& weight,
                            const OptionalTensor& bias,
                            const Tensor& mean,
                            const Tensor& invstd,
                            const OptionalTensor& residual,
                            int64_t activation_number,
                            double activation_param,
                            SetSize set_size,
                            bool with_branches,
                            const OptionalTensor& mask) {
  const Activation activation = numbered_activation(activation_number, activation_param);
  const Checks checks("batch_norm_elemt", input, set_size);
  checks.parameter("weight", weight);
  checks.parameter("bias", bias);
  checks.statistics("mean", mean);
  checks.statistics("invstd", invstd);
  checks.like_input("residual", residual);
  checks.mask(mask);
  checks.writes_branches(with_branches, activation);
  Tensor output = empty_output(input);
  Tensor branches = with_branches ? empty_branches(input) : Tensor();
  if constexpr (!computes<Backend>) {
    return {output, branches};
  }
  if (input.numel() > 0) {
    const View x = view_as_problem(input, set_size);
    const Operand r(residual, x);
    Backend::forward(
        {.problem = x.problem,
         .stages = Stages::Apply,
         .x = x.tensor.const_data_ptr(),
         .mask = mask_of(mask),
         .weight = parameter(weight, set_size),
         .bias = parameter(bias, set_size),
         .training = true,
         .epilogue = {activation, r.data(), with_branches ? branches.mutable_data_ptr<uint8_t>() : nullptr},
         .y = output.mutable_data_ptr(),
         .mean = given(mean),
         .invstd = given(invstd)},
        input);
  }
  return {output, branches};
}

template <class Backend>
TwoTensors batch_norm_backward_reduce(const Tensor& dy,
                                      const Tensor& input,
                                      const OptionalTensor& weight,
                                      const OptionalTensor& bias,
                                      const Tensor& mean,
                                      const Tensor& invstd,
                                      const OptionalTensor& residual,
                                      const OptionalTensor& branches,
                                      int64_t activation_number,
                                      double activation_param,
                                      SetSize set_size,
                                      const OptionalTensor& mask) {
  const Activation activation = numbered_activation(activation_number, activation_param);
  const OptionalTensor given_input = input;
  const BackwardArguments a{dy,       given_input, weight,     bias,     mean, invstd, /*training=*/true,
                            residual, branches,    activation, set_size, {},   mask};
  check_stage("batch_norm_backward_reduce", a);
  Tensor sum_dz = empty_statistics(input, set_size);
  Tensor sum_dz_xmu = empty_statistics(input, set_size);
  if constexpr (!computes<Backend>) {
    return {sum_dz, sum_dz_xmu};
  }
  if (input.numel() == 0) {
    return {sum_dz.zero_(), sum_dz_xmu.zero_()};
  }
  const View x = view_as_problem(input, set_size);
  const Operand g(dy, x);
  const Operand r(residual, x);
  BackwardArgs args = to_read_stage(a, Stages::Reduce, x, g, r);
  args.sum_dz = sum_dz.mutable_data_ptr<double>();
  args.sum_dz_xmu = sum_dz_xmu.mutable_data_ptr<double>();
  Backend::backward(args, input);
  return {sum_dz, sum_dz_xmu};
}

template <class Backend>
TwoTensors batch_norm_backward_elemt(const Tensor& dy,
                                     const Tensor& input,
                                     const OptionalTensor& weight,
                                     const OptionalTensor& bias,
                                     const Tensor& mean,
                                     const Tensor& invstd,
                                     const Tensor& sum_dz,
                                     const Tensor& sum_dz_xmu,
                                     const Tensor& counts,
                                     const OptionalTensor& residual,
                                     const OptionalTensor& branches,
                                     int64_t activation_number,
                                     double activation_param,
                                     SetSize set_size,
                                     std::array<bool, 2> output_mask,
                                     const OptionalTensor& mask) {
  const Activation activation = numbered_activation(activation_number, activation_param);
  const OptionalTensor given_input = input;
  const BackwardArguments a{dy,       given_input, weight,     bias,     mean, invstd, /*training=*/true,
                            residual, branches,    activation, set_size, {},   mask};
  const Checks checks = check_stage("batch_norm_backward_elemt", a);
  checks.statistics("sum_dz", sum_dz);
  checks.statistics("sum_dz_xmu", sum_dz_xmu);
  checks.counts(counts);
  const auto [wants_dx, wants_dresidual] = output_mask;
  Tensor dx = wants_dx ? empty_output(input) : Tensor();
  Tensor dresidual = wants_dresidual ? empty_output(input) : Tensor();
  if constexpr (!computes<Backend>) {
    return {dx, dresidual};
  }
  void* const dresidual_to_write = residual_to_write(dresidual, a);
  if (input.numel() > 0 && (wants_dx || dresidual_to_write != nullptr)) {
    const View x = view_as_problem(input, set_size);
    const Operand g(dy, x);
    const Operand r(residual, x);
    BackwardArgs args = to_read_stage(a, Stages::Apply, x, g, r);
    args.dx = wants_dx ? dx.mutable_data_ptr() : nullptr;
    args.dresidual = dresidual_to_write;
    args.sum_dz = given(sum_dz);
    args.sum_dz_xmu = given(sum_dz_xmu);
    args.counts = counts.const_data_ptr<double>();
    Backend::backward(args, input);
  }
  return {dx, dresidual};
}

}  // namespace bn::ops
