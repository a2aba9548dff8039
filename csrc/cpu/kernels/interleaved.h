#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/lanes.h"

// (n, c): the values of a position lie in a row along c, so that vectors run across channels. Rows of few
// channels are folded: `copies` rows make one wide row, whose lanes repeat the channels.
namespace bn::cpu {
namespace {

template <class T, bool kMasked_>
struct Interleaved {
  static constexpr bool kMasked = kMasked_;
  static constexpr int64_t kMaxChannels = kMaxTile[static_cast<int>(Layout::Interleaved)];
  static constexpr int64_t kMaxLanes = std::max(kMaxChannels, kFoldBelow* kWidth<T>) + kWidth<T>;

  const Tile& tile;
  // The fewest rows that fill whole vectors: a power of two, no larger than the number of lanes.
  const int64_t copies = fold(tile);

  // The sums of u and of u * w over a patch, for each channel of the tile. Coefficients are per channel of the tile.
  template <class Term, int N>
  BN_NOINLINE void sums(const Extent& e,
                        const Term& term,
                        const Acc<T>* const (&coefficients)[N],
                        double* sum,
                        double* sum_product,
                        Scratch scratch) const {
    static_assert(Term::kCoefficients <= N);
    auto& lanes_of = scratch.take<Acc<T>[Term::kCoefficients][kMaxLanes]>();
    auto& u = scratch.take<double[kMaxLanes]>();
    auto& uw = scratch.take<double[kMaxLanes]>();
    const int64_t used = copies * tile.channels() + kWidth<T>;
    std::fill_n(u, used, 0.0);
    std::fill_n(uw, used, 0.0);
    repeat(coefficients, lanes_of);
    for_each_part(e,
                  [&](const LaneRows& rows, const auto& masks) { sum_lanes<T>(term, rows, masks, lanes_of, u, uw); });
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
    repair_sums<T>(tile, e, term, coefficients, sum, sum_product);
  }

  // Calls f(spot, k) for every element of the tile; k has the first K coefficients of the element's channel. f is
  // passed by value, so that its captures stay in registers: a store might change captures behind a reference.
  template <int K, int N, class F>
  BN_NOINLINE void map(const Acc<T>* const (&coefficients)[N], F f, Writes writes) const {
    static_assert(K <= N);
    Scratch scratch = tile.scratch;
    auto& lanes_of = scratch.take<Acc<T>[K][kMaxLanes]>();
    repeat(coefficients, lanes_of);
    for (int64_t b = tile.b0; b < tile.b1; ++b) {
      for_each_part(tile.extent(b),
                    [&](const LaneRows& rows, const auto& masks) { map_lanes<T>(f, rows, masks, lanes_of, writes); });
    }
  }

 private:
  static int64_t fold(const Tile& tile) {
    int64_t k = 1;
    if (folds(tile.patches.c) && tile.channels() == tile.patches.c) {
      while (k * tile.channels() % kWidth<T> != 0) {
        k *= 2;
      }
    }
    return k;
  }

  template <int K>
  void repeat(const Acc<T>* const* coefficients, Acc<T> (&lanes_of)[K][kMaxLanes]) const {
    for (int j = 0; j < K; ++j) {
      for (int64_t k = 0; k < copies; ++k) {
        std::memcpy(lanes_of[j] + k * tile.channels(), coefficients[j], tile.channels() * sizeof(Acc<T>));
      }
      std::fill_n(lanes_of[j] + copies * tile.channels(), kWidth<T>, Acc<T>(0));
    }
  }

  // Visits the folded rows of a patch, then the rows that are left over.
  template <class Visit>
  void for_each_part(const Extent& e, const Visit& visit) const {
    const int64_t wide = (e.n1 - e.n0) / copies;
    const int64_t start = tile.patches.offset(e.n0, tile.c0, 0);
    visit(LaneRows{start, wide, copies * tile.patches.c, copies * tile.channels()}, masks(e.n0, copies));
    const int64_t left = (e.n1 - e.n0) - wide * copies;
    if (left > 0) {
      visit(LaneRows{start + wide * copies * tile.patches.c, left, tile.patches.c, tile.channels()},
            masks(e.n0 + wide * copies, 1));
    }
  }

  // The masks of rows from position n on, each of `at_once` positions.
  auto masks(int64_t n, int64_t at_once) const {
    if constexpr (kMasked) {
      const bool each = copies > 1;
      const auto* const values = static_cast<const Acc<T>*>(each ? tile.mask.lanes : tile.mask.values);
      const int64_t width = each ? tile.mask.width : 1;
      return RowMasks<T>{values + n * width, at_once * width, each};
    } else {
      return Unmasked{};
    }
  }
};

}  // namespace
}  // namespace bn::cpu
