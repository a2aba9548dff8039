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
    Vec<T> u[kMaxChannels];
    Vec<T> uw[kMaxChannels];
    std::fill_n(u, tile.channels(), Vec<T>(0));
    std::fill_n(uw, tile.channels(), Vec<T>(0));
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

  // out[i] = f(i, count, k) for every element of the tile, the last block first since the cache still holds
  // it; k are its channel's values of the K coefficients, each given per channel of the tile.
  template <int K, class F>
  void map(const Acc<T>* const (&coefficients)[K], const F& f, T* out, bool bypass_cache) const {
    alignas(64) T staged[kStage];
    for (int64_t b = tile.b1 - 1; b >= tile.b0; --b) {
      const Extent e = tile.blocks.extent(b);
      const int64_t length = e.s1 - e.s0;
      for (int64_t n = e.n0; n < e.n1; ++n) {
        // A tile of several channels has whole rows, which follow each other in memory.
        const int64_t start = tile.blocks.offset(n, tile.c0, e.s0);
        T* run = bypass_cache ? staged : out + start;
        for (int64_t c = 0; c < tile.channels(); ++c) {
          Vec<T> k[K];
          for (int j = 0; j < K; ++j) {
            k[j] = Vec<T>(coefficients[j][c]);
          }
          map_row(f, start + c * length, length, k, run + c * length);
        }
        if (bypass_cache) {
          stream(out + start, staged, tile.channels() * length);
        }
      }
    }
  }

 private:
  template <class Term>
  static void add_row(const Term& term,
                      int64_t start,
                      int64_t length,
                      const Vec<T>& mask,
                      const Vec<T>& shift,
                      Vec<T>& sum,
                      Vec<T>& sum_product) {
    constexpr int64_t unroll = 4;
    int64_t i = 0;
    if (length >= unroll * kWidth<T>) {
      Vec<T> us[unroll] = {sum, Vec<T>(0), Vec<T>(0), Vec<T>(0)};
      Vec<T> uws[unroll] = {sum_product, Vec<T>(0), Vec<T>(0), Vec<T>(0)};
      for (; i + unroll * kWidth<T> <= length; i += unroll * kWidth<T>) {
        for (int64_t k = 0; k < unroll; ++k) {
          const auto [u, w] = term.at(start + i + k * kWidth<T>, kWidth<T>, shift);
          us[k] = us[k] + u;
          uws[k] = at::vec::fmadd(u, w, uws[k]);
        }
      }
      sum = (us[0] + us[1]) + (us[2] + us[3]);
      sum_product = (uws[0] + uws[1]) + (uws[2] + uws[3]);
    }
    for (; i < length; i += kWidth<T>) {
      const int64_t count = std::min(length - i, kWidth<T>);
      const auto [u, w] = term.at(start + i, count, shift);
      const Vec<T> kept = count < kWidth<T> ? u & mask : u;
      sum = sum + kept;
      sum_product = at::vec::fmadd(kept, w, sum_product);
    }
  }

  template <int K, class F>
  static void map_row(const F& f, int64_t start, int64_t length, const Vec<T> (&k)[K], T* out) {
    int64_t i = 0;
    for (; i + kWidth<T> <= length; i += kWidth<T>) {
      store(out + i, f(start + i, kWidth<T>, k));
    }
    if (i < length) {
      store(out + i, f(start + i, length - i, k), length - i);
    }
  }
};

}  // namespace
}  // namespace bn::cpu
