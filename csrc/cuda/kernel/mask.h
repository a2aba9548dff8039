#pragma once

#include "cuda/kernel/pack.h"
#include "cuda/kernel/slab.h"

// How much the values of a pack count, in kernels without a mask and with one.
namespace bn::cuda {

// All elements count 1.
template <class T>
struct Unmasked {
  int lanes;

  BN_DEVICE bool counts(int l) const { return l < lanes; }
  template <class V>
  BN_DEVICE V weigh(int, const V& u) const {
    return u;
  }
  template <class V>
  BN_DEVICE V keep(int, const V& u) const {
    return u;
  }
};

// Lanes without an element count 0.
template <class T>
struct Masked {
  Acc<T> weight[Pack<T>::kLanes];

  BN_DEVICE bool counts(int l) const { return weight[l] > 0; }
  template <class V>
  BN_DEVICE V weigh(int l, const V& u) const {
    return u * static_cast<V>(weight[l]);
  }
  template <class V>
  BN_DEVICE V keep(int l, const V& u) const {
    return counts(l) ? u : V{};
  }
};

// The numbers of a mask, of each row and position.
template <class A>
struct MaskValues {
  const A* values;
  bool aligned;  // every row begins at a multiple of a pack

  MaskValues(const Mask& mask, const Problem& problem)
      : values(static_cast<const A*>(mask.values)),
        aligned(problem.s % Pack<A>::kLanes == 0 && reinterpret_cast<uintptr_t>(mask.values) % kPackBytes == 0) {}
};

// Those of a pack in rows of one channel: as many as the pack has elements.
template <class T, class A>
BN_DEVICE Masked<T> load_weights(const MaskValues<A>& mask, const PackPlace& place, const Geometry& g) {
  constexpr int kAtOnce = Pack<A>::kLanes;
  const A* const first = mask.values + place.row * g.s + place.position;
  Masked<T> masked;
#pragma unroll
  for (int l = 0; l < Pack<T>::kLanes; l += kAtOnce) {
    const int left = place.lanes - l;
    const Pack<A> part = load_pack(first + l, left < kAtOnce ? left : kAtOnce, mask.aligned);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      masked.weight[l + k] = part.get(k);
    }
  }
  return masked;
}

// Those of a pack in rows of several channels, each of which begins with the row's first number again. An interleaved
// row has one number, which is loaded once.
template <class T, class A>
BN_DEVICE Masked<T> load_weights_per_lane(const MaskValues<A>& mask, const PackPlace& place, const Geometry& g) {
  const A* const row = mask.values + place.row * g.s;
  const int s = static_cast<int>(g.s);
  Masked<T> masked;
  if (s == 1) {
    const A weight = place.lanes > 0 ? *row : 0;
#pragma unroll
    for (int l = 0; l < Pack<T>::kLanes; ++l) {
      masked.weight[l] = l < place.lanes ? weight : 0;
    }
    return masked;
  }
  const int first = static_cast<int>(place.position);
  int position = first - g.by_s.quotient(first) * s;
#pragma unroll
  for (int l = 0; l < Pack<T>::kLanes; ++l) {
    masked.weight[l] = l < place.lanes ? row[position] : 0;
    position = position + 1 < s ? position + 1 : 0;
  }
  return masked;
}

}  // namespace bn::cuda
