#include "ops/inputs.h"

#include "core/arguments.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/SymBool.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>

namespace bn::ops {
namespace {

bool is_floating(at::ScalarType type) {
  return type == at::kDouble || type == at::kFloat || type == at::kHalf || type == at::kBFloat16;
}

// (N, L, C) seen as (N, C, L), which is no memory format of torch. As torch does, a GPU keeps it, and a CPU makes it
// contiguous, at the cost of a copy.
bool rows_of_channels(const Tensor& t) {
  return t.is_cuda() && t.dim() == 3 && !t.is_contiguous() && t.stride(1) == 1 && t.stride(2) == t.size(1) &&
         (t.size(0) == 1 || t.stride(0) == t.size(1) * t.size(2));
}

// That of torch's output for `t`.
at::MemoryFormat memory_format(const Tensor& t) {
  if (!t.is_contiguous()) {
    for (const auto format : {at::MemoryFormat::ChannelsLast, at::MemoryFormat::ChannelsLast3d}) {
      if (t.is_contiguous(format)) {
        return format;
      }
    }
  }
  return t.suggest_memory_format();
}

// Throws unless `fits`, and `t` has this many values on `device`.
void check_values(const char* op,
                  const char* name,
                  const Tensor& t,
                  int64_t values,
                  bool fits,
                  at::Device device,
                  const char* of_type) {
  TORCH_CHECK(fits && t.numel() == values && t.device() == device, op, ": ", name, " should hold ", values, " values",
              of_type, " on ", device, ", got ", t.sizes(), " of type ", t.scalar_type(), " on ", t.device());
}

void check_doubles(const char* op, const char* name, const Tensor& t, int64_t values, at::Device device) {
  check_values(op, name, t, values, t.scalar_type() == at::kDouble && t.is_contiguous(), device, " of type Double");
}

void check_like_input(const char* name, const Tensor& t, const Tensor& input) {
  TORCH_CHECK(t.sizes() == input.sizes() && t.scalar_type() == input.scalar_type() && t.device() == input.device(),
              "batch_norm: expected ", name, " like the input, ", input.sizes(), " of type ", input.scalar_type(),
              " on ", input.device(), ", got ", t.sizes(), " of type ", t.scalar_type(), " on ", t.device());
}

}  // namespace

int64_t images_per_set(const Tensor& input, SetSize set_size) {
  const int64_t n = std::max<int64_t>(input.size(0), 1);
  return std::min(set_size.value_or(n), n);
}

int64_t sets_of(const Tensor& input, SetSize set_size) {
  return set_size.has_value() ? divide_up(input.size(0), images_per_set(input, set_size)) : 1;
}

void check_set_size(SetSize set_size) {
  TORCH_CHECK_VALUE(set_size.value_or(1) > 0, "batch_norm: set_size should be positive, got ", *set_size);
}

void check_input(const Tensor& input) {
  TORCH_CHECK_NOT_IMPLEMENTED(is_floating(input.scalar_type()), "\"batch_norm\" not implemented for '",
                              input.scalar_type(), "'");
  TORCH_CHECK(input.dim() >= 2, "batch_norm: input should have sizes (N, C, ...), got ", input.sym_sizes());
}

void check_per_channel(const char* name, const OptionalTensor& t, const Tensor& input) {
  if (!t.has_value()) {
    return;
  }
  TORCH_CHECK(t->device() == input.device(), "batch_norm: ", name, " is on ", t->device(), " but input is on ",
              input.device());
  TORCH_SYM_CHECK(t->sym_numel().sym_eq(input.sym_size(1)), name, " should contain ", input.sym_size(1),
                  " elements not ", t->sym_numel());
  const bool reduced = input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16;
  TORCH_CHECK(t->scalar_type() == input.scalar_type() || (reduced && t->scalar_type() == at::kFloat),
              "batch_norm: expected ", name, " of type ", input.scalar_type(), reduced ? " or Float" : "",
              " for an input of type ", input.scalar_type(), ", got ", t->scalar_type());
}

void check_statistics(const char* name, const Tensor& t, const Tensor& input, SetSize set_size) {
  const int64_t values = sets_of(input, set_size) * input.size(1);
  TORCH_CHECK(!set_size.has_value() || t.numel() != values || t.size(-1) == input.size(1), "batch_norm: ", name,
              " should have sizes (sets, C), ", sets_of(input, set_size), " and ", input.size(1), ", got ", t.sizes());
  check_doubles("batch_norm", name, t, values, input.device());
}

void check_branches(const OptionalTensor& branches, const Activation& activation, const Tensor& input) {
  if (!branches.has_value()) {
    return;
  }
  const int64_t bytes = branch_bytes(input.numel());
  TORCH_CHECK(has_branches(activation), "batch_norm_backward: ", name_of(activation), " takes no branches");
  const bool fits = branches->scalar_type() == at::kByte && branches->is_contiguous();
  check_values("batch_norm_backward", "branches", *branches, bytes, fits, input.device(), " of type Byte");
}

void check_inputs(const Arguments& a) {
  check_input(a.input);
  check_set_size(a.set_size);
  if (a.training) {
    c10::SymInt count = a.set_size.has_value() ? a.input.sym_size(0).min(*a.set_size) : a.input.sym_size(0);
    for (const c10::SymInt& size : a.input.sym_sizes().slice(2)) {
      count *= size;
    }
    TORCH_CHECK_VALUE(!TORCH_GUARD_OR_FALSE(count.sym_eq(1)),
                      "Expected more than 1 value per channel when training, got input size torch.Size(",
                      a.input.sym_sizes(), ")");
    TORCH_CHECK_VALUE(a.eps > 0, "batch_norm eps must be positive during training, but got ", a.eps);
  } else {
    TORCH_CHECK_VALUE(a.eps >= 0, "batch_norm eps must be non-negative, but got ", a.eps);
    TORCH_CHECK(a.running_mean.has_value() && a.running_var.has_value(),
                "running_mean and running_var must be defined in evaluation mode");
  }
  TORCH_CHECK_VALUE(a.running_mean.has_value() == a.running_var.has_value(),
                    "running_mean and running_var must either both be None or neither be None");
  check_per_channel("running_mean", a.running_mean, a.input);
  check_per_channel("running_var", a.running_var, a.input);
  check_per_channel("weight", a.weight, a.input);
  check_per_channel("bias", a.bias, a.input);
  if (a.num_batches_tracked.has_value()) {
    const Tensor& count = *a.num_batches_tracked;
    TORCH_CHECK(
        c10::canCast(at::kLong, count.scalar_type()) && count.sym_numel() == 1 && count.device() == a.input.device(),
        "batch_norm: num_batches_tracked should be one number on ", a.input.device(), ", got ", count.sym_sizes(),
        " of type ", count.scalar_type(), " on ", count.device());
  }
}

void check_running_statistics(const Arguments& a, bool tracked) {
  const auto check = [&](const char* name, const OptionalTensor& t, bool is_tracked) {
    if (!t.has_value()) {
      return;
    }
    TORCH_CHECK(!at::GradMode::is_enabled() || !t->requires_grad(), "batch_norm: ", name, " cannot require gradients");
    if (a.training) {
      at::assert_no_internal_overlap(*t);
      TORCH_CHECK(!is_tracked || !t->is_inference() || c10::InferenceMode::is_enabled(),
                  "Inplace update to inference tensor outside InferenceMode is not allowed: clone ", name);
    }
  };
  check("running_mean", a.running_mean, tracked);
  check("running_var", a.running_var, tracked);
  check("num_batches_tracked", a.num_batches_tracked, true);  // torch's modules count by an operator of its own
}

void check_inputs(const BackwardArguments& a) {
  const Tensor& input = a.like();
  check_input(input);
  check_set_size(a.set_size);
  TORCH_CHECK(a.input.has_value() || !needs_input(a.training, a.output_mask[1], a.activation, a.branches.has_value()),
              "batch_norm_backward: input is needed in training, for the gradient of weight, and for an activation "
              "without branch bits");
  check_like_input("dy", a.dy, input);
  check_per_channel("weight", a.weight, input);
  check_per_channel("bias", a.bias, input);
  check_statistics("mean", a.mean, input, a.set_size);
  check_statistics("invstd", a.invstd, input, a.set_size);
  check_residual(a.residual, input);
  check_branches(a.branches, a.activation, input);
}

void check_counts(const Tensor& counts, const Tensor& input, SetSize set_size) {
  check_doubles("batch_norm", "count", counts, sets_of(input, set_size), input.device());
}

void check_inputs(const MergeArguments& a) {
  TORCH_CHECK(a.means.dim() == 1 || a.means.dim() == 2,
              "batch_norm_merge_stats: mean should have sizes (rows, C) or (C,), got ", a.means.sizes());
  const int64_t c = a.means.size(-1);
  const int64_t rows = a.means.dim() == 1 ? 1 : a.means.size(0);
  const auto check = [&](const char* name, const Tensor& t, int64_t values) {
    check_doubles("batch_norm_merge_stats", name, t, values, a.means.device());
  };
  check("count", a.counts, rows);
  check("mean", a.means, rows * c);
  check("m2", a.m2s, rows * c);
  TORCH_CHECK(a.m2s.sizes() == a.means.sizes(), "batch_norm_merge_stats: m2 should have the sizes of mean, ",
              a.means.sizes(), ", got ", a.m2s.sizes());
  TORCH_CHECK_VALUE(a.eps >= 0, "batch_norm_merge_stats: eps must be non-negative, but got ", a.eps);
  TORCH_CHECK_VALUE(a.running_mean.has_value() == a.running_var.has_value(),
                    "running_mean and running_var must either both be None or neither be None");
  const auto check_written = [&](const char* name, const OptionalTensor& t, int64_t values, auto fits) {
    if (t.has_value()) {
      at::assert_no_internal_overlap(*t);
      TORCH_CHECK(!t->requires_grad(), "batch_norm_merge_stats: ", name, " cannot require gradients");
      TORCH_CHECK(t->dim() <= 1 || t->is_contiguous(), "batch_norm_merge_stats: ", name, " should be contiguous");
      check_values("batch_norm_merge_stats", name, *t, values, fits(t->scalar_type()), a.means.device(), "");
    }
  };
  check_written("running_mean", a.running_mean, c, is_floating);
  check_written("running_var", a.running_var, c, is_floating);
  check_written("num_batches_tracked", a.num_batches_tracked, 1, [](at::ScalarType type) { return type == at::kLong; });
  TORCH_CHECK_VALUE(!a.running_mean.has_value() || a.momentum.has_value() || a.num_batches_tracked.has_value(),
                    "batch_norm_merge_stats: a cumulative average needs num_batches_tracked");
}

void check_with_branches(bool with_branches, const Activation& activation) {
  TORCH_CHECK(!with_branches || has_branches(activation), "batch_norm_forward: ", name_of(activation),
              " has no branches");
}

void check_residual(const OptionalTensor& residual, const Tensor& input) {
  if (residual.has_value()) {
    check_like_input("residual", *residual, input);
  }
}

View view_as_problem(const Tensor& input, SetSize set_size) {
  const Tensor t = rows_of_channels(input) ? input : input.contiguous(memory_format(input));
  const Layout layout = t.is_contiguous() ? Layout::Planar : Layout::Interleaved;
  int64_t s = 1;
  for (const int64_t size : t.sizes().slice(2)) {
    s *= size;
  }
  return {t, problem_of(layout, dtype_of(t), t.size(0), t.size(1), s, images_per_set(t, set_size))};
}

Tensor empty_like(const View& view) {
  const Tensor& t = view.tensor;
  return at::empty_like(t, rows_of_channels(t) ? at::MemoryFormat::Preserve : memory_format(t));
}

Tensor laid_out_like(const Tensor& tensor, const View& view) {
  const Tensor& t = view.tensor;
  const bool same = rows_of_channels(t) ? rows_of_channels(tensor) : tensor.is_contiguous(memory_format(t));
  return same ? tensor : empty_like(view).copy_(tensor);
}

Tensor laid_out(const Tensor& tensor, Layout layout) {
  return layout == Layout::Planar ? tensor.contiguous() : tensor.movedim(1, -1).contiguous().movedim(-1, 1);
}

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::Float64;
    case at::kHalf:
      return DType::Half;
    case at::kBFloat16:
      return DType::BFloat16;
    default:
      return DType::Float32;
  }
}

Tensor empty_branches(const Tensor& input) {
  const auto options = input.options().dtype(at::kByte).memory_format(std::nullopt);
  return at::empty({branch_bytes(input.numel())}, options);
}

Tensor empty_statistics(const Tensor& input, SetSize set_size) {
  const std::array<int64_t, 2> sizes{sets_of(input, set_size), input.size(1)};
  const auto options = input.options().dtype(at::kDouble).memory_format(std::nullopt);
  return at::empty(at::IntArrayRef(sizes).slice(set_size.has_value() ? 0 : 1), options);
}

}  // namespace bn::ops
