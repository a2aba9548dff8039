#pragma once

#include "core/problem.h"
#include "ops/operators.h"

// From tensors to problems: what every backend does before its kernel.
namespace bn::ops {

// Throws what torch throws for the same mistake. Nothing has been written by then.
void check_input(const Tensor& input);
void check_set_size(SetSize set_size);
void check_per_channel(const char* name, const OptionalTensor& t, const Tensor& input);
// A value of float64 for each statistic set and channel.
void check_statistics(const char* name, const Tensor& t, const Tensor& input, SetSize set_size);
void check_branches(const OptionalTensor& branches, const Activation& activation, const Tensor& input);
void check_inputs(const Arguments& a);
void check_inputs(const BackwardArguments& a);
void check_inputs(const MergeArguments& a);
// The values that the statistics of each set are of.
void check_counts(const Tensor& counts, const Tensor& input, SetSize set_size);
// Whether a forward can write the branches of its activation.
void check_with_branches(bool with_branches, const Activation& activation);
// Throws what would go wrong once the first of the running statistics is written. `tracked`: whether autograd, which
// refuses some, sees the writes.
void check_running_statistics(const Arguments& a, bool tracked);
void check_residual(const OptionalTensor& residual, const Tensor& input);

// A tensor that is dense in one of the two layouts, and its sizes as a problem.
struct View {
  Tensor tensor;
  Problem problem;
};

// The input itself if it is dense with its channels second or last, else a copy in the memory format that torch
// would give its output.
View view_as_problem(const Tensor& input, SetSize set_size = std::nullopt);

// An uninitialized tensor of the same layout, its strides as torch would have them.
Tensor empty_like(const View& view);

// `tensor`, of the same sizes, in the same layout: itself or a copy.
Tensor laid_out_like(const Tensor& tensor, const View& view);

// `tensor`, of an input's sizes, in the order of memory of the input's layout: itself or a copy.
Tensor laid_out(const Tensor& tensor, Layout layout);

DType dtype_of(const Tensor& tensor);

// Uninitialized branch bits for the elements of the input.
Tensor empty_branches(const Tensor& input);

// Statistics are kept in double precision: a C-sized tensor costs nothing, and the backward gets the mean
// with the digits that float loses when it is far larger than the deviation.
Tensor empty_statistics(const Tensor& input, SetSize set_size);

// The images of a statistic set, at least one, and the number of sets.
int64_t images_per_set(const Tensor& input, SetSize set_size);
int64_t sets_of(const Tensor& input, SetSize set_size);

}  // namespace bn::ops
