#pragma once

#include "core/host_device.h"

namespace bn {

template <class A>
BN_HD bool is_finite(A value) {
  return value - value == 0;
}

template <class A>
BN_HD A finite_or_zero(A value) {
  return is_finite(value) ? value : 0;
}

}  // namespace bn
