#pragma once

#include "core/arguments.h"
#include "core/coefficients.h"
#include "cpu/vec/branches.h"

namespace bn::cpu {
namespace {

// Any activation by calls. Kernels with a mask take it in the place of Any: code in line for each activation would
// double the library.
struct AnyCalled : activation::Any {
  template <class V>
  BN_NOINLINE V value(const V& z) const {
    return Any::value(z);
  }
  template <class V>
  BN_NOINLINE V gradient(const V& dy, const V& z) const {
    return Any::gradient(dy, z);
  }
  template <class V>
  BN_NOINLINE typename Math<V>::Mask branch(const V& z) const {
    return Any::branch(z);
  }
  template <class V>
  BN_NOINLINE V gradient_on(const typename Math<V>::Mask& branch, const V& dy) const {
    return Any::gradient_on(branch, dy);
  }
};

template <class Functor>
Functor functor_of(const Activation& activation) {
  if constexpr (std::is_same_v<Functor, activation::Any>) {
    return Functor{{}, activation};
  } else if constexpr (std::is_same_v<Functor, AnyCalled>) {
    return Functor{{{}, activation}};
  } else {
    return {};
  }
}

// Computes dz, the gradient of the activation's input z.
template <class T, class Functor>
struct Gradient {
  static constexpr bool kActivated = !std::is_same_v<Functor, activation::Identity>;

  const T* dy;
  const T* x;
  const T* residual;        // or null
  const uint8_t* branches;  // or null
  Functor functor;

  Gradient(const void* dy, const void* x, const Epilogue& epilogue)
      : dy(static_cast<const T*>(dy)),
        x(static_cast<const T*>(x)),
        residual(static_cast<const T*>(epilogue.residual)),
        branches(epilogue.branches),
        functor(functor_of<Functor>(epilogue.activation)) {}

  // Whether dz depends on z, and so on x.
  bool repeats_forward() const { return kActivated && branches == nullptr; }

  // dz at a place, of which x has been read. k = {shift, scale, ..., offset}: an activation needs k[0], k[1] and
  // k[K - 1].
  template <class Place, class V, int K>
  BN_INLINE V behind(const Place& at, const V& x, const V (&k)[K]) const {
    const V g = at.read(dy);
    if constexpr (!kActivated) {
      return g;
    } else if (branches != nullptr) {
      return functor.gradient_on(at.read(branches), g);
    } else {
      const V z = normalize(x, k[0], k[1], k[K - 1]);
      return activation::gradient(functor, g, residual != nullptr ? z + at.read(residual) : z);
    }
  }
};

}  // namespace
}  // namespace bn::cpu
