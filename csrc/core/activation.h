#pragma once

#include "core/math.h"

#include <cstdint>
#include <type_traits>

// What can follow the normalization: y = activation(z), z = normalized + residual. Each is a value and a gradient, that
// of torch at kinks, for scalars and for vectors of them.
namespace bn {

enum class ActivationKind : int {
  Identity,
  ReLU,
  ReLU6,
  LeakyReLU,
  ELU,
  SiLU,
  GELU,
  Hardswish,
  Hardsigmoid,
  Sigmoid,
  Tanh
};

struct Activation {
  ActivationKind kind = ActivationKind::Identity;
  double param = 0;  // negative slope of LeakyReLU, alpha of ELU
};

namespace activation {

template <class V>
BN_HD V constant(double value) {
  return V(static_cast<typename Math<V>::Scalar>(value));
}

template <class V>
BN_HD V select(const typename Math<V>::Mask& where, const V& a, const V& b) {
  return Math<V>::select(where, a, b);
}

template <class V>
BN_HD V clamp(const V& z, double low, double high) {
  return select<V>(z <= constant<V>(low), constant<V>(low), select<V>(z >= constant<V>(high), constant<V>(high), z));
}

template <class V>
BN_HD V sigmoid(const V& z) {
  return V(1) / (V(1) + Math<V>::exp(V(0) - z));
}

// Of two straight branches: which one z is on is all that the gradient depends on, a bit.
struct Straight {
  static constexpr bool kBranches = true;
};

struct Curved {
  static constexpr bool kBranches = false;
};

struct Identity {
  static constexpr bool kBranches = false;

  template <class V>
  BN_HD V value(const V& z) const {
    return z;
  }
  template <class V>
  BN_HD V gradient(const V& dy, const V&) const {
    return dy;
  }
};

struct ReLU : Straight {
  template <class V>
  BN_HD V value(const V& z) const {
    return select<V>(branch(z), V(0), z);
  }
  template <class V>
  BN_HD auto branch(const V& z) const {
    return z <= V(0);
  }
  template <class V>
  BN_HD V gradient_on(const typename Math<V>::Mask& branch, const V& dy) const {
    return select<V>(branch, V(0), dy);
  }
};

struct ReLU6 : Straight {
  template <class V>
  BN_HD V value(const V& z) const {
    return clamp(z, 0, 6);
  }
  template <class V>
  BN_HD typename Math<V>::Mask branch(const V& z) const {
    return (z <= V(0)) | (z >= V(6));
  }
  template <class V>
  BN_HD V gradient_on(const typename Math<V>::Mask& branch, const V& dy) const {
    return select<V>(branch, V(0), dy);
  }
};

struct LeakyReLU : Straight {
  double slope;

  BN_HD explicit LeakyReLU(double slope) : slope(slope) {}
  template <class V>
  BN_HD V value(const V& z) const {
    return gradient_on(branch(z), z);
  }
  template <class V>
  BN_HD auto branch(const V& z) const {
    return z > V(0);
  }
  template <class V>
  BN_HD V gradient_on(const typename Math<V>::Mask& branch, const V& dy) const {
    return select<V>(branch, dy, dy * constant<V>(slope));
  }
};

struct Hardsigmoid : Straight {
  template <class V>
  BN_HD V value(const V& z) const {
    return clamp<V>(z + V(3), 0, 6) * constant<V>(1.0 / 6);
  }
  template <class V>
  BN_HD typename Math<V>::Mask branch(const V& z) const {
    return (z > V(-3)) & (z < V(3));
  }
  template <class V>
  BN_HD V gradient_on(const typename Math<V>::Mask& branch, const V& dy) const {
    return select<V>(branch, dy * constant<V>(1.0 / 6), V(0));
  }
};

struct ELU : Curved {
  double alpha;

