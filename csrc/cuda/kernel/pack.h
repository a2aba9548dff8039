#pragma once

#include "core/dtype.h"
#include "cuda/gpu/gpu.h"
#include "cuda/plan.h"

namespace bn::cuda {

// The elements that one access to memory moves. Elements of two bytes stay in pairs, as memory delivers them: to take
// them apart when they are loaded, a thread would wait for each load before the next.
template <class T>
struct alignas(kPackBytes) Pack {
  static constexpr int kLanes = kPackBytes / sizeof(T);
  static constexpr bool kPairs = sizeof(T) == 2;
  using Word = std::conditional_t<kPairs, uint32_t, T>;

  Word word[kPackBytes / sizeof(Word)];

  BN_DEVICE T element(int l) const {
    if constexpr (kPairs) {
      return T(static_cast<unsigned short>(word[l / 2] >> l % 2 * 16), T::from_bits());
    } else {
      return word[l];
    }
  }

  BN_DEVICE Acc<T> get(int l) const { return static_cast<Acc<T>>(element(l)); }

  BN_DEVICE void set(int l, const T& value) {
    if constexpr (kPairs) {
      const uint32_t bits = value.x;
      word[l / 2] = l % 2 == 0 ? (word[l / 2] & 0xffff0000) | bits : (word[l / 2] & 0xffff) | bits << 16;
    } else {
      word[l] = value;
    }
  }
};

// Loads the first `lanes` elements at p; the others are 0. If packs are not aligned, each element is an access, and the
// cache of the multiprocessor combines them.
template <class T>
BN_DEVICE Pack<T> load_pack(const T* p, int lanes, bool aligned) {
  if (aligned && lanes == Pack<T>::kLanes) {
    return *reinterpret_cast<const Pack<T>*>(p);
  }
  Pack<T> pack = {};
#pragma unroll
  for (int l = 0; l < Pack<T>::kLanes; ++l) {
    if (l < lanes) {
      pack.set(l, p[l]);
    }
  }
  return pack;
}

template <class T>
BN_DEVICE void store_pack(T* p, const Pack<T>& pack, int lanes, bool aligned) {
  if (aligned && lanes == Pack<T>::kLanes) {
    *reinterpret_cast<Pack<T>*>(p) = pack;
    return;
  }
#pragma unroll
  for (int l = 0; l < Pack<T>::kLanes; ++l) {
    if (l < lanes) {
      p[l] = pack.element(l);
    }
  }
}

}  // namespace bn::cuda
