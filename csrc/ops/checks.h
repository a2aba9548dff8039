#pragma once

#include "ops/operators.h"

#include <c10/core/SymInt.h>

// The checks of an operator's arguments. An error names the operator, the argument, its value and the value it should
// have; where torch's batch norm has an error for the same mistake, it is of the same type. Sizes may be symbolic:
// fake kernels make these checks too. An operator makes them before it writes to anything.
namespace bn::ops {

void check_set_size(const char* op, SetSize set_size);

// A mask as batch_norm takes it: (N, *) for an input (N, C, *).
void check_mask(const Tensor& input, const Tensor& mask);

void check_merge(const MergeArguments& a);

// Throws what autograd would, once the first of the running statistics is written. `tracked`: whether autograd, which
// refuses some tensors, sees the writes.
void check_running_statistics(const Arguments& a, bool tracked);

// Arguments that have to fit an input. A constructor checks the input itself.
class Checks {
 public:
  Checks(const char* op, const Tensor& input, SetSize set_size = std::nullopt);

  // A value for each channel.
  void per_channel(const char* name, const OptionalTensor& t) const;
  // A value for each channel or, with a set_size, for each statistic set and channel.
  void parameter(const char* name, const OptionalTensor& t) const;
  // A value of float64 for each statistic set and channel.
  void statistics(const char* name, const Tensor& t) const;
  // The number of values that the statistics of each set are of.
  void counts(const Tensor& t) const;
  // How much each value counts: one number for each image and position, in the type that the input is summed in.
  void mask(const OptionalTensor& t) const;
  // The sizes, the dtype and the device of the input.
  void like_input(const char* name, const OptionalTensor& t) const;
  // Branch bits that are read.
  void branches(const OptionalTensor& t, const Activation& activation) const;
  // Whether a forward can write the branches of the activation.
  void writes_branches(bool with_branches, const Activation& activation) const;
  // The arguments of batch_norm, but for a residual.
  void forward(const Arguments& a) const;
  // The arguments of batch_norm_forward: kernels take fewer residuals and counters.
  void forward_by_kernels(const Arguments& a, bool with_branches) const;
  // The arguments that every backward has, but for weight and bias.
  void backward(const BackwardArguments& a) const;

 private:
  void values(const char* name, const Tensor& t, const c10::SymInt& number, at::ScalarType type) const;
  void of_parameters_type(const char* name, const Tensor& t) const;

  const char* op_;
  const Tensor& input_;
  SetSize set_size_;
};

}  // namespace bn::ops
