#pragma once

#include "core/host_device.h"

#include <cstdint>

namespace bn {

template <class A>
BN_HD bool is_finite(A value) {
  return value - value == 0;
}

template <class A>
BN_HD A finite_or_zero(A value) {
  return is_finite(value) ? value : 0;
}

BN_HD constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// a, rounded up to a multiple of b.
BN_HD constexpr int64_t round_up(int64_t a, int64_t b) {
  return divide_up(a, b) * b;
}

}  // namespace bn
