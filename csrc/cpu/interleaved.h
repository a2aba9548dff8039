#pragma once

#include "cpu/kernels.h"
#include "cpu/terms.h"

// (n, c): the values of a position lie in a row along c, so that vectors run across channels. Rows of few
// channels are folded: `copies` of them make one wide row whose lanes repeat the channels.
namespace bn::cpu {
namespace {

template <class T>
struct Interleaved {
  static constexpr int64_t kMaxChannels = kMaxTile[static_cast<int>(Layout::Interleaved)];
  static constexpr int64_t kMaxLanes = std::max(kMaxChannels, kFoldBelow* kWidth<T>) + kWidth<T>;
  // As many rows are added at once, and as many fetched ahead of them (measured, 25088 x 512 float: 19 cycles
  // a vector with 4 rows and nothing fetched, 12 with 4, 11 with 8).
  static constexpr int64_t kRowsAtOnce = 8;

  const Tile& tile;
  // The fewest rows that fill whole vectors: a power of two no larger than a vector.
  const int64_t copies = fold(tile);

  template <class Term>
  void sums(const Extent& e, const Term& term, const Acc<T>* shift, double* sum, double* sum_product) const {
    alignas(64) Acc<T> shifts[kMaxLanes];
    alignas(64) double u[kMaxLanes];
    alignas(64) double uw[kMaxLanes];
    const int64_t used = copies * tile.channels() + kWidth<T>;
    std::fill_n(u, used, 0.0);
    std::fill_n(uw, used, 0.0);
    repeat(shift, shifts);
    for_each_part(e, [&](int64_t start, int64_t rows, int64_t stride, int64_t lanes) {
      int64_t r = 0;
      for (; r + kRowsAtOnce <= rows; r += kRowsAtOnce) {
        add_rows<kRowsAtOnce>(term, start + r * stride, stride, lanes, shifts, u, uw);
      }
      for (; r < rows; ++r) {
        add_rows<1>(term, start + r * stride, stride, lanes, shifts, u, uw);
      }
    });
    for (int64_t c = 0; c < tile.channels(); ++c) {
      sum[c] = 0;
      sum_product[c] = 0;
    }
    for (int64_t k = 0; k < copies; ++k) {
      for (int64_t c = 0; c < tile.channels(); ++c) {
        sum[c] += u[k * tile.channels() + c];
        sum_product[c] += uw[k * tile.channels() + c];
      }
    }
    repair_sums<T>(tile, e, term, shift, sum, sum_product);
  }

  template <int K, class F>
  void map(const Acc<T>* const (&coefficients)[K], const F& f, T* out, bool bypass_cache) const {
    alignas(64) Acc<T> lanes_of[K][kMaxLanes];
    for (int j = 0; j < K; ++j) {
      repeat(coefficients[j], lanes_of[j]);
    }
    for (int64_t b = tile.b0; b < tile.b1; ++b) {
      for_each_part(tile.blocks.extent(b), [&](int64_t start, int64_t rows, int64_t stride, int64_t lanes) {
        for (int64_t r = 0; r < rows; ++r) {
          map_row(f, start + r * stride, lanes, lanes_of, out, bypass_cache);
        }
      });
    }
  }

 private:
  static int64_t fold(const Tile& tile) {
    int64_t k = 1;
    if (tile.channels() < kFoldBelow && tile.channels() == tile.blocks.c) {
      while (k * tile.channels() % kWidth<T> != 0) {
        k *= 2;
      }
    }
    return k;
  }

  void repeat(const Acc<T>* values, Acc<T>* lanes) const {
    for (int64_t k = 0; k < copies; ++k) {
      std::memcpy(lanes + k * tile.channels(), values, tile.channels() * sizeof(Acc<T>));
    }
    std::fill_n(lanes + copies * tile.channels(), kWidth<T>, Acc<T>(0));
  }

  // visit(start, rows, stride, lanes): a block's folded rows, then those left over.
  template <class Visit>
  void for_each_part(const Extent& e, const Visit& visit) const {
    const int64_t wide = (e.n1 - e.n0) / copies;
    const int64_t start = tile.blocks.offset(e.n0, tile.c0, 0);
    visit(start, wide, copies * tile.blocks.c, copies * tile.channels());
    const int64_t left = (e.n1 - e.n0) - wide * copies;
    if (left > 0) {
      visit(start + wide * copies * tile.blocks.c, left, tile.blocks.c, tile.channels());
    }
  }

  template <int kRows, class Term>
  static void add_rows(
      Term term, int64_t start, int64_t stride, int64_t lanes, const Acc<T>* shifts, double* sum, double* sum_product) {
    const auto add = [&](int64_t i, const auto& place) {
      const auto shift = Vec<T>::loadu(shifts + i);
      Vec<T> u(0), uw(0);
      for (int64_t r = 0; r < kRows; ++r) {
        term.add(place(start + r * stride + i), shift, u, uw);
      }
      add_to_lanes<T>(sum + i, u);
      add_to_lanes<T>(sum_product + i, uw);
    };
    int64_t i = 0;
    for (; i + kWidth<T> <= lanes; i += kWidth<T>) {
      add(i, [stride](int64_t at) { return WholeAndAhead<T>{at, kRows * stride}; });
    }
    if (i < lanes) {  // the lanes behind the last are another copy's, or nobody's
      const Vec<T> mask = lane_mask<T>(lanes - i);
      add(i, [&](int64_t at) { return Part<T>{at, lanes - i, mask}; });
    }
  }

  template <int K, class F>
  static void map_row(
      F f, int64_t start, int64_t lanes, const Acc<T> (&lanes_of)[K][kMaxLanes], T* out, bool bypass_cache) {
    write_row(out + start, lanes, bypass_cache, [&](int64_t i, int64_t count, bool streamed) {
      Vec<T> k[K];
      for (int j = 0; j < K; ++j) {
        k[j] = Vec<T>::loadu(lanes_of[j] + i);
      }
      const Vec<T> result = f(start + i, count, k);
      streamed ? stream_vec(out + start + i, result) : store_vec(out + start + i, result, count);
    });
  }
};

}  // namespace
}  // namespace bn::cpu
