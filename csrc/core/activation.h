#pragma once

#include "core/math.h"

#include <cstdint>
#include <type_traits>

// The activations that can follow the normalization: y = activation(z), z = normalized + residual. Each is a functor
// with a value and a gradient (torch's at kinks), for scalars, vectors and tensors, and an entry of BN_ACTIVATIONS
// below.
namespace bn {

namespace activation {

template <class V>
BN_HD V constant(double value) {
  return Math<V>::constant(value);
}

template <class V>
BN_HD V select(const typename Math<V>::Mask& where, const V& a, const V& b) {
  return Math<V>::select(where, a, b);
}

template <class V>
BN_HD V clamp(const V& z, double low, double high) {
  return select<V>(z <= constant<V>(low), constant<V>(low), select<V>(z >= constant<V>(high), constant<V>(high), z));
}

// z where z < high, else high. A NaN stays NaN.
template <class V>
BN_HD V at_most(const V& z, double high) {
  return select<V>(z >= constant<V>(high), constant<V>(high), z);
}

template <class V>
BN_HD V sigmoid(const V& z) {
  if constexpr (requires { Math<V>::sigmoid(z); }) {
    return Math<V>::sigmoid(z);
  } else {
    return constant<V>(1) / (constant<V>(1) + Math<V>::exp(constant<V>(0) - z));
  }
}

// Piecewise linear with two slopes: the gradient needs one bit per element.
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
    return select<V>(branch(z), constant<V>(0), z);
  }
  template <class V>
  BN_HD auto branch(const V& z) const {
    return z <= constant<V>(0);
  }
  template <class V>
  BN_HD V gradient_on(const typename Math<V>::Mask& branch, const V& dy) const {
    return select<V>(branch, constant<V>(0), dy);
  }
};

struct ReLU6 : Straight {
  template <class V>
  BN_HD V value(const V& z) const {
    return clamp(z, 0, 6);
  }
  template <class V>
  BN_HD typename Math<V>::Mask branch(const V& z) const {
    return (z <= constant<V>(0)) | (z >= constant<V>(6));
  }
  template <class V>
  BN_HD V gradient_on(const typename Math<V>::Mask& branch, const V& dy) const {
    return select<V>(branch, constant<V>(0), dy);
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
    return z > constant<V>(0);
  }
  template <class V>
  BN_HD V gradient_on(const typename Math<V>::Mask& branch, const V& dy) const {
    return select<V>(branch, dy, dy * constant<V>(slope));
  }
};

struct Hardsigmoid : Straight {
  template <class V>
  BN_HD V value(const V& z) const {
    return clamp<V>(z + constant<V>(3), 0, 6) * constant<V>(1.0 / 6);
  }
  template <class V>
  BN_HD typename Math<V>::Mask branch(const V& z) const {
    return (z > constant<V>(-3)) & (z < constant<V>(3));
  }
  template <class V>
  BN_HD V gradient_on(const typename Math<V>::Mask& branch, const V& dy) const {
    return select<V>(branch, dy * constant<V>(1.0 / 6), constant<V>(0));
  }
};

// exp is of no positive z, though its result is not selected there: it would be Inf, and the second derivative 0 * Inf.
struct ELU : Curved {
  double alpha;

  BN_HD explicit ELU(double alpha) : alpha(alpha) {}
  template <class V>
  BN_HD V value(const V& z) const {
    return select<V>(z <= constant<V>(0), constant<V>(alpha) * Math<V>::expm1(z), z);
  }
  template <class V>
  BN_HD V gradient(const V& dy, const V& z) const {
    return select<V>(z <= constant<V>(0), dy * (constant<V>(alpha) * Math<V>::exp(at_most<V>(z, 0))), dy);
  }
};

// As ELU, but with a slope of 1 at 0 for any alpha, which is not 0.
struct CELU : Curved {
  double alpha;

  BN_HD explicit CELU(double alpha) : alpha(alpha) {}
  template <class V>
  BN_HD V value(const V& z) const {
    return select<V>(z <= constant<V>(0), constant<V>(alpha) * Math<V>::expm1(z * constant<V>(1 / alpha)), z);
  }
  template <class V>
  BN_HD V gradient(const V& dy, const V& z) const {
    return select<V>(z <= constant<V>(0), dy * Math<V>::exp(at_most<V>(z, 0) * constant<V>(1 / alpha)), dy);
  }
};

struct SiLU : Curved {
  template <class V>
  BN_HD V value(const V& z) const {
    return z / (constant<V>(1) + Math<V>::exp(constant<V>(0) - z));
  }
  template <class V>
  BN_HD V gradient(const V& dy, const V& z) const {
    const V s = sigmoid(z);
    return dy * (s * (constant<V>(1) + z * (constant<V>(1) - s)));
  }
};

