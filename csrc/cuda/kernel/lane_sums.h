#pragma once

#include "core/numbers.h"
#include "cuda/gpu/gpu.h"

namespace bn::cuda {

// One thread's part of the sums of u and of u * w: for each lane, or for all lanes together.
template <int kSummed>
struct LaneSums {
  int count = 0;  // values in each
  double sum[kSummed] = {};
  double product[kSummed] = {};

  // Whether all sums are finite.
  BN_DEVICE bool finite() const {
    bool all = true;
#pragma unroll
    for (int l = 0; l < kSummed; ++l) {
      all &= is_finite(sum[l]) && is_finite(product[l]);
    }
    return all;
  }
};

template <class A>
struct Factors {
  A u;
  A w;
};

// Adds a batch of packs, some dozens of values, to `total`. Within the batch sums are of type A. factors(u, l) gives
// the factors of lane l of pack u.
template <class A, int kBatch, int kLanes, int kSummed, class FactorsOf>
BN_DEVICE void add_batch(const FactorsOf& factors, LaneSums<kSummed>& total) {
  A sum[kSummed] = {};
  A product[kSummed] = {};
#pragma unroll
  for (int u = 0; u < kBatch; ++u) {
#pragma unroll
    for (int l = 0; l < kLanes; ++l) {
      const Factors<A> f = factors(u, l);
      sum[l % kSummed] += f.u;
      product[l % kSummed] += f.u * f.w;
    }
  }
#pragma unroll
  for (int l = 0; l < kSummed; ++l) {
    total.sum[l] += sum[l];
    total.product[l] += product[l];
  }
}

}  // namespace bn::cuda
