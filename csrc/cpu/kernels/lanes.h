#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/terms.h"

// Rows of lanes: the loops for interleaved channels and for joined planes. Every row holds the same channels at the
// same lanes. Vectors run along rows, across channels. Sums and coefficients are per lane.
namespace bn::cpu {
namespace {

// Values that add_rows takes: few enough that the first-level cache holds them and that the hardware's prefetcher sees
// rows in order. Not measured.
constexpr int64_t kValuesAtOnce = 4096;

struct LaneRows {
  int64_t start;
  int64_t count;
  int64_t stride;
  int64_t lanes;
  int64_t first = 0;  // the number of the first row, among those of a mask
};

// Adds u to sum[l] and u * w to sum_product[l], over `rows`. It takes one column of vectors after the other, so that
// sums stay in registers, and prefetches the rows that follow.
template <class T, class Term, class Masks, int K, int64_t kMaxLanes>
void add_rows(const Term& term,
              const LaneRows& rows,
              const Masks& masks,
              const Acc<T> (&coefficients)[K][kMaxLanes],
              double* sum,
              double* sum_product) {
  const auto add_column = [&](int64_t i, const auto& place) {
    Vec<T> k[K];
    for (int j = 0; j < K; ++j) {
      k[j] = Vec<T>::loadu(coefficients[j] + i);
    }
    DoubleLanes<T> u(sum + i), uw(sum_product + i);
    int64_t r = 0;
    const auto add_chain = [&](int64_t length) {
      Vec<T> u_chain(0), uw_chain(0);
      for (int64_t n = 0; n < length; ++n) {
        const auto at = place(rows.start + (r + n) * rows.stride + i);
        term.add(masks.row(rows.first + r + n).of(at, i), k, u_chain, uw_chain);
      }
      u.add(u_chain);
      uw.add(uw_chain);
      r += length;
    };
    while (r + kRowsAtOnce <= rows.count) {
      add_chain(kRowsAtOnce);
    }
    while (r < rows.count) {
      add_chain(1);
    }
    u.store(sum + i);
    uw.store(sum_product + i);
  };
  const int64_t ahead = rows.count * rows.stride;
  int64_t i = 0;
  for (; i + kWidth<T> <= rows.lanes; i += kWidth<T>) {
    add_column(i, [ahead](int64_t at) { return WholeAndAhead<T>{{at}, ahead}; });
  }
  if (const int64_t left = rows.lanes - i; left > 0) {  // lanes past the end may belong to other channels
    const Vec<T> mask = lane_mask<T>(left);
    add_column(i, [&](int64_t at) { return FirstLanes<T>{at, left, mask}; });
  }
}

// add_rows over any number of rows, some kilobytes at a time.
template <class T, class Term, class Masks, int K, int64_t kMaxLanes>
void sum_lanes(const Term& term,
               const LaneRows& rows,
               const Masks& masks,
               const Acc<T> (&coefficients)[K][kMaxLanes],
               double* sum,
               double* sum_product) {
  const int64_t at_once = std::max<int64_t>(kValuesAtOnce / rows.lanes / kRowsAtOnce, 1) * kRowsAtOnce;
  for (int64_t r = 0; r < rows.count; r += at_once) {
    const LaneRows some{rows.start + r * rows.stride, std::min(at_once, rows.count - r), rows.stride, rows.lanes,
                        rows.first + r};
    add_rows<T>(term, some, masks, coefficients, sum, sum_product);
  }
}

// How a map writes.
struct Writes {
  bool aligned;   // whole vectors begin at multiples of their width
  bool streamed;  // whole vectors bypass the cache; requires `aligned`, and aligned tensors
  int64_t ahead;  // Tile::ahead
};

// The elements that one store of a vector writes. Reading prefetches the elements `ahead`.
template <class T>
struct Spot {
  int64_t i;
  int64_t count;
  bool streamed;
  int64_t ahead;

  BN_INLINE int64_t lanes() const { return count; }
  BN_INLINE Vec<T> keep(const Vec<T>& u) const { return u; }
  BN_INLINE Vec<T> weigh(const Vec<T>& u) const { return u; }
  BN_INLINE Vec<T> read(const T* p) const {
    prefetch(p + i + ahead);
    return load_vec(p + i, count);
  }
  BN_INLINE Vec<T> read(const uint8_t* branches) const { return lanes_of<T>(read_bits(branches, i, count)); }
  BN_INLINE void write(T* p, const Vec<T>& v) const { streamed ? stream_vec(p + i, v) : store_vec(p + i, v, count); }
  BN_INLINE void write(uint8_t* branches, const Vec<T>& lanes) const {
    write_bits(branches, i, count, bits_of<T>(lanes));
  }
};

// Calls f(spot, k) for all elements of all rows; k has K coefficients, which are given per lane.
template <class T, class Masks, int K, int64_t kMaxLanes, class F>
BN_INLINE inline void map_lanes(
    F f, LaneRows rows, Masks masks, const Acc<T> (&coefficients)[K][kMaxLanes], Writes writes) {
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t start = rows.start + r * rows.stride;
    const auto mask = masks.row(rows.first + r);
    write_row<T>(start, rows.lanes, writes.aligned, writes.streamed,
                 [&](int64_t i, int64_t count, bool streamed) BN_INLINE {
                   Vec<T> k[K];
                   for (int j = 0; j < K; ++j) {
                     k[j] = Vec<T>::loadu(coefficients[j] + i);
                   }
                   f(mask.of(Spot<T>{start + i, count, streamed, writes.ahead}, i), k);
                 });
  }
}

}  // namespace
}  // namespace bn::cpu
