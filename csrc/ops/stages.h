#pragma once

#include "ops/fused.h"

#include <ATen/ops/full.h>
#include <ATen/ops/sum.h>

// The stages of batch_norm_forward and batch_norm_backward as operators of their own, for whatever stands between them:
// a collective, other statistics, more batches. Statistics and sums are of type float64: a row of channels for each
// statistic set if there is a set_size, else without the dimension of sets. Nothing is too small: an input may have one
// value per channel, or none.
namespace bn::ops {

using TwoTensors = std::tuple<Tensor, Tensor>;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

// The values per channel in each set.
inline Tensor counts_of(const Tensor& input, const Problem& problem, SetSize set_size) {
  const auto options = input.options().dtype(at::kDouble).memory_format(std::nullopt);
  if (!set_size.has_value()) {
    return at::full({}, problem.count(), options);
  }
  const int64_t sets = sets_of(input, set_size);
  Tensor counts = at::full({sets}, problem.count_of(0), options);
  if (sets > 1) {
    counts.select(0, -1).fill_(problem.count_of(sets - 1));
  }
  return counts;
}

template <class Backend>
ThreeTensors batch_norm_stats(const Tensor& input, SetSize set_size) {
  check_input(input);
  check_set_size(set_size);
  const View x = view_as_problem(input, set_size);
  Tensor mean = empty_statistics(input, set_size);
  Tensor m2 = empty_statistics(input, set_size);
  Tensor counts = counts_of(input, x.problem, set_size);
  if (input.numel() == 0) {
    return {counts, mean.zero_(), m2.zero_()};
  }
  Backend::forward({.problem = x.problem,
                    .stages = Stages::Reduce,
                    .x = x.tensor.const_data_ptr(),
                    .training = true,
                    .mean = mean.mutable_data_ptr<double>(),
                    .m2 = m2.mutable_data_ptr<double>()},
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
  check_inputs(MergeArguments{counts, means, m2s, running_mean, running_var, num_batches_tracked, momentum, eps});
  const int64_t c = means.size(-1);
  Tensor count = at::empty({}, counts.options());
  Tensor mean = at::empty({c}, counts.options());
  Tensor invstd = at::empty({c}, counts.options());
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
                            bool with_branches) {
  const Activation activation = numbered_activation(activation_number, activation_param);
  check_input(input);
  check_set_size(set_size);
  check_per_channel("weight", weight, input);
  check_per_channel("bias", bias, input);
  check_statistics("mean", mean, input, set_size);
  check_statistics("invstd", invstd, input, set_size);
  check_residual(residual, input);
  check_with_branches(with_branches, activation);
  const View x = view_as_problem(input, set_size);
  Tensor output = empty_like(x);
  Tensor branches = with_branches ? empty_branches(input) : Tensor();
  if (input.numel() > 0) {
    const Operand r(residual, x);
    Backend::forward(
        {.problem = x.problem,
         .stages = Stages::Apply,
         .x = x.tensor.const_data_ptr(),
         .weight = per_channel(weight),
         .bias = per_channel(bias),
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
                                      SetSize set_size) {
  const Activation activation = numbered_activation(activation_number, activation_param);
  const OptionalTensor given_input = input;
  const BackwardArguments a{dy,       given_input, weight,     bias,     mean, invstd, /*training=*/true,
                            residual, branches,    activation, set_size, {}};
  check_inputs(a);
  Tensor sum_dz = empty_statistics(input, set_size);
  Tensor sum_dz_xmu = empty_statistics(input, set_size);
  if (input.numel() == 0) {
    return {sum_dz.zero_(), sum_dz_xmu.zero_()};
  }
  const View x = view_as_problem(input, set_size);
  const Operand g(dy, x);
  const Operand r(residual, x);
  BackwardArgs args = to_read(a, Stages::Reduce, x, g, r);
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
                                     std::array<bool, 2> output_mask) {
  const Activation activation = numbered_activation(activation_number, activation_param);
  const OptionalTensor given_input = input;
  const BackwardArguments a{dy,       given_input, weight,     bias,     mean, invstd, /*training=*/true,
                            residual, branches,    activation, set_size, {}};
  check_inputs(a);
  check_statistics("sum_dz", sum_dz, input, set_size);
  check_statistics("sum_dz_xmu", sum_dz_xmu, input, set_size);
  check_counts(counts, input, set_size);
  const auto [wants_dx, wants_dresidual] = output_mask;
  const View x = view_as_problem(input, set_size);
  Tensor dx = wants_dx ? empty_like(x) : Tensor();
  const ResidualGradient dresidual(wants_dresidual, x, dy, activation);
  if (input.numel() > 0 && (wants_dx || dresidual.to_write() != nullptr)) {
    const Operand g(dy, x);
    const Operand r(residual, x);
    BackwardArgs args = to_read(a, Stages::Apply, x, g, r);
    args.dx = wants_dx ? dx.mutable_data_ptr() : nullptr;
    args.dresidual = dresidual.to_write();
    args.sum_dz = given(sum_dz);
    args.sum_dz_xmu = given(sum_dz_xmu);
    args.counts = counts.const_data_ptr<double>();
    Backend::backward(args, input);
  }
  return {dx, dresidual.tensor()};
}

}  // namespace bn::ops