  BN_HD explicit ELU(double alpha) : alpha(alpha) {}
  template <class V>
  BN_HD V value(const V& z) const {
    return select<V>(z <= V(0), constant<V>(alpha) * Math<V>::expm1(z), z);
  }
  template <class V>
  BN_HD V gradient(const V& dy, const V& z) const {
    return select<V>(z <= V(0), dy * (constant<V>(alpha) * Math<V>::exp(z)), dy);
  }
};

struct SiLU : Curved {
  template <class V>
  BN_HD V value(const V& z) const {
    return z / (V(1) + Math<V>::exp(V(0) - z));
  }
  template <class V>
  BN_HD V gradient(const V& dy, const V& z) const {
    const V s = sigmoid(z);
    return dy * (s * (V(1) + z * (V(1) - s)));
  }
};

// z * cdf(z) of the normal distribution.
struct GELU : Curved {
  template <class V>
  BN_HD static V cdf(const V& z) {
    return constant<V>(0.5) * (V(1) + Math<V>::erf(z * constant<V>(0.70710678118654752440)));
  }
  template <class V>
  BN_HD V value(const V& z) const {
    return z * cdf(z);
  }
  template <class V>
  BN_HD V gradient(const V& dy, const V& z) const {
    const V pdf = constant<V>(0.39894228040143267794) * Math<V>::exp(z * z * constant<V>(-0.5));
    return dy * (cdf(z) + z * pdf);
  }
};

struct Hardswish : Curved {
  template <class V>
  BN_HD V value(const V& z) const {
    return z * (clamp<V>(z + V(3), 0, 6) * constant<V>(1.0 / 6));
  }
  template <class V>
  BN_HD V gradient(const V& dy, const V& z) const {
    const V inside = dy * (z * constant<V>(1.0 / 3) + constant<V>(0.5));
    return select<V>(z <= V(-3), V(0), select<V>(z >= V(3), dy, inside));
  }
};

struct Sigmoid : Curved {
  template <class V>
  BN_HD V value(const V& z) const {
    return sigmoid(z);
  }
  template <class V>
  BN_HD V gradient(const V& dy, const V& z) const {
    const V s = sigmoid(z);
    return dy * ((V(1) - s) * s);
  }
};

struct Tanh : Curved {
  template <class V>
  BN_HD V value(const V& z) const {
    return Math<V>::tanh(z);
  }
  template <class V>
  BN_HD V gradient(const V& dy, const V& z) const {
    const V y = Math<V>::tanh(z);
    return dy * (V(1) - y * y);
  }
};

// Calls f with the functor of an activation.
#pragma nv_exec_check_disable
template <class F>
BN_HD auto with_functor(const Activation& a, const F& f) {
  switch (a.kind) {
    case ActivationKind::ReLU:
      return f(ReLU{});
    case ActivationKind::ReLU6:
      return f(ReLU6{});
    case ActivationKind::LeakyReLU:
      return f(LeakyReLU(a.param));
    case ActivationKind::ELU:
      return f(ELU(a.param));
    case ActivationKind::SiLU:
      return f(SiLU{});
    case ActivationKind::GELU:
      return f(GELU{});
    case ActivationKind::Hardswish:
      return f(Hardswish{});
    case ActivationKind::Hardsigmoid:
      return f(Hardsigmoid{});
    case ActivationKind::Sigmoid:
      return f(Sigmoid{});
    case ActivationKind::Tanh:
      return f(Tanh{});
    default:
      return f(Identity{});
  }
}

// The gradient behind one that is known, of whichever kind.
template <class Functor, class V>
BN_HD V gradient(const Functor& f, const V& dy, const V& z) {
  if constexpr (Functor::kBranches) {
    return f.gradient_on(f.branch(z), dy);
  } else {
    return f.gradient(dy, z);
  }
}

// Any of them, found out at each element: a branch that is always the same costs little where memory is waited for, and
// one kernel serves all.
struct Any : Curved {
  Activation which;

  template <class V>
  BN_HD V value(const V& z) const {
    return with_functor(which, [&](const auto& f) { return f.value(z); });
  }
  template <class V>
  BN_HD V gradient(const V& dy, const V& z) const {
    return with_functor(which, [&](const auto& f) { return activation::gradient(f, dy, z); });
  }
  template <class V>
  BN_HD typename Math<V>::Mask branch(const V& z) const {
    return with_functor(which, [&](const auto& f) -> typename Math<V>::Mask {
      if constexpr (std::decay_t<decltype(f)>::kBranches) {
        return f.branch(z);
      } else {
        return {};
      }
    });
  }
  template <class V>
  BN_HD V gradient_on(const typename Math<V>::Mask& branch, const V& dy) const {
    return with_functor(which, [&](const auto& f) {
      if constexpr (std::decay_t<decltype(f)>::kBranches) {
        return f.gradient_on(branch, dy);
      } else {
        return dy;
      }
    });
  }
};

}  // namespace activation

// Whether one bit of z is all that the gradient depends on.
BN_HD bool has_branches(const Activation& a) {
  return activation::with_functor(a, [](const auto& f) { return std::decay_t<decltype(f)>::kBranches; });
}

// Calls f with the functor that kernels are compiled for: the commonest two have kernels of their own.
template <class F>
BN_HD decltype(auto) with_compiled(const Activation& a, const F& f) {
  switch (a.kind) {
    case ActivationKind::Identity:
      return f(activation::Identity{});
    case ActivationKind::ReLU:
      return f(activation::ReLU{});
    default:
      return f(activation::Any{{}, a});
  }
}

}  // namespace bn
