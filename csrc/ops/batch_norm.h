#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

// The operators as C++ values and functions, and what their implementations share. One file per dispatch
// key implements them.
namespace bn::ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

// What batch_norm and batch_norm_forward take, in the order of their schemas.
struct Arguments {
  const Tensor& input;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& running_mean;
  const OptionalTensor& running_var;
  const OptionalTensor& num_batches_tracked;
  bool training;
  std::optional<double> momentum;
  double eps;
};

// What batch_norm_backward takes.
struct BackwardArguments {
  const Tensor& dy;
  const Tensor& input;
  const OptionalTensor& weight;
  const Tensor& mean;
  const Tensor& invstd;
  bool training;
  std::array<bool, 3> output_mask;
};

// batch_norm by standard operators: for transforms that have to see through it, for devices without kernels.
Tensor decomposed(const Arguments& a);

// batch_norm_backward by standard operators, which can be differentiated again.
ThreeTensors decomposed_backward(const BackwardArguments& a, double eps);

}  // namespace bn::ops
