#pragma once

#include "core/host_device.h"

#include <cmath>

// What activations are made of, for scalars; a backend that has vectors adds a specialization for them.
namespace bn {

template <class V>
struct Math {
  using Scalar = V;
  using Mask = bool;  // what a comparison gives; masks combine with | and &

  BN_HD static V select(bool where, V a, V b) { return where ? a : b; }
  BN_HD static V exp(V x) { return std::exp(x); }
  BN_HD static V expm1(V x) { return std::expm1(x); }
  BN_HD static V tanh(V x) { return std::tanh(x); }
  BN_HD static V erf(V x) { return std::erf(x); }
};

}  // namespace bn
