#pragma once

#include "core/arguments.h"
#include "core/normalize.h"
#include "core/statistics.h"

// The work that is done once per channel, between the reduction and the elements. Several blocks may compute the
// coefficients of one channel; only the block with `writes` stores results for the caller.
namespace bn {

// `batch` has the moments of all values of the channel. `batch` and `momentum` are used in training only.
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

// Recomputes the forward's coefficients of channel c for the backward.
template <class A>
BN_HD Forward<A> repeat_forward(const BackwardArgs& args, int64_t c) {
  return forward_coefficients<A>(args.mean[c], args.invstd[c], args.weight.get(c, 1), args.bias.get(c, 0));
}

// dz is the gradient of the activation's input. `sum_dz_shifted` is the sum of dz * (x - shift), with the shift of the
// forward.
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
