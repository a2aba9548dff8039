#include "ops/inputs.h"

#include "core/pass.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/SymIntArrayRef.h>

#include <algorithm>
#include <array>

namespace bn::ops {
namespace {

// (N, L, C) seen as (N, C, L), which is no memory format of torch. As torch does, a GPU keeps it, and a CPU makes it
// contiguous, at the cost of a copy.
bool rows_of_channels(const Tensor& t) {
  return t.is_cuda() && t.dim() == 3 && !t.is_contiguous() && t.sym_stride(1) == 1 &&
         t.sym_stride(2) == t.sym_size(1) && (t.sym_size(0) == 1 || t.sym_stride(0) == t.sym_size(1) * t.sym_size(2));
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

}  // namespace

int64_t images_per_set(const Tensor& input, SetSize set_size) {
  const int64_t n = std::max<int64_t>(input.size(0), 1);
  return std::min(set_size.value_or(n), n);
}

c10::SymInt sets_of(const Tensor& input, SetSize set_size) {
  if (!set_size.has_value()) {
    return 1;
  }
  const int64_t images = std::min(*set_size, kMostImages);
  return (input.sym_size(0) + (images - 1)) / images;
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

Tensor empty_output(const Tensor& input) {
  return at::empty_like(input, rows_of_channels(input) ? at::MemoryFormat::Preserve : memory_format(input));
}

Tensor laid_out_like(const Tensor& tensor, const View& view) {
  const Tensor& t = view.tensor;
  const bool same = rows_of_channels(t) ? rows_of_channels(tensor) : tensor.is_contiguous(memory_format(t));
  return same ? tensor : empty_output(t).copy_(tensor);
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
  const auto options = input.options().dtype(at::kByte);
  return at::empty_symint({branch_bytes(input.sym_numel())}, options);
}

Tensor empty_statistics(const Tensor& input, SetSize set_size) {
  const std::array<c10::SymInt, 2> sizes{sets_of(input, set_size), input.sym_size(1)};
  const auto options = input.options().dtype(at::kDouble);
  return at::empty_symint(c10::SymIntArrayRef(sizes).slice(set_size.has_value() ? 0 : 1), options);
}

Tensor empty_counts(const Tensor& input, SetSize set_size) {
  const auto options = input.options().dtype(at::kDouble);
  return set_size.has_value() ? at::empty_symint({sets_of(input, set_size)}, options) : at::empty({}, options);
}

}  // namespace bn::ops
