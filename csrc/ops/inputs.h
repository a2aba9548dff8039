#pragma once

#include "core/problem.h"
#include "ops/operators.h"

#include <c10/core/SymInt.h>

// From tensors to problems: what every backend does before its kernel. Results are made for symbolic sizes too.
namespace bn::ops {

// A tensor that is dense in one of the two layouts, and its sizes as a problem.
struct View {
  Tensor tensor;
  Problem problem;
};

// The input itself if it is dense with its channels second or last, else a copy in the memory format that torch
// would give its output.
View view_as_problem(const Tensor& input, SetSize set_size = std::nullopt);

// `tensor`, of the same sizes, in the same layout: itself or a copy.
Tensor laid_out_like(const Tensor& tensor, const View& view);

// `tensor`, of an input's sizes, in the order of memory of the input's layout: itself or a copy.
Tensor laid_out(const Tensor& tensor, Layout layout);

DType dtype_of(const Tensor& tensor);

// The images of a statistic set, at least one, and the number of sets.
int64_t images_per_set(const Tensor& input, SetSize set_size);
c10::SymInt sets_of(const Tensor& input, SetSize set_size);

// Uninitialized results. An output and the gradient of an input lie in memory as view_as_problem has the input, with
// strides as torch would have them.
Tensor empty_output(const Tensor& input);

// Branch bits for the elements of the input.
Tensor empty_branches(const Tensor& input);

// Statistics are kept in double precision: a C-sized tensor costs nothing, and the backward gets the mean
// with the digits that float loses when it is far larger than the deviation.
Tensor empty_statistics(const Tensor& input, SetSize set_size);

// The number of values per channel in each set.
Tensor empty_counts(const Tensor& input, SetSize set_size);

}  // namespace bn::ops
