// Every operator's schema, and the Python module that loads them.

#include "cpu/batch_norm.h"

#include <pybind11/pybind11.h>
#include <torch/library.h>

TORCH_LIBRARY(bn_ext, m) {
  m.set_python_module("bn_ext._fake");
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  // Normalizes, differentiably; in training updates running_mean, running_var and num_batches_tracked.
  // Without a momentum the running statistics are cumulative averages over num_batches_tracked batches.
  m.def(
      "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps) -> Tensor",
      tags);

  // The same below autograd. mean and invstd, (C,) in float64, are those that were used.
  m.def(
      "batch_norm_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps) "
      "-> (Tensor output, Tensor mean, Tensor invstd)",
      tags);

  // Gradients with respect to input, weight and bias; those not in the mask have no elements.
  m.def(
      "batch_norm_backward(Tensor dy, Tensor input, Tensor? weight, Tensor mean, Tensor invstd, bool training, "
      "bool[3] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias)",
      tags);
}

PYBIND11_MODULE(_C, m) {
  m.def("instruction_set", &bn::cpu::instruction_set);
}
