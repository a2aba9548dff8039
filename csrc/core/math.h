#pragma once

#include "core/host_device.h"

#include <cmath>

// The functions that activations are made of, for scalars. A backend with vectors adds a specialization.
namespace bn {

template <class V>
struct Math {
  using Mask = bool;  // the result of a comparison; masks combine with | and &

  BN_HD static V constant(double value) { return static_cast<V>(value); }
  BN_HD static V select(bool where, V a, V b) { return where ? a : b; }
  BN_HD static V exp(V x) { return std::exp(x); }
  BN_HD static V expm1(V x) { return std::expm1(x); }
  BN_HD static V tanh(V x) { return std::tanh(x); }
  BN_HD static V erf(V x) { return std::erf(x); }
};

}  // namespace bn
