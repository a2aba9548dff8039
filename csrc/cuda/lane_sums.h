#pragma once

#include "core/numbers.h"
#include "cuda/gpu.h"

namespace bn::cuda {

// A thread's own part of a sum of u and a sum of u * w, for each lane that it sums apart, or for all of them.
template <int kSummed>
struct LaneSums {
  int count = 0;  // values in each
  double sum[kSummed] = {};
  double product[kSummed] = {};

  // Whether all of them are numbers that did not overflow.
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

// Adds a batch of packs, some dozens of values, summed in the type A: factors(u, l) are those of the l-th lane of the
// u-th pack.
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
