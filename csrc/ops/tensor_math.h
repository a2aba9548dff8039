#pragma once

#include "core/math.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/erf.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>

// The functions that gradients of activations are made of, for tensors: autograd differentiates them again.
namespace bn {

template <>
struct Math<at::Tensor> {
  using V = at::Tensor;
  using Mask = at::Tensor;  // of type Bool

  // Has no dimensions, so that the other operand decides the type of the result.
  BN_HD static V constant(double value) { return at::scalar_tensor(value, at::kDouble); }
  BN_HD static V select(const V& where, const V& a, const V& b) { return at::where(where, a, b); }
  BN_HD static V exp(const V& x) { return at::exp(x); }
  BN_HD static V tanh(const V& x) { return at::tanh(x); }
  BN_HD static V erf(const V& x) { return at::erf(x); }
  // The quotient of sigmoid in activation.h has derivatives of 0 * Inf where exp overflows.
  BN_HD static V sigmoid(const V& x) { return at::sigmoid(x); }
};

}  // namespace bn
