#pragma once

#include "core/activation.h"

#include <type_traits>

namespace bn::cuda {

template <class Functor>
constexpr bool kIsAny = std::is_same_v<Functor, activation::Any>;

// Packs that a thread applies a functor to at a time: one with Any, whose code holds all activations. Not measured.
template <class Functor>
constexpr int batch_of(int packs) {
  return kIsAny<Functor> ? 1 : packs;
}

// Calls f with the functor of the activation. Any is resolved once for all that f does.
template <class Functor, class F>
BN_HD void with_known(const Functor& functor, const F& f) {
  if constexpr (kIsAny<Functor>) {
    activation::with_functor(functor.which, f);
  } else {
    f(functor);
  }
}

}  // namespace bn::cuda
