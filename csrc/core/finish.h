#pragma once

#include "core/arguments.h"
#include "core/coefficients.h"
#include "core/moments.h"

// The work that is done once per set and channel, between the reduction and the elements, in three steps: inputs are
// read, which may be before the sums are known; coefficients are computed, in all blocks that need them; results are
// stored for the caller, by one of these blocks. What sets share, running statistics and parameters' gradients, is
// stored at once if there is one set, else by finish_sets, when all sets are finished.
namespace bn {

template <class Args>
BN_HD void set_running(
    const Args& args, int64_t c, double old_mean, double old_var, double mean, double unbiased_var, double momentum) {
  args.running_mean.set(c, running_average(old_mean, mean, momentum));
  const bool one_tensor = args.running_var.is(args.running_mean);  // which torch takes, and writes twice
  const double var = one_tensor ? args.running_mean.get(c, 0) : old_var;
  args.running_var.set(c, running_average(var, unbiased_var, momentum));
}

template <class Args>
BN_HD void move_running(const Args& args, int64_t c, double mean, double unbiased_var, double momentum) {
  set_running(args, c, args.running_mean.get(c, 0), args.running_var.get(c, 0), mean, unbiased_var, momentum);
}

struct ForwardInputs {
  double weight;
  double bias;
  double mean;    // given, or the running one
  double spread;  // invstd, if it is given, or the running variance
};

BN_HD ForwardInputs read_inputs(const ForwardArgs& args, int64_t set, int64_t c) {
  const int64_t i = args.problem.statistic(set, c);
  const bool given = args.stages == Stages::Apply;
  return {args.weight.get(c, 1, set), args.bias.get(c, 0, set), given ? args.mean[i] : args.running_mean.get(c, 0),
          given ? args.invstd[i] : args.running_var.get(c, 1)};
}

template <class A>
struct FinishedForward {
  NormalizeCoefficients<A> coefficients;
  double mean;
  double invstd;
};

// `batch` has the moments of all values of the channel in the set, `count` their number. A pass that does not reduce
// has no use for them.
template <class A, class Count>
BN_HD FinishedForward<A> finish_forward(const ForwardArgs& args,
                                        const ForwardInputs& in,
                                        const Moments& batch,
                                        const Count& count) {
  const bool given = args.stages == Stages::Apply;
  const double mean = args.training && !given ? batch.mean : in.mean;
  const double var = args.training ? biased_variance(batch.m2, count) : in.spread;
  const double invstd = given ? in.spread : inverse_std(var, args.eps);
  return {normalize_coefficients<A>(mean, invstd, in.weight, in.bias), mean, invstd};
}

template <class A>
BN_HD void store_forward(const ForwardArgs& args,
                         int64_t set,
                         int64_t c,
                         const ForwardInputs& in,
                         const Moments& batch,
                         const FinishedForward<A>& finished,
                         double momentum) {
  if (args.stages == Stages::Apply) {
    return;
  }
  const int64_t i = args.problem.statistic(set, c);
  args.mean[i] = finished.mean;
  if (args.invstd != nullptr) {
    args.invstd[i] = finished.invstd;
  }
  if (args.m2 != nullptr) {
    args.m2[i] = batch.m2;
  }
  if (args.counts != nullptr && c == 0) {
    args.counts[set] = batch.count;
  }
  const double freedom = counted(args.problem, args.mask, set).freedom;
  if (args.training && args.running_mean && args.problem.one_set() && freedom > 0) {
    set_running(args, c, in.mean, in.spread, finished.mean, batch.m2 / freedom, momentum);
  }
}

// Whether finish_sets has work.
inline bool finishes_sets(const ForwardArgs& args) {
  return pass_of(args).reduces() && !args.problem.one_set() && args.running_mean;
}

// Moves the running statistics of channel c towards the mean of all values and the unbiased variance within the sets.
// `read` reads what other blocks wrote.
template <class Read>
BN_HD void finish_sets(const ForwardArgs& args, int64_t c, double momentum, const Read& read) {
  const auto sets = args.problem.sets();
  Moments all;
  double within = 0;
  for (int64_t set = 0; set < sets; ++set) {
    const int64_t i = args.problem.statistic(set, c);
    const Moments one{counted(args.problem, args.mask, set).count, read(args.mean + i), read(args.m2 + i)};
    if (one.count > 0) {
      all = merge(all, one);
      within += one.m2;
    }
  }
  const double freedom = freedom_of_all(args.problem, args.mask);
  if (freedom > 0) {
    move_running(args, c, all.mean, within / freedom, momentum);
  }
}

struct BackwardInputs {
  double mean;
  double invstd;
  double weight;
};

BN_HD BackwardInputs read_inputs(const BackwardArgs& args, int64_t set, int64_t c) {
  const int64_t i = args.problem.statistic(set, c);
  return {args.mean[i], args.invstd[i], args.weight.get(c, 1, set)};
}

// Recomputes the forward's coefficients for the backward.
template <class A>
BN_HD NormalizeCoefficients<A> repeat_forward(const BackwardArgs& args,
                                              int64_t set,
                                              int64_t c,
                                              const BackwardInputs& in) {
  return normalize_coefficients<A>(in.mean, in.invstd, in.weight, args.bias.get(c, 0, set));
}

BN_HD void set_parameter_gradients(const BackwardArgs& args, int64_t c, double dweight, double dbias) {
  if (args.dweight) {
    args.dweight.set(c, dweight);
  }
  if (args.dbias) {
    args.dbias.set(c, dbias);
  }
}

template <class A>
struct FinishedBackward {
  GradientCoefficients<A> coefficients;
  GradientSums sums;
};

// dz is the gradient of the activation's input. `sum_dz_shifted` is the sum of dz * (x - shift), with the shift of the
// forward. Both are used by a pass that reduces only. `count` says how many values the statistics are of.
template <class A, class Count>
BN_HD FinishedBackward<A> finish_backward(const BackwardArgs& args,
                                          int64_t set,
                                          int64_t c,
                                          const BackwardInputs& in,
                                          const Count& count,
                                          double sum_dz,
                                          double sum_dz_shifted) {
  const int64_t i = args.problem.statistic(set, c);
  const bool given = args.stages == Stages::Apply;
  const GradientSums sums = given ? GradientSums{args.sum_dz[i], args.sum_dz_xmu[i]}
                                  : centred<A>(in.mean, in.weight * in.invstd, sum_dz, sum_dz_shifted);
  const GradientSums through = args.training ? sums : GradientSums{};
  return {gradient_coefficients<A>(in.mean, in.invstd, in.weight, count, through), sums};
}

BN_HD void store_backward(
    const BackwardArgs& args, int64_t set, int64_t c, const BackwardInputs& in, const GradientSums& sums) {
  if (args.stages == Stages::Apply) {
    return;
  }
  if (args.sum_dz != nullptr) {
    const int64_t i = args.problem.statistic(set, c);
    args.sum_dz[i] = sums.dz;
    args.sum_dz_xmu[i] = sums.dz_xmu;
  }
  if (args.problem.one_set()) {
    set_parameter_gradients(args, c, sums.dz_xmu * in.invstd, sums.dz);
  }
}

inline bool finishes_sets(const BackwardArgs& args) {
  return !args.problem.one_set() && (args.dweight || args.dbias);
}

// Adds up the parameters' gradients of channel c over the sets, in their order.
template <class Read>
BN_HD void finish_sets(const BackwardArgs& args, int64_t c, const Read& read) {
  double dweight = 0;
  double dbias = 0;
  for (int64_t set = 0; set < args.problem.sets(); ++set) {
    const int64_t i = args.problem.statistic(set, c);
    dweight += read(args.sum_dz_xmu + i) * args.invstd[i];
    dbias += read(args.sum_dz + i);
  }
  set_parameter_gradients(args, c, dweight, dbias);
}

// Merges the rows of channel c. Rows without values count for nothing; a batch of less than two values leaves the
// running statistics alone.
BN_HD void merge_rows(const MergeArgs& args, int64_t c) {
  Moments all;
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t i = row * args.c + c;
    if (args.counts[row] > 0) {
      all = merge(all, {args.counts[row], args.means[i], args.m2s[i]});
    }
  }
  if (c == 0) {
    *args.count = all.count;
  }
  args.mean[c] = all.mean;
  args.invstd[c] = inverse_std(biased_variance(all.m2, all.count), args.eps);
  if (args.running_mean && all.count > 1) {
    const double momentum =
        args.num_batches_tracked != nullptr ? 1 / static_cast<double>(*args.num_batches_tracked) : args.momentum;
    move_running(args, c, all.mean, all.m2 / (all.count - 1), momentum);
  }
}

}  // namespace bn
