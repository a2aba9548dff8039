#pragma once

#include "ops/operators.h"

#include <functional>

namespace bn::ops {

// Told of each recorded call whose backward keeps the input: batch_norm_elemt makes its output of these again. Returns
// whether hooks for saved tensors are to be passed by, because they would keep the tensors of this call as they are.
using OutputObserver = std::function<bool(
    const Tensor& output, const Tensor& mean, const Tensor& invstd, const Arguments& a, bool keeps_residual)>;

// The observer of this thread's calls. Empty unless someone asks.
inline OutputObserver& output_observer() {
  static thread_local OutputObserver observer;
  return observer;
}

}  // namespace bn::ops
