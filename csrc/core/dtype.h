#pragma once

#include "core/problem.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>

namespace bn {

// The type that values are summed and computed in.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f with a value of the C++ type behind a dtype, on the side that f is for.
#pragma nv_exec_check_disable
template <class F>
BN_HD auto with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::Float64:
      return f(double{});
    case DType::Half:
      return f(c10::Half{});
    case DType::BFloat16:
      return f(c10::BFloat16{});
    default:
      return f(float{});
  }
}

}  // namespace bn
