#pragma once

#include "core/host_device.h"

#include <cmath>

// What activations are made of, for scalars; a backend that has vectors adds a specialization for them.
namespace bn {

template <class V>
struct Math {
  using Scalar = V;
  using Mask = bool;  // what a comparison gives; masks combine with | and &

  static BN_HD V select(bool where, V a, V b) { return where ? a : b; }
  static BN_HD V exp(V x) { return std::exp(x); }
  static BN_HD V expm1(V x) { return std::expm1(x); }
  static BN_HD V tanh(V x) { return std::tanh(x); }
  static BN_HD V erf(V x) { return std::erf(x); }
};

}  // namespace bn