// z * cdf(z) of the normal distribution.
struct GELU : Curved {
  template <class V>
  BN_HD static V cdf(const V& z) {
    return constant<V>(0.5) * (constant<V>(1) + Math<V>::erf(z * constant<V>(0.70710678118654752440)));
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

// The approximation of GELU by tanh, 0.5 z (1 + tanh(u / 2)) = z sigmoid(u), with u = 2 sqrt(2 / pi) (z + 0.044715
// z^3).
struct GELUTanh : Curved {
  static constexpr double kLinear = 1.59576912160573071176;
  static constexpr double kCubic = kLinear * 0.044715;

  // exp(-u)
  template <class V>
  BN_HD static V decay(const V& z) {
    return Math<V>::exp(z * (constant<V>(-kLinear) - z * z * constant<V>(kCubic)));
  }
  template <class V>
  BN_HD V value(const V& z) const {
    return z / (constant<V>(1) + decay(z));
  }
  // Beyond +-10 the gradient is 1 or 0, to 1e-34. There, decay is still finite in float.
  template <class V>
  BN_HD V gradient(const V& dy, const V& z) const {
    const V t = clamp(z, -10, 10);
    const V e = decay(t);
    const V s = constant<V>(1) / (constant<V>(1) + e);
    const V slope = t * (constant<V>(kLinear) + t * t * constant<V>(3 * kCubic));
    return dy * (s + slope * (s * e * s));
  }
};

// z * tanh(log(1 + e^z)). With e = exp(z) the tanh is n / (n + 2), n = e (e + 2), without cancellation.
struct Mish : Curved {
  // From here on the tanh is 1 in double, and (n + 2)^2 is still finite in float.
  static constexpr double kSaturated = 22;

  template <class V>
  BN_HD V value(const V& z) const {
    const V e = Math<V>::exp(at_most<V>(z, kSaturated));
    const V n = e * (e + constant<V>(2));
    return z * (n / (n + constant<V>(2)));
  }
  template <class V>
  BN_HD V gradient(const V& dy, const V& z) const {
    const V t = at_most<V>(z, kSaturated);
    const V e = Math<V>::exp(t);
    const V n = e * (e + constant<V>(2));
    const V d = n + constant<V>(2);
    return dy * (n / d + t * (constant<V>(4) * e * (constant<V>(1) + e) / (d * d)));
  }
};

struct Hardswish : Curved {
  template <class V>
  BN_HD V value(const V& z) const {
    return z * (clamp<V>(z + constant<V>(3), 0, 6) * constant<V>(1.0 / 6));
  }
  template <class V>
  BN_HD V gradient(const V& dy, const V& z) const {
    const V inside = dy * (z * constant<V>(1.0 / 3) + constant<V>(0.5));
    return select<V>(z <= constant<V>(-3), constant<V>(0), select<V>(z >= constant<V>(3), dy, inside));
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
    return dy * ((constant<V>(1) - s) * s);
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
    return dy * (constant<V>(1) - y * y);
  }
};

}  // namespace activation

// Every activation, once. PLAIN(functor, name); PARAMETRIC(functor, name, parameter, default), whose functor is made
// from the parameter. The name is that of torch.nn.functional; the parameter's name is torch's. Compiled graphs hold
// the place of an entry: add new ones at the end.
#define BN_ACTIVATIONS(PLAIN, PARAMETRIC)                 \
  PLAIN(Identity, identity)                               \
  PLAIN(ReLU, relu)                                       \
  PLAIN(ReLU6, relu6)                                     \
  PARAMETRIC(LeakyReLU, leaky_relu, negative_slope, 0.01) \
  PARAMETRIC(ELU, elu, alpha, 1.0)                        \
  PLAIN(SiLU, silu)                                       \
  PLAIN(GELU, gelu)                                       \
  PLAIN(Hardswish, hardswish)                             \
  PLAIN(Hardsigmoid, hardsigmoid)                         \
  PLAIN(Sigmoid, sigmoid)                                 \
  PLAIN(Tanh, tanh)                                       \
  PLAIN(Mish, mish)                                       \
  PARAMETRIC(CELU, celu, alpha, 1.0)                      \
  PLAIN(GELUTanh, gelu_tanh)

enum class ActivationKind : int {
#define BN_KIND(Functor, ...) Functor,
  BN_ACTIVATIONS(BN_KIND, BN_KIND)
#undef BN_KIND
};

struct Activation {
  ActivationKind kind = ActivationKind::Identity;
  double param = 0;  // 0 if the activation has none
};

struct ActivationEntry {
  const char* name;
  const char* parameter;  // the name of the parameter; null if there is none
  double param;           // the default; 0 if there is no parameter
};

// In the order of ActivationKind.
constexpr ActivationEntry kActivations[] = {
#define BN_PLAIN(Functor, name) {#name, nullptr, 0},
#define BN_PARAMETRIC(Functor, name, parameter, preset) {#name, #parameter, preset},
    BN_ACTIVATIONS(BN_PLAIN, BN_PARAMETRIC)
#undef BN_PLAIN
#undef BN_PARAMETRIC
};

namespace activation {

// Calls f with the functor of an activation.
#pragma nv_exec_check_disable
template <class F>
BN_HD auto with_functor(const Activation& a, const F& f) {
  switch (a.kind) {
#define BN_PLAIN(Functor, name) \
  case ActivationKind::Functor: \
    return f(Functor{});
#define BN_PARAMETRIC(Functor, name, parameter, preset) \
  case ActivationKind::Functor:                         \
    return f(Functor(a.param));
    BN_ACTIVATIONS(BN_PLAIN, BN_PARAMETRIC)
#undef BN_PLAIN
#undef BN_PARAMETRIC
  }
  __builtin_unreachable();  // the operators refuse other numbers
}

// The gradient of z, for a functor of either kind.
template <class Functor, class V>
BN_HD V gradient(const Functor& f, const V& dy, const V& z) {
  if constexpr (Functor::kBranches) {
    return f.gradient_on(f.branch(z), dy);
  } else {
    return f.gradient(dy, z);
  }
}

// Selects the activation at run time, so that one kernel serves all. The selection is the same for every element, and
// the latency of memory hides it.
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
  if (a.kind == ActivationKind::Identity) {
    return f(activation::Identity{});
  }
  if (a.kind == ActivationKind::ReLU) {
    return f(activation::ReLU{});
  }
  return f(activation::Any{{}, a});
}

}  // namespace bn
