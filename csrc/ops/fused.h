#pragma once

#include "core/arguments.h"
#include "ops/checks.h"
#include "ops/inputs.h"

#include <ATen/OpMathType.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <type_traits>

// batch_norm_forward and batch_norm_backward for any backend: check, allocate, view as a problem, run. A backend has
// two static functions, forward(args, input) and backward(args, input), for inputs with elements.
namespace bn::ops {

// The backend of fake kernels: an operator ends when it has checked its arguments and made its results, uninitialized.
// Sizes may be symbolic.
struct Fake {
  static void forward(const ForwardArgs&, const Tensor&) {}
  static void backward(const BackwardArgs&, const Tensor&) {}
  static void merge_rows(const MergeArgs&, const Tensor&) {}
};

template <class Backend>
constexpr bool computes = !std::is_same_v<Backend, Fake>;

// One value per channel to be read; `t` has to outlive the result.
inline PerChannel per_channel(const OptionalTensor& t) {
  if (!t.has_value()) {
    return {};
  }
  const Tensor flat = t->dim() == 1 ? *t : t->view(-1);
  return {const_cast<void*>(flat.const_data_ptr()), dtype_of(flat), flat.stride(0)};
}

inline PerChannel per_channel_to_write(const OptionalTensor& t) {
  if (t.has_value()) {
    t->mutable_data_ptr();  // the data become the tensor's own
  }
  return per_channel(t);
}

// A mask that is read, as a backend takes it.
inline Mask mask_of(const OptionalTensor& mask) {
  return {mask.has_value() ? mask->const_data_ptr() : nullptr};
}

// Tells autograd that a tensor was written to.
inline void bump_version(const OptionalTensor& t) {
  if (t.has_value() && !t->is_inference()) {
    t->unsafeGetTensorImpl()->bump_version();
  }
}

inline void count_batch(const Tensor& num_batches_tracked) {
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    num_batches_tracked.add_(1);
  }
  bump_version(num_batches_tracked);
}

// Branch bits that are read.
inline uint8_t* bits_of(const OptionalTensor& branches) {
  return branches.has_value() ? const_cast<uint8_t*>(branches->const_data_ptr<uint8_t>()) : nullptr;
}

// A tensor of the input's sizes, or none, in the layout of the view.
class Operand {
 public:
  Operand(const OptionalTensor& tensor, const View& view)
      : tensor_(tensor.has_value() ? laid_out_like(*tensor, view) : Tensor()) {}

  const void* data() const { return tensor_.defined() ? tensor_.const_data_ptr() : nullptr; }

 private:
  Tensor tensor_;
};

// Where a kernel writes the gradient of a residual; null if none does: dy itself is copied.
inline void* residual_to_write(const Tensor& dresidual, const BackwardArguments& a) {
  if (!dresidual.defined()) {
    return nullptr;
  }
  if (dresidual_is_dy(a.activation.kind, a.mask.has_value())) {
    dresidual.copy_(a.dy);
    return nullptr;
  }
  return dresidual.mutable_data_ptr();
}

// All that a backward reads but parameters, sums and counts. The operands and the tensors of `a` have to outlive the
// result.
inline BackwardArgs to_read(
    const BackwardArguments& a, Stages stages, const View& x, const Operand& dy, const Operand& residual) {
  return {.problem = x.problem,
          .stages = stages,
          .dy = dy.data(),
          .x = a.input.has_value() ? x.tensor.const_data_ptr() : nullptr,
          .mask = mask_of(a.mask),
          .mean = a.mean.const_data_ptr<double>(),
          .invstd = a.invstd.const_data_ptr<double>(),
          .training = a.training,
          .epilogue = {a.activation, residual.data(), bits_of(a.branches)}};
}

template <class Backend>
FourTensors run_forward(const Arguments& a, bool with_branches) {
  Checks("batch_norm", a.input, a.set_size).forward_by_kernels(a, with_branches);
  Tensor output = empty_output(a.input);
  Tensor mean = empty_statistics(a.input, a.set_size);
  Tensor invstd = empty_statistics(a.input, a.set_size);
  Tensor branches = with_branches ? empty_branches(a.input) : Tensor();
  if constexpr (!computes<Backend>) {
    return {output, mean, invstd, branches};
  }
  const bool counts = a.training && a.num_batches_tracked.has_value();
  if (a.input.numel() == 0) {
    mean.zero_();
    invstd.zero_();
    if (counts && !a.mask.has_value()) {
      count_batch(*a.num_batches_tracked);
    }
    return {output, mean, invstd, branches};
  }
  const View x = view_as_problem(a.input, a.set_size);
  const Operand r(a.residual, x);
  const bool keeps_m2 = a.training && a.running_mean.has_value() && !x.problem.one_set();
  const Tensor m2 = keeps_m2 ? empty_statistics(a.input, a.set_size) : Tensor();
  Backend::forward(
      {.problem = x.problem,
       .stages = Stages::All,
       .x = x.tensor.const_data_ptr(),
       .mask = mask_of(a.mask),
       .weight = per_channel(a.weight),
       .bias = per_channel(a.bias),
       .running_mean = a.training ? per_channel_to_write(a.running_mean) : per_channel(a.running_mean),
       .running_var = a.training ? per_channel_to_write(a.running_var) : per_channel(a.running_var),
       .num_batches_tracked = counts ? a.num_batches_tracked->mutable_data_ptr<int64_t>() : nullptr,
       .training = a.training,
       .cumulative = counts && !a.momentum.has_value(),
       .momentum = a.momentum.value_or(0),
       .eps = a.eps,
       .epilogue = {a.activation, r.data(), with_branches ? branches.mutable_data_ptr<uint8_t>() : nullptr},
       .y = output.mutable_data_ptr(),
       .mean = mean.mutable_data_ptr<double>(),
       .invstd = invstd.mutable_data_ptr<double>(),
       .m2 = keeps_m2 ? m2.mutable_data_ptr<double>() : nullptr},
      a.input);
  if (a.training) {
    bump_version(a.num_batches_tracked);
    bump_version(a.running_mean);
    bump_version(a.running_var);
  }
  return {output, mean, invstd, branches};
}

