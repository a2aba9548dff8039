#pragma once

#include "core/activation.h"
#include "core/dtype.h"
#include "core/numbers.h"
#include "core/pass.h"
#include "core/problem.h"

// The arguments of a call to a backend: raw pointers, all of one device.
namespace bn {

// A value per channel of any floating type, or none at all. Sets share the values, unless there is a stride of sets.
struct PerChannel {
  void* data = nullptr;
  DType dtype = DType::Float32;
  int64_t stride = 1;
  int64_t set_stride = 0;

  BN_HD explicit operator bool() const { return data != nullptr; }
  BN_HD bool is(const PerChannel& other) const { return data == other.data; }

  BN_HD double get(int64_t c, double otherwise, int64_t set = 0) const {
    if (data == nullptr) {
      return otherwise;
    }
    return with_type(dtype, [&](auto type) {
      using T = decltype(type);
      return static_cast<double>(static_cast<Acc<T>>(static_cast<const T*>(data)[set * set_stride + c * stride]));
    });
  }

  BN_HD void set(int64_t c, double value) const {
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      static_cast<T*>(data)[c * stride] = static_cast<T>(static_cast<Acc<T>>(value));
    });
  }
};

// The sums of a mask over a statistic set.
struct Counted {
  double count = 0;    // the sum: the number of values that count, where each counts 1
  double freedom = 0;  // divides m2 for the unbiased variance: 0 if at most one value counts
  int64_t first = 0;   // the position of the first value that counts, in the set
};

// Counted from a mask's numbers, of which `positive` are not 0, and their sums.
BN_HD Counted counted_of(double sum, double sum_of_squares, int64_t positive, int64_t first) {
  const double freedom = positive > 1 ? sum - sum_of_squares / sum : 0;
  return {sum, freedom > 0 ? freedom : 0, first};
}

// How much each value of a channel counts in the statistics. Where it is 0, so are outputs and gradients, and inputs
// may be anything.
struct Mask {
  const void* values = nullptr;  // of the accumulation type, not negative: for each image and position; null: all are 1
  const Counted* counted = nullptr;  // of each set, then of all together; the backend makes it

  BN_HD explicit operator bool() const { return values != nullptr; }
};

BN_HD Counted counted(const Problem& problem, const Mask& mask, int64_t set) {
  if (mask) {
    return mask.counted[set];
  }
  const auto count = static_cast<double>(problem.count_of(set));
  return {count, count - 1, 0};
}

BN_HD double freedom_of_all(const Problem& problem, const Mask& mask) {
  return mask ? mask.counted[problem.sets()].freedom : static_cast<double>(problem.count() - problem.sets());
}

// Behind the normalization: y = activation(z), z = normalized + residual.
struct Epilogue {
  Activation activation;
  const void* residual = nullptr;  // laid out as x, or null
  // A bit for each element, in the order of memory: the branch of the activation that z is on. A forward writes it, and
  // zeros behind the last one; a backward then needs no z. Or null.
  uint8_t* branches = nullptr;
};

// Normalize by the batch's own statistics and update the running ones (training), or by the running ones. A reduction
// alone ends with mean and m2; an application alone begins with mean and invstd. Arrays of statistics have a row of
// channels for each set, counts a number.
struct ForwardArgs {
  Problem problem;
  Stages stages;
  const void* x;
  Mask mask;
  PerChannel weight;
  PerChannel bias;
  PerChannel running_mean;
  PerChannel running_var;
  int64_t* num_batches_tracked;  // or null
  bool training;
  bool cumulative;  // the running statistics are averages over num_batches_tracked batches, else
  double momentum;
  double eps;
  Epilogue epilogue;
  void* y;
  double* mean;
  double* invstd;
  double* m2;      // or null; running statistics over several sets need it
  double* counts;  // or null
};

// Gradients of the forward; those whose pointer is null cost nothing. A reduction alone ends with the two sums; an
// application alone begins with them and the counts.
struct BackwardArgs {
  Problem problem;
  Stages stages;
  const void* dy;
  const void* x;
  Mask mask;
  PerChannel weight;
  PerChannel bias;
  const double* mean;
  const double* invstd;
  bool training;
  Epilogue epilogue;
  void* dx;
  void* dresidual;
  PerChannel dweight;
  PerChannel dbias;
  double* sum_dz;  // both sums, or none; parameters' gradients over several sets need them
  double* sum_dz_xmu;
  const double* counts;  // values that the statistics of each set are of; null: those of the problem
};

// Merges rows of statistics, one after the other, and updates the running statistics.
struct MergeArgs {
  int64_t rows;
  int64_t c;
  const double* counts;  // a value for each row
  const double* means;   // rows of channels
  const double* m2s;
  PerChannel running_mean;
  PerChannel running_var;
  const int64_t* num_batches_tracked;  // this batch included; null: `momentum` holds
  double momentum;
  double eps;
  double* count;
  double* mean;
  double* invstd;
};

inline Chain chain_of(const Epilogue& e) {
  return {e.activation.kind, e.residual != nullptr, e.branches != nullptr && has_branches(e.activation)};
}

// The pass of a call: which of its pointers are null.
inline Pass pass_of(const ForwardArgs& args) {
  return {args.problem, Direction::Forward, args.training, Wants{}, chain_of(args.epilogue),
          args.stages,  bool(args.mask)};
}

inline Pass pass_of(const BackwardArgs& args) {
  const Wants wants{args.dx != nullptr, args.dresidual != nullptr, bool(args.dweight), bool(args.dbias)};
  return {args.problem, Direction::Backward, args.training, wants, chain_of(args.epilogue),
          args.stages,  bool(args.mask)};
}

}  // namespace bn
