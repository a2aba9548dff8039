#pragma once

#include "cpu/kernels.h"
#include "cpu/terms.h"

// (n, c, s): a channel's values lie in rows along s, so that vectors run along a row.
namespace bn::cpu {
namespace {

template <class T>
struct Planar {
  static constexpr int64_t kMaxChannels = kMaxTile[static_cast<int>(Layout::Planar)];

  const Tile& tile;

  // Per channel of the tile, the sums over a block of u and of u * w; `shift` per channel of the tile.
  template <class Term>
  void sums(const Extent& e, const Term& term, const Acc<T>* shift, double* sum, double* sum_product) const {
    alignas(64) Acc<T> u[kMaxChannels][kWidth<T>];
    alignas(64) Acc<T> uw[kMaxChannels][kWidth<T>];
    std::memset(u, 0, tile.channels() * sizeof(u[0]));
    std::memset(uw, 0, tile.channels() * sizeof(uw[0]));
    const int64_t length = e.s1 - e.s0;
    const Vec<T> mask = lane_mask<T>(length % kWidth<T>);
    for (int64_t n = e.n0; n < e.n1; ++n) {
      for (int64_t c = 0; c < tile.channels(); ++c) {
        add_row(term, tile.blocks.offset(n, tile.c0 + c, e.s0), length, mask, Vec<T>(shift[c]), u[c], uw[c]);
      }
    }
    for (int64_t c = 0; c < tile.channels(); ++c) {
      sum[c] = sum_of_lanes<T>(u[c]);
      sum_product[c] = sum_of_lanes<T>(uw[c]);
    }
    repair_sums<T>(tile, e, term, shift, sum, sum_product);
  }

  // out[i] = f(i, count, k) for every element of the tile, k being its channel's values of the K
  // coefficients, each given per channel of the tile.
  template <int K, class F>
  void map(const Acc<T>* const (&coefficients)[K], const F& f, T* out, bool bypass_cache) const {
    for (int64_t b = tile.b0; b < tile.b1; ++b) {
      const Extent e = tile.blocks.extent(b);
      for (int64_t n = e.n0; n < e.n1; ++n) {
        for (int64_t c = 0; c < tile.channels(); ++c) {
          Vec<T> k[K];
          for (int j = 0; j < K; ++j) {
            k[j] = Vec<T>(coefficients[j][c]);
          }
          map_row(f, tile.blocks.offset(n, tile.c0 + c, e.s0), e.s1 - e.s0, k, out, bypass_cache);
        }
      }
    }
  }

 private:
  template <class Term>
  static void add_row(Term term,
                      int64_t start,
                      int64_t length,
                      const Vec<T>& mask,
                      const Vec<T>& shift,
                      Acc<T>* lanes_of_sum,
                      Acc<T>* lanes_of_product) {
    auto sum = Vec<T>::loadu(lanes_of_sum);
    auto product = Vec<T>::loadu(lanes_of_product);
    constexpr int64_t w = kWidth<T>;
    int64_t i = 0;
    if (length >= 4 * w) {  // four chains of additions hide their latency
      Vec<T> sum1(0), sum2(0), sum3(0), product1(0), product2(0), product3(0);
      for (; i + 4 * w <= length; i += 4 * w) {
        term.add(Whole<T>{start + i}, shift, sum, product);
        term.add(Whole<T>{start + i + w}, shift, sum1, product1);
        term.add(Whole<T>{start + i + 2 * w}, shift, sum2, product2);
        term.add(Whole<T>{start + i + 3 * w}, shift, sum3, product3);
      }
      sum = (sum + sum1) + (sum2 + sum3);
      product = (product + product1) + (product2 + product3);
    }
    for (; i + w <= length; i += w) {
      term.add(Whole<T>{start + i}, shift, sum, product);
    }
    if (i < length) {
      term.add(Part<T>{start + i, length - i, mask}, shift, sum, product);
    }
    sum.store(lanes_of_sum);
    product.store(lanes_of_product);
  }

  template <int K, class F>
  static void map_row(F f, int64_t start, int64_t length, const Vec<T> (&k)[K], T* out, bool bypass_cache) {
    write_row(out + start, length, bypass_cache, [&](int64_t i, int64_t count, bool streamed) {
      const Vec<T> result = f(start + i, count, k);
      streamed ? stream_vec(out + start + i, result) : store_vec(out + start + i, result, count);
    });
  }
};

}  // namespace
}  // namespace bn::cpu
