#pragma once

#include "core/dtype.h"
#include "cuda/gpu.h"

namespace bn::cuda {

// What one access to memory moves.
constexpr int kPackBytes = 16;

template <class T>
struct alignas(kPackBytes) Pack {
  static constexpr int kLanes = kPackBytes / sizeof(T);

  T lane[kLanes];

  BN_DEVICE Acc<T> get(int l) const { return static_cast<Acc<T>>(lane[l]); }
};

// The first `lanes` elements at p, and 0 behind them. Where packs are not aligned it takes an access an element, which
// the cache of the multiprocessor joins.
template <class T>
BN_DEVICE Pack<T> load_pack(const T* p, int lanes, bool aligned) {
  if (aligned && lanes == Pack<T>::kLanes) {
    return *reinterpret_cast<const Pack<T>*>(p);
  }
  Pack<T> pack;
#pragma unroll
  for (int l = 0; l < Pack<T>::kLanes; ++l) {
    pack.lane[l] = l < lanes ? p[l] : T(0);
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
      p[l] = pack.lane[l];
    }
  }
}

}  // namespace bn::cuda
