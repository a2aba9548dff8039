#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/lanes.h"

// (n, c, s): the values of a channel lie in rows along s. Vectors run along a row. Short rows are joined: the rows of
// an image's tile follow each other in memory, vectors run along all of them, and each of their values is a lane.
namespace bn::cpu {
namespace {

template <class T, bool kMasked_>
struct Planar {
  static constexpr bool kMasked = kMasked_;
  static constexpr int64_t kMaxChannels = kMaxTile[static_cast<int>(Layout::Planar)];
  static constexpr int64_t kMaxLanes = kPlanarRun + kWidth<T>;

  const Tile& tile;
  const bool joined = tile.patches.joined;

  // The sums of u and of u * w over a patch, for each channel of the tile. Coefficients are per channel of the tile.
  template <class Term, int N>
  void sums(const Extent& e,
            const Term& term,
            const Acc<T>* const (&coefficients)[N],
            double* sum,
            double* sum_product,
            Scratch scratch) const {
    static_assert(Term::kCoefficients <= N);
    joined ? sums_of_lanes(e, term, coefficients, sum, sum_product, scratch)
           : sums_of_rows(e, term, coefficients, sum, sum_product);
    repair_sums<T>(tile, e, term, coefficients, sum, sum_product);
  }

  // Calls f(spot, k) for every element of the tile; k has the first K coefficients of the element's channel. f is
  // passed by value, so that its captures stay in registers: a store might change captures behind a reference.
  template <int K, int N, class F>
  void map(const Acc<T>* const (&coefficients)[N], F f, Writes writes) const {
    static_assert(K <= N);
    joined ? map_lanes_of_tile<K>(coefficients, f, writes) : map_rows<K>(coefficients, f, writes);
  }

 private:
  LaneRows joined_rows(const Extent& e) const {
    return {tile.patches.offset(e.n0, tile.c0, e.s0), e.n1 - e.n0, tile.patches.c * tile.patches.s,
            tile.channels() * tile.patches.s, e.n0};
  }
  auto masks_of_lanes() const {
    if constexpr (kMasked) {
      return RowMasks<T>{static_cast<const Acc<T>*>(tile.mask.lanes), tile.mask.width, true};
    } else {
      return Unmasked{};
    }
  }
  // For values [s0, ...) of each image.
  auto masks_of_rows(int64_t s0) const {
    if constexpr (kMasked) {
      return RowMasks<T>{static_cast<const Acc<T>*>(tile.mask.values) + s0, tile.patches.s, true};
    } else {
      return Unmasked{};
    }
  }

  template <int K>
  struct OfChannel {
    Vec<T> of[K];
  };

  template <int K>
  static OfChannel<K> of_channel(const Acc<T>* const* coefficients, int64_t c) {
    OfChannel<K> k;
    for (int j = 0; j < K; ++j) {
      k.of[j] = Vec<T>(coefficients[j][c]);
    }
    return k;
  }

  template <int K>
  void spread(const Acc<T>* const* coefficients, Acc<T> (&lanes_of)[K][kMaxLanes]) const {
    for (int j = 0; j < K; ++j) {
      Acc<T>* lanes = lanes_of[j];
      for (int64_t c = 0; c < tile.channels(); ++c) {
        lanes = std::fill_n(lanes, tile.patches.s, coefficients[j][c]);
      }
      std::fill_n(lanes, kWidth<T>, Acc<T>(0));
    }
  }

  template <int K, class F>
  BN_NOINLINE void map_lanes_of_tile(const Acc<T>* const* coefficients, F f, Writes writes) const {
    Scratch scratch = tile.scratch;
    auto& lanes_of = scratch.take<Acc<T>[K][kMaxLanes]>();
    spread(coefficients, lanes_of);
    for (int64_t b = tile.b0; b < tile.b1; ++b) {
      map_lanes<T>(f, joined_rows(tile.extent(b)), masks_of_lanes(), lanes_of, writes);
    }
  }

  template <int K, class F>
  BN_NOINLINE void map_rows(const Acc<T>* const* coefficients, F f, Writes writes) const {
    for (int64_t b = tile.b0; b < tile.b1; ++b) {
      const Extent e = tile.extent(b);
      for (int64_t n = e.n0; n < e.n1; ++n) {
        const auto mask = masks_of_rows(e.s0).row(n);
        for (int64_t c = 0; c < tile.channels(); ++c) {
          const int64_t start = tile.patches.offset(n, tile.c0 + c, e.s0);
          const auto k = of_channel<K>(coefficients, c);
          write_row<T>(start, e.s1 - e.s0, writes.aligned, writes.streamed,
                       [&](int64_t i, int64_t count, bool streamed)
                           BN_INLINE { f(mask.of(Spot<T>{start + i, count, streamed, writes.ahead}, i), k.of); });
        }
      }
    }
  }

