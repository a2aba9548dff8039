#pragma once

#include "core/arguments.h"
#include "core/normalize.h"
#include "core/statistics.h"

// What is done once for each channel, between its sums and its elements. Several may ask for the coefficients of a
// channel; one of them `writes` what the caller gets of it.
namespace bn {

// `momentum` and `batch`, the moments of all values of the channel, are of use in training only.
template <class A>
BN_HD Forward<A> finish_forward(
    const ForwardArgs& args, int64_t c, const Moments& batch, double momentum, bool writes) {
  const double mean = args.training ? batch.mean : args.running_mean.get(c, 0);
  const double var = args.training ? biased_variance(batch) : args.running_var.get(c, 1);
  const double invstd = inverse_std(var, args.eps);
  if (writes) {
    args.mean[c] = mean;
    args.invstd[c] = invstd;
  }
  if (writes && args.training && args.running_mean) {
    args.running_mean.set(c, running_average(args.running_mean.get(c, 0), mean, momentum));
    args.running_var.set(c, running_average(args.running_var.get(c, 0), unbiased_variance(batch), momentum));
  }
  return forward_coefficients<A>(mean, invstd, args.weight.get(c, 1), args.bias.get(c, 0));
}

// Those of the forward that a backward belongs to.
template <class A>
BN_HD Forward<A> repeat_forward(const BackwardArgs& args, int64_t c) {
  return forward_coefficients<A>(args.mean[c], args.invstd[c], args.weight.get(c, 1), args.bias.get(c, 0));
}

// Of the gradient dz of what was normalized; `sum_dz_shifted` is the sum of dz * (x - shift), with the forward's shift.
template <class A>
BN_HD Backward<A> finish_backward(
    const BackwardArgs& args, int64_t c, double sum_dz, double sum_dz_shifted, bool writes) {
  const double mean = args.mean[c];
  const double invstd = args.invstd[c];
  const double weight = args.weight.get(c, 1);
  const GradientSums sums = centred<A>(mean, weight * invstd, sum_dz, sum_dz_shifted);
  if (writes && args.dweight) {
    args.dweight.set(c, sums.dz_xmu * invstd);
  }
  if (writes && args.dbias) {
    args.dbias.set(c, sums.dz);
  }
  const auto count = static_cast<double>(args.problem.count());
  return backward_coefficients<A>(mean, invstd, weight, count, args.training ? sums : GradientSums{});
}

}  // namespace bn
