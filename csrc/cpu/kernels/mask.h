#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/vec/vec.h"

// How much the values of a row count. Rows are numbered from the first one of a loop.
namespace bn::cpu {
namespace {

// A place whose values count as much as the mask says. `keep` clears those that do not.
template <class T, class Place>
struct Masked : Place {
  Vec<T> mask;

  BN_INLINE Vec<T> keep(const Vec<T>& u) const { return Place::keep(u) & (mask > Vec<T>(0)); }
  BN_INLINE Vec<T> weigh(const Vec<T>& u) const { return u * mask; }
};

// All values count 1.
struct Unmasked {
  BN_INLINE Unmasked row(int64_t) const { return {}; }

  template <class Place>
  BN_INLINE const Place& of(const Place& place, int64_t) const {
    return place;
  }
};

// The mask has a number for each value of a row, or one for all of them.
template <class T>
struct RowMask {
  const Acc<T>* values;
  bool each;

  template <class Place>
  BN_INLINE Masked<T, Place> of(const Place& place, int64_t i) const {
    return {place, each ? load_vec(values + i, place.lanes()) : Vec<T>(*values)};
  }
};

template <class T>
struct RowMasks {
  const Acc<T>* values;
  int64_t stride;
  bool each;

  BN_INLINE RowMask<T> row(int64_t r) const { return {values + r * stride, each}; }
};

// The number of the mask for one value of any channel, at position s of image n.
template <class T>
double mask_at(const Tile& tile, int64_t n, int64_t s) {
  const auto* const values = static_cast<const Acc<T>*>(tile.mask.values);
  return values == nullptr ? 1 : values[n * tile.patches.s + s];
}

}  // namespace
}  // namespace bn::cpu