  template <class Term>
  BN_NOINLINE void sums_of_lanes(const Extent& e,
                                 const Term& term,
                                 const Acc<T>* const* coefficients,
                                 double* sum,
                                 double* sum_product,
                                 Scratch scratch) const {
    auto& lanes_of = scratch.take<Acc<T>[Term::kCoefficients][kMaxLanes]>();
    auto& u = scratch.take<double[kMaxLanes]>();
    auto& uw = scratch.take<double[kMaxLanes]>();
    const LaneRows rows = joined_rows(e);
    std::fill_n(u, rows.lanes + kWidth<T>, 0.0);
    std::fill_n(uw, rows.lanes + kWidth<T>, 0.0);
    spread(coefficients, lanes_of);
    sum_lanes<T>(term, rows, masks_of_lanes(), lanes_of, u, uw);
    for (int64_t c = 0; c < tile.channels(); ++c) {
      sum[c] = sum_of(u + c * tile.patches.s, tile.patches.s);
      sum_product[c] = sum_of(uw + c * tile.patches.s, tile.patches.s);
    }
  }

  template <class Term>
  BN_NOINLINE void sums_of_rows(
      const Extent& e, const Term& term, const Acc<T>* const* coefficients, double* sum, double* sum_product) const {
    alignas(64) double u[kMaxChannels][kWidth<T>];
    alignas(64) double uw[kMaxChannels][kWidth<T>];
    std::memset(u, 0, tile.channels() * sizeof(u[0]));
    std::memset(uw, 0, tile.channels() * sizeof(uw[0]));
    const int64_t length = e.s1 - e.s0;
    const Vec<T> last_lanes = lane_mask<T>(length % kWidth<T>);
    for (int64_t n = e.n0; n < e.n1; ++n) {
      const auto mask = masks_of_rows(e.s0).row(n);
      for (int64_t c = 0; c < tile.channels(); ++c) {
        const auto k = of_channel<Term::kCoefficients>(coefficients, c);
        add_row(term, tile.patches.offset(n, tile.c0 + c, e.s0), length, last_lanes, mask, k.of, u[c], uw[c]);
      }
    }
    for (int64_t c = 0; c < tile.channels(); ++c) {
      sum[c] = sum_of(u[c], kWidth<T>);
      sum_product[c] = sum_of(uw[c], kWidth<T>);
    }
  }

  // Chains of at most four additions end in double lanes. Four chains go side by side, to hide the latency of an
  // addition. Neither number was measured.
  template <int K, class Term, class Mask>
  static void add_row(Term term,
                      int64_t start,
                      int64_t length,
                      const Vec<T>& last_lanes,
                      Mask mask,
                      const Vec<T> (&k)[K],
                      double* sums,
                      double* sums_of_products) {
    constexpr int64_t w = kWidth<T>;
    DoubleLanes<T> sum(sums), sum_product(sums_of_products);
    const auto whole = [&](int64_t i) BN_INLINE { return mask.of(Whole<T>{start + i}, i); };
    int64_t i = 0;
    while (i + 4 * w <= length) {
      const int64_t end = std::min(i + 16 * w, length);
      Vec<T> u0(0), u1(0), u2(0), u3(0), uw0(0), uw1(0), uw2(0), uw3(0);
      for (; i + 4 * w <= end; i += 4 * w) {
        term.add(whole(i), k, u0, uw0);
        term.add(whole(i + w), k, u1, uw1);
        term.add(whole(i + 2 * w), k, u2, uw2);
        term.add(whole(i + 3 * w), k, u3, uw3);
      }
      sum.add((u0 + u1) + (u2 + u3));
      sum_product.add((uw0 + uw1) + (uw2 + uw3));
    }
    if (i < length) {
      Vec<T> u(0), uw(0);
      for (; i + w <= length; i += w) {
        term.add(whole(i), k, u, uw);
      }
      if (i < length) {
        term.add(mask.of(FirstLanes<T>{start + i, length - i, last_lanes}, i), k, u, uw);
      }
      sum.add(u);
      sum_product.add(uw);
    }
    sum.store(sums);
    sum_product.store(sums_of_products);
  }
};

}  // namespace
}  // namespace bn::cpu