template <class Backend>
FourTensors batch_norm_forward(const Tensor& input,
                               const OptionalTensor& weight,
                               const OptionalTensor& bias,
                               const OptionalTensor& running_mean,
                               const OptionalTensor& running_var,
                               const OptionalTensor& num_batches_tracked,
                               std::optional<double> momentum,
                               double eps,
                               const OptionalTensor& residual,
                               int64_t activation,
                               double activation_param,
                               SetSize set_size,
                               bool with_branches,
                               const OptionalTensor& mask) {
  return run_forward<Backend>(
      {input, weight, bias, running_mean, running_var, num_batches_tracked, /*training=*/true, momentum, eps, residual,
       numbered_activation(activation, activation_param), set_size, mask},
      with_branches);
}

template <class Backend>
FourTensors batch_norm_forward_evaluation(const Tensor& input,
                                          const OptionalTensor& weight,
                                          const OptionalTensor& bias,
                                          const Tensor& running_mean,
                                          const Tensor& running_var,
                                          double eps,
                                          const OptionalTensor& residual,
                                          int64_t activation,
                                          double activation_param,
                                          bool with_branches,
                                          const OptionalTensor& mask) {
  return run_forward<Backend>(
      {input, weight, bias, running_mean, running_var, /*num_batches_tracked=*/std::nullopt, /*training=*/false,
       /*momentum=*/std::nullopt, eps, residual, numbered_activation(activation, activation_param),
       /*set_size=*/std::nullopt, mask},
      with_branches);
}

template <class Backend>
FourTensors batch_norm_backward(const Tensor& dy,
                                const OptionalTensor& input,
                                const OptionalTensor& weight,
                                const OptionalTensor& bias,
                                const Tensor& mean,
                                const Tensor& invstd,
                                bool training,
                                const OptionalTensor& residual,
                                const OptionalTensor& branches,
                                int64_t activation_number,
                                double activation_param,
                                SetSize set_size,
                                std::array<bool, 4> output_mask,
                                const OptionalTensor& mask) {
  const Activation activation = numbered_activation(activation_number, activation_param);
  const BackwardArguments a{dy,       input,    weight,     bias,     mean,        invstd, training,
                            residual, branches, activation, set_size, output_mask, mask};
  const Tensor& like = a.like();
  const Checks checks("batch_norm_backward", like, set_size);
  checks.backward(a);
  checks.per_channel("weight", weight);
  checks.per_channel("bias", bias);
  const auto [wants_dx, wants_dweight, wants_dbias, wants_dresidual] = output_mask;
  const auto parameter =
      mean.options().dtype(weight.has_value() ? weight->scalar_type() : at::toOpMathType(like.scalar_type()));
  Tensor dx = wants_dx ? empty_output(like) : Tensor();
  Tensor dweight = wants_dweight ? at::empty_symint({like.sym_size(1)}, parameter) : Tensor();
  Tensor dbias = wants_dbias ? at::empty_symint({like.sym_size(1)}, parameter) : Tensor();
  Tensor dresidual = wants_dresidual ? empty_output(like) : Tensor();
  if constexpr (!computes<Backend>) {
    return {dx, dweight, dbias, dresidual};
  }
  if (like.numel() == 0) {
    for (const Tensor& sum : {dweight, dbias}) {
      if (sum.defined()) {
        sum.zero_();
      }
    }
    return {dx, dweight, dbias, dresidual};
  }
  const View x = view_as_problem(like, set_size);
  const Operand g(dy, x);
  const Operand r(residual, x);
  BackwardArgs args = to_read(a, Stages::All, x, g, r);
  args.weight = per_channel(weight);
  args.bias = per_channel(bias);
  args.dx = wants_dx ? dx.mutable_data_ptr() : nullptr;
  args.dresidual = residual_to_write(dresidual, a);
  args.dweight = wants_dweight ? per_channel_to_write(dweight) : PerChannel{};
  args.dbias = wants_dbias ? per_channel_to_write(dbias) : PerChannel{};
  Tensor sum_dz, sum_dz_xmu;
  if ((wants_dweight || wants_dbias) && !x.problem.one_set()) {
    sum_dz = empty_statistics(like, set_size);
    sum_dz_xmu = empty_statistics(like, set_size);
    args.sum_dz = sum_dz.mutable_data_ptr<double>();
    args.sum_dz_xmu = sum_dz_xmu.mutable_data_ptr<double>();
  }
  Backend::backward(args, like);
  return {dx, dweight, dbias, dresidual};
}

}  // namespace bn::ops
