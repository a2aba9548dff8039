#pragma once

#include "core/numbers.h"
#include "cpu/plan.h"
#include "cpu/vec.h"

// Every reduction here is a sum of u and a sum of u * w over a channel; a term says what u and w are: `add`
// for a vector of elements, `exact` for one element in double precision.
namespace bn::cpu {
namespace {

// Where a term reads: a whole vector at element i ...
template <class T>
struct Whole {
  int64_t i;

  Vec<T> read(const T* p) const { return load_vec(p + i); }
  Vec<T> keep(const Vec<T>& u) const { return u; }
};

// ... that, while the line `ahead` of it is fetched ...
template <class T>
struct WholeAndAhead {
  int64_t i;
  int64_t ahead;

  Vec<T> read(const T* p) const {
    prefetch(p + i + ahead);
    return load_vec(p + i);
  }
  Vec<T> keep(const Vec<T>& u) const { return u; }
};

// ... or the first `count` lanes of one, of which those in the mask count.
template <class T>
struct Part {
  int64_t i;
  int64_t count;
  const Vec<T>& mask;

  Vec<T> read(const T* p) const { return load_vec(p + i, count); }
  Vec<T> keep(const Vec<T>& u) const { return u & mask; }
};

struct Pair {
  double u;
  double w;
};

// u = w = x - shift.
template <class T>
struct MomentTerm {
  const T* x;

  template <class Place>
  void add(const Place& at, const Vec<T>& shift, Vec<T>& sum, Vec<T>& sum_product) const {
    const Vec<T> d = at.keep(at.read(x) - shift);
    sum = sum + d;
    sum_product = at::vec::fmadd(d, d, sum_product);
  }
  Pair exact(int64_t i, double shift) const {
    const double d = static_cast<double>(x[i]) - shift;
    return {d, d};
  }
};

// u = dy, w = x - shift.
template <class T>
struct GradientTerm {
  const T* dy;
  const T* x;

  template <class Place>
  void add(const Place& at, const Vec<T>& shift, Vec<T>& sum, Vec<T>& sum_product) const {
    const Vec<T> g = at.keep(at.read(dy));
    sum = sum + g;
    sum_product = at::vec::fmadd(g, at.read(x) - shift, sum_product);
  }
  Pair exact(int64_t i, double shift) const { return {static_cast<double>(dy[i]), static_cast<double>(x[i]) - shift}; }
};

// u = value - shift, and no w.
template <class T>
struct SumTerm {
  const T* value;

  template <class Place>
  void add(const Place& at, const Vec<T>& shift, Vec<T>& sum, Vec<T>&) const {
    sum = sum + at.keep(at.read(value) - shift);
  }
  Pair exact(int64_t i, double shift) const { return {static_cast<double>(value[i]) - shift, 0}; }
};

// The sums of one channel of a block, element by element in double precision.
template <class Term>
Pair exact_sums(const Blocks& blocks, const Extent& e, int64_t c, const Term& term, double shift) {
  Pair total{0, 0};
  for (int64_t n = e.n0; n < e.n1; ++n) {
    for (int64_t s = e.s0; s < e.s1; ++s) {
      const auto [u, w] = term.exact(blocks.offset(n, c, s), shift);
      total.u += u;
      total.w += u * w;
    }
  }
  return total;
}

// Replaces the sums that overflowed a float or met NaN or Inf.
template <class T, class Term>
void repair_sums(
    const Tile& tile, const Extent& e, const Term& term, const Acc<T>* shift, double* sum, double* sum_product) {
  if constexpr (std::is_same_v<Acc<T>, float>) {
    const auto both_finite = [&](int64_t c) { return is_finite(sum[c]) && is_finite(sum_product[c]); };
    int all_finite = 1;
    for (int64_t c = 0; c < tile.channels(); ++c) {
      all_finite &= both_finite(c);
    }
    if (all_finite) {
      return;
    }
    for (int64_t c = 0; c < tile.channels(); ++c) {
      if (!both_finite(c)) {
        const auto [u, w] = exact_sums(tile.blocks, e, tile.c0 + c, term, shift[c]);
        sum[c] = u;
        sum_product[c] = w;
      }
    }
  }
}

}  // namespace
}  // namespace bn::cpu
