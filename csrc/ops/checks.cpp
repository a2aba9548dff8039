#include "ops/checks.h"

#include "core/pass.h"
#include "ops/inputs.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/OpMathType.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/SymBool.h>
#include <c10/util/Exception.h>

namespace bn::ops {
namespace {

bool is_floating(at::ScalarType type) {
  return type == at::kDouble || type == at::kFloat || type == at::kHalf || type == at::kBFloat16;
}

bool is_half(at::ScalarType type) {
  return type == at::kHalf || type == at::kBFloat16;
}

bool is_there(const OptionalTensor& t) {
  return t.has_value() && t->defined();
}

// Throws unless `t` holds so many values on `device`, of a type that `fits`; `types` names those that do.
void check_values(const char* op,
                  const char* name,
                  const Tensor& t,
                  const c10::SymInt& number,
                  at::Device device,
                  bool fits,
                  const char* types) {
  TORCH_CHECK(t.device() == device, op, ": ", name, " is on ", t.device(), " but should be on ", device);
  TORCH_CHECK(fits, op, ": expected ", name, " of type ", types, ", got ", t.scalar_type());
  TORCH_SYM_CHECK(t.sym_numel().sym_eq(number), op, ": ", name, " should hold ", number, " values, got sizes ",
                  t.sym_sizes());
}

void check_contiguous(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK(t.is_contiguous(), op, ": ", name, " should be contiguous, got strides ", t.sym_strides(), " for sizes ",
              t.sym_sizes());
}

void check_sizes(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  const auto expect = [&](bool same) {
    TORCH_CHECK(same, op, ": expected ", name, " like ", other_name, ", of sizes ", other.sym_sizes(), ", got ",
                t.sym_sizes());
  };
  expect(t.dim() == other.dim());
  for (int64_t d = 0; d < t.dim(); ++d) {
    expect(t.sym_size(d).sym_eq(other.sym_size(d)).expect_true(__FILE__, __LINE__));
  }
}

// Whether two tensors share some of their memory, but do not begin at the same place of it.
bool overlap_in_part(const Tensor& a, const Tensor& b) {
  const auto storage_of = [](const Tensor& t) {
    return t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  };
  if (storage_of(a) != storage_of(b) || storage_of(a) == nullptr || !a.is_contiguous() || !b.is_contiguous()) {
    return false;
  }
  const auto first_byte = [](const Tensor& t) { return t.sym_storage_offset() * static_cast<int64_t>(t.itemsize()); };
  const auto bytes = [](const Tensor& t) { return t.sym_numel() * static_cast<int64_t>(t.itemsize()); };
  const c10::SymInt behind = first_byte(b) - first_byte(a);
  return TORCH_GUARD_OR_FALSE(behind.sym_ne(0)) && TORCH_GUARD_OR_FALSE(behind.sym_lt(bytes(a))) &&
         TORCH_GUARD_OR_FALSE((-behind).sym_lt(bytes(b)));
}

// Refuses running statistics with elements that are written to twice, in an order that is not fixed. The same tensor
// given twice is no such case: the variance is written last, as by torch.
void check_written(const char* op, const OptionalTensor& running_mean, const OptionalTensor& running_var) {
  TORCH_CHECK_VALUE(running_mean.has_value() == running_var.has_value(),
                    "running_mean and running_var must either both be None or neither be None");
  if (running_mean.has_value()) {
    at::assert_no_internal_overlap(*running_mean);
    at::assert_no_internal_overlap(*running_var);
    TORCH_CHECK(!overlap_in_part(*running_mean, *running_var), op,
                ": running_mean and running_var share some of their memory: clone one of them");
  }
}

}  // namespace

void check_set_size(const char* op, SetSize set_size) {
  TORCH_CHECK_VALUE(set_size.value_or(1) > 0, op, ": set_size should be positive, got ", *set_size);
}

void check_mask(const Tensor& input, const Tensor& mask) {
  TORCH_CHECK(!mask.is_nested(), "batch_norm: expected a mask of one tensor, got a nested tensor");
  const auto expect = [&](bool fits) {
    TORCH_CHECK_VALUE(fits, "batch_norm: expected a mask of sizes (N, *) for an input (N, C, *) of sizes ",
                      input.sym_sizes(), ", got ", mask.sym_sizes());
  };
  expect(input.dim() >= 2 && mask.dim() == input.dim() - 1);
  for (int64_t d = 0; d < mask.dim(); ++d) {
    expect(mask.sym_size(d).sym_eq(input.sym_size(d == 0 ? 0 : d + 1)).expect_true(__FILE__, __LINE__));
  }
  TORCH_CHECK(mask.device() == input.device(), "batch_norm: mask is on ", mask.device(), " but input is on ",
              input.device());
  TORCH_CHECK(!mask.is_complex() && mask.layout() == at::kStrided && !mask.is_quantized(),
              "batch_norm: expected a strided mask of type Bool or of real numbers, got ", mask.layout(), " of type ",
              mask.scalar_type());
  TORCH_CHECK(!at::GradMode::is_enabled() || !mask.requires_grad(), "batch_norm: mask cannot require gradients");
}

Checks::Checks(const char* op, const Tensor& input, SetSize set_size) : op_(op), input_(input), set_size_(set_size) {
  TORCH_CHECK_NOT_IMPLEMENTED(is_floating(input.scalar_type()), "\"", op, "\" not implemented for '",
                              input.scalar_type(), "'");
  TORCH_CHECK(input.dim() >= 2, op, ": input should have sizes (N, C, ...), got ", input.sym_sizes());
  check_set_size(op, set_size);
}

void Checks::values(const char* name, const Tensor& t, const c10::SymInt& number, at::ScalarType type) const {
  check_values(op_, name, t, number, input_.device(), t.scalar_type() == type, toString(type));
  check_contiguous(op_, name, t);
}

void Checks::of_parameters_type(const char* name, const Tensor& t) const {
  TORCH_CHECK(t.device() == input_.device(), op_, ": ", name, " is on ", t.device(), " but input is on ",
              input_.device());
  const at::ScalarType type = input_.scalar_type();
  TORCH_CHECK(t.scalar_type() == type || (is_half(type) && t.scalar_type() == at::kFloat), op_, ": expected ", name,
              " of type ", type, is_half(type) ? " or Float" : "", " for an input of type ", type, ", got ",
              t.scalar_type());
}

void Checks::per_channel(const char* name, const OptionalTensor& t) const {
  if (!t.has_value()) {
    return;
  }
  of_parameters_type(name, *t);
  TORCH_SYM_CHECK(t->sym_numel().sym_eq(input_.sym_size(1)), name, " should contain ", input_.sym_size(1),
                  " elements not ", t->sym_numel());
}

void Checks::parameter(const char* name, const OptionalTensor& t) const {
  if (!t.has_value() || t->dim() != 2 || !set_size_.has_value()) {
    per_channel(name, t);
    return;
  }
  of_parameters_type(name, *t);
  const c10::SymInt sets = sets_of(input_, set_size_);
  TORCH_SYM_CHECK(t->sym_size(0).sym_eq(sets).sym_and(t->sym_size(1).sym_eq(input_.sym_size(1))), op_, ": ", name,
                  " should have sizes (C,) or (sets, C), ", sets, " and ", input_.sym_size(1), ", got ",
                  t->sym_sizes());
}

void Checks::statistics(const char* name, const Tensor& t) const {
  const c10::SymInt sets = sets_of(input_, set_size_);
  values(name, t, sets * input_.sym_size(1), at::kDouble);
  if (set_size_.has_value()) {
    TORCH_CHECK(t.dim() > 0 && TORCH_GUARD_OR_TRUE(t.sym_size(-1).sym_eq(input_.sym_size(1))), op_, ": ", name,
                " should have sizes (sets, C), ", sets, " and ", input_.sym_size(1), ", got ", t.sym_sizes());
  }
}

void Checks::counts(const Tensor& t) const {
  values("count", t, sets_of(input_, set_size_), at::kDouble);
}

void Checks::mask(const OptionalTensor& t) const {
  if (t.has_value()) {
    c10::SymInt positions = input_.sym_size(0);
    for (const c10::SymInt& size : input_.sym_sizes().slice(2)) {
      positions *= size;
    }
    values("mask", *t, positions, at::toOpMathType(input_.scalar_type()));
  }
}

void Checks::like_input(const char* name, const OptionalTensor& t) const {
  if (!t.has_value()) {
    return;
  }
  TORCH_CHECK(t->scalar_type() == input_.scalar_type() && t->device() == input_.device(), op_, ": expected ", name,
              " like the input, of type ", input_.scalar_type(), " on ", input_.device(), ", got ", t->scalar_type(),
              " on ", t->device());
  check_sizes(op_, name, *t, "the input", input_);
}

void Checks::branches(const OptionalTensor& t, const Activation& activation) const {
  if (t.has_value()) {
    TORCH_CHECK(has_branches(activation), op_, ": ", name_of(activation), " takes no branches");
    values("branches", *t, branch_bytes(input_.sym_numel()), at::kByte);
  }
}

void Checks::writes_branches(bool with_branches, const Activation& activation) const {
  TORCH_CHECK(!with_branches || has_branches(activation), op_, ": ", name_of(activation), " has no branches");
}

void Checks::backward(const BackwardArguments& a) const {
  TORCH_CHECK(a.input.has_value() || !needs_input(a.training, a.output_mask[1], a.activation, a.branches.has_value()),
              op_,
              ": input is needed in training, for the gradient of weight, and for an activation without branch bits");
  like_input("dy", a.dy);
  statistics("mean", a.mean);
  statistics("invstd", a.invstd);
  like_input("residual", a.residual);
  mask(a.mask);
  branches(a.branches, a.activation);
}

void Checks::forward(const Arguments& a) const {
  if (a.training) {
    c10::SymInt count = set_size_.has_value() ? input_.sym_size(0).min(*set_size_) : input_.sym_size(0);
    for (const c10::SymInt& size : input_.sym_sizes().slice(2)) {
      count *= size;
    }
    TORCH_CHECK_VALUE(!TORCH_GUARD_OR_FALSE(count.sym_eq(1)),
                      "Expected more than 1 value per channel when training, got input size torch.Size(",
                      input_.sym_sizes(), ")");
    TORCH_CHECK_VALUE(a.eps > 0, op_, " eps must be positive during training, but got ", a.eps);
    check_written(op_, a.running_mean, a.running_var);
  } else {
    TORCH_CHECK_VALUE(a.eps >= 0, op_, " eps must be non-negative, but got ", a.eps);
    TORCH_CHECK(is_there(a.running_mean) && is_there(a.running_var),
                "running_mean and running_var must be defined in evaluation mode");
  }
  per_channel("running_mean", a.running_mean);
  per_channel("running_var", a.running_var);
  per_channel("weight", a.weight);
  per_channel("bias", a.bias);
  if (a.num_batches_tracked.has_value()) {
    const Tensor& count = *a.num_batches_tracked;
    TORCH_CHECK(c10::canCast(at::kLong, count.scalar_type()) && TORCH_GUARD_OR_FALSE(count.sym_numel().sym_eq(1)) &&
                    count.device() == input_.device(),
                op_, ": num_batches_tracked should be one number on ", input_.device(), ", got sizes ",
                count.sym_sizes(), " of type ", count.scalar_type(), " on ", count.device());
  }
}

void Checks::forward_by_kernels(const Arguments& a, bool with_branches) const {
  forward(a);
  like_input("residual", a.residual);
  mask(a.mask);
  TORCH_CHECK(!a.num_batches_tracked.has_value() || a.num_batches_tracked->scalar_type() == at::kLong, op_,
              ": expected num_batches_tracked of type Long, got ", a.num_batches_tracked->scalar_type());
  writes_branches(with_branches, a.activation);
}

void check_merge(const MergeArguments& a) {
  constexpr const char* op = "batch_norm_merge_stats";
  TORCH_CHECK(a.means.dim() == 1 || a.means.dim() == 2, op, ": mean should have sizes (rows, C) or (C,), got ",
              a.means.sym_sizes());
  const c10::SymInt channels = a.means.sym_size(-1);
  const c10::SymInt rows = a.means.dim() == 1 ? c10::SymInt(1) : a.means.sym_size(0);
  const at::Device device = a.means.device();
  const auto check_read = [&](const char* name, const Tensor& t, const c10::SymInt& number) {
    check_values(op, name, t, number, device, t.scalar_type() == at::kDouble, "Double");
    check_contiguous(op, name, t);
  };
  check_read("count", a.counts, rows);
  check_read("mean", a.means, rows * channels);
  check_read("m2", a.m2s, rows * channels);
  check_sizes(op, "m2", a.m2s, "mean", a.means);
  TORCH_CHECK_VALUE(a.eps >= 0, op, ": eps must be non-negative, but got ", a.eps);
  check_written(op, a.running_mean, a.running_var);
  for (const auto& [name, t] : {std::pair{"running_mean", &a.running_mean}, {"running_var", &a.running_var}}) {
    if (t->has_value()) {
      check_values(op, name, **t, channels, device, is_floating((*t)->scalar_type()),
                   "Double, Float, Half or BFloat16");
      TORCH_CHECK(!(*t)->requires_grad(), op, ": ", name, " cannot require gradients");
      TORCH_CHECK((*t)->dim() <= 1 || (*t)->is_contiguous(), op, ": ", name, " should be contiguous or of sizes (C,)");
    }
  }
  if (a.num_batches_tracked.has_value()) {
    const Tensor& count = *a.num_batches_tracked;
    check_values(op, "num_batches_tracked", count, 1, device, count.scalar_type() == at::kLong, "Long");
  }
  TORCH_CHECK_VALUE(!a.running_mean.has_value() || a.momentum.has_value() || a.num_batches_tracked.has_value(), op,
                    ": a cumulative average needs num_batches_tracked");
}

void check_running_statistics(const Arguments& a, bool tracked) {
  const auto check = [&](const char* name, const OptionalTensor& t, bool is_tracked) {
    if (!t.has_value()) {
      return;
    }
    TORCH_CHECK(!at::GradMode::is_enabled() || !t->requires_grad(), "batch_norm: ", name, " cannot require gradients");
    TORCH_CHECK(!a.training || !is_tracked || !t->is_inference() || c10::InferenceMode::is_enabled(),
                "Inplace update to inference tensor outside InferenceMode is not allowed: clone ", name);
  };
  check("running_mean", a.running_mean, tracked);
  check("running_var", a.running_var, tracked);
  check("num_batches_tracked", a.num_batches_tracked, true);  // torch's modules count by an operator of its own
}

}  // namespace bn::ops
