// Every operator's schema.

#include <torch/library.h>

#include <vector>

TORCH_LIBRARY(bn_ext, m) {
  m.set_python_module("bn_ext._fake");
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  // activation(normalized + residual), differentiably; in training updates running_mean, running_var and
  // num_batches_tracked. Without a momentum the running statistics are cumulative averages over num_batches_tracked
  // batches. mask, (N, *) for an input (N, C, *), says how much each value counts: bool, or numbers. Where it is not
  // positive, the output is 0.
  m.def(
      "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, Tensor? residual=None, "
      "str? activation=None, float? activation_param=None, int? set_size=None, Tensor? mask=None) -> Tensor",
      tags);

  // A mask of batch_norm as the operators below take it: of the type that the input is summed in, and 0 for what is not
  // positive. relative: to the largest.
  m.def("batch_norm_mask(Tensor input, Tensor mask, bool relative=False) -> Tensor", tags);

  // batch_norm below autograd: one operator for training, and one for evaluation, which writes to nothing. mean and
  // invstd are the statistics that normalized the input, in float64: (C,), or with a set_size (sets, C). branches, of
  // bytes, has a bit for each element in the order of memory: the branch of the activation; None without with_branches.
  // The activation is a number, its place in the list of activations. The mask of these operators is that of
  // batch_norm_mask.
  m.def(
      "batch_norm_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, "
      "Tensor? residual, int activation, float activation_param, int? set_size, bool with_branches, Tensor? mask=None) "
      "-> (Tensor output, Tensor mean, Tensor invstd, Tensor branches)",
      tags);
  m.def(
      "batch_norm_forward.evaluation(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, "
      "Tensor running_var, float eps, Tensor? residual, int activation, float activation_param, bool with_branches, "
      "Tensor? mask=None) "
      "-> (Tensor output, Tensor mean, Tensor invstd, Tensor branches)",
      tags);

  // Gradients with respect to input, weight, bias and residual; None for those not in output_mask. An activation needs
  // input and residual, or branches. The gradient of the weight needs the input, and so does training. Without an input
  // dy is in the input's layout.
  m.def(
      "batch_norm_backward(Tensor dy, Tensor? input, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, "
      "bool training, Tensor? residual, Tensor? branches, int activation, float activation_param, int? set_size, "
      "bool[4] output_mask, Tensor? mask=None) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
      tags);

  // The stages of both. Statistics and sums are of type float64: of sizes (C,), or with a set_size (sets, C), a row for
  // each set of set_size images, the last of which may have fewer. Counts have sizes () or (sets,); weight and bias
  // (C,) or (sets, C).
  m.def(
      "batch_norm_stats(Tensor input, int? set_size=None, Tensor? mask=None) -> (Tensor count, Tensor mean, Tensor m2)",
      tags);

  // Merges rows in their order, and moves the running statistics towards the statistics of all of them.
  m.def(
      "batch_norm_merge_stats(Tensor count, Tensor mean, Tensor m2, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, float? momentum, float eps) -> (Tensor count, Tensor mean, Tensor invstd)",
      tags);

  m.def(
      "batch_norm_elemt(Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, Tensor? residual, "
      "int activation, float activation_param, int? set_size, bool with_branches, Tensor? mask=None) "
      "-> (Tensor output, Tensor branches)",
      tags);

  // dz is the gradient with respect to what goes into the activation, xmu = input - mean.
  m.def(
      "batch_norm_backward_reduce(Tensor dy, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, "
      "Tensor? residual, Tensor? branches, int activation, float activation_param, int? set_size, Tensor? mask=None) "
      "-> (Tensor sum_dz, Tensor sum_dz_xmu)",
      tags);

  // The gradient goes through the statistics of `count` values, whose sums are given.
  m.def(
      "batch_norm_backward_elemt(Tensor dy, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, "
      "Tensor sum_dz, Tensor sum_dz_xmu, Tensor count, Tensor? residual, Tensor? branches, int activation, "
      "float activation_param, int? set_size, bool[2] output_mask, Tensor? mask=None) -> (Tensor dx, Tensor dresidual)",
      tags);
}
