#pragma once

#include "cpu/kernels.h"
#include "cpu/terms.h"

// Rows of lanes: what interleaved channels and short planes have in common. Each row holds the same channels at the
// same lanes, so that vectors run along rows, whatever channels they meet, and sums and coefficients stand per lane.
namespace bn::cpu {
namespace {

// Few enough that the first cache holds them and the hardware still sees rows in order.
constexpr int64_t kValuesAtOnce = 4096;

struct LaneRows {
  int64_t start;
  int64_t count;
  int64_t stride;
  int64_t lanes;
};

// sum[l] += u and sum_product[l] += u * w over `rows`, vector by vector, so that sums stay in registers; the rows
// behind them are fetched meanwhile.
template <class T, class Term>
void add_rows(const Term& term, const LaneRows& rows, const Acc<T>* shifts, double* sum, double* sum_product) {
  const auto add_column = [&](int64_t i, const auto& place) {
    const auto shift = Vec<T>::loadu(shifts + i);
    DoubleLanes<T> u(sum + i), uw(sum_product + i);
    int64_t r = 0;
    const auto add_chain = [&](int64_t length) {
      Vec<T> u_chain(0), uw_chain(0);
      for (int64_t k = 0; k < length; ++k) {
        term.add(place(rows.start + (r + k) * rows.stride + i), shift, u_chain, uw_chain);
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
    add_column(i, [ahead](int64_t at) { return WholeAndAhead<T>{at, ahead}; });
  }
  if (const int64_t left = rows.lanes - i; left > 0) {  // the lanes behind the last are nobody's, or others'
    const Vec<T> mask = lane_mask<T>(left);
    add_column(i, [&](int64_t at) { return Part<T>{at, left, mask}; });
  }
}

// The same over any number of rows, some kilobytes at a time.
template <class T, class Term>
void sum_lanes(const Term& term, const LaneRows& rows, const Acc<T>* shifts, double* sum, double* sum_product) {
  const int64_t at_once = std::max<int64_t>(kValuesAtOnce / rows.lanes / kRowsAtOnce, 1) * kRowsAtOnce;
  for (int64_t r = 0; r < rows.count; r += at_once) {
    const LaneRows some{rows.start + r * rows.stride, std::min(at_once, rows.count - r), rows.stride, rows.lanes};
    add_rows<T>(term, some, shifts, sum, sum_product);
  }
}

// out[i] = f(i, count, k) for all elements of all rows, k being the values of K coefficients, given per lane.
template <class T, int K, int64_t kMaxLanes, class F>
void map_lanes(
    const F& f, const LaneRows& rows, const Acc<T> (&coefficients)[K][kMaxLanes], T* out, bool bypass_cache) {
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t start = rows.start + r * rows.stride;
    write_row(out + start, rows.lanes, bypass_cache, [&](int64_t i, int64_t count, bool streamed) {
      Vec<T> k[K];
      for (int j = 0; j < K; ++j) {
        k[j] = Vec<T>::loadu(coefficients[j] + i);
      }
      const Vec<T> result = f(start + i, count, k);
      streamed ? stream_vec(out + start + i, result) : store_vec(out + start + i, result, count);
    });
  }
}

}  // namespace
}  // namespace bn::cpu
