#pragma once

#include "core/numbers.h"
#include "cpu/kernels/gradient.h"
#include "cpu/kernels/mask.h"
#include "cpu/plan.h"

// Every reduction adds up u and u * w over a channel. A term computes u and w with K coefficients of the channel: `add`
// for a vector of elements, `exact` for one element in double precision.
namespace bn::cpu {
namespace {

// A place is where a term reads. Here: a whole vector at element i.
template <class T>
struct Whole {
  int64_t i;

  int64_t lanes() const { return kWidth<T>; }
  Vec<T> read(const T* p) const { return load_vec(p + i); }
  Vec<T> read(const uint8_t* branches) const { return lanes_of<T>(read_bits(branches, i, kWidth<T>)); }
  Vec<T> keep(const Vec<T>& u) const { return u; }
  Vec<T> weigh(const Vec<T>& u) const { return u; }
};

// A whole vector at element i. The line `ahead` elements further on is prefetched.
template <class T>
struct WholeAndAhead : Whole<T> {
  int64_t ahead;

  using Whole<T>::read;
  Vec<T> read(const T* p) const {
    prefetch(p + this->i + ahead);
    return load_vec(p + this->i);
  }
};

// The first `count` lanes of a vector at element i. `keep` clears the lanes that are not in the lane mask.
template <class T>
struct FirstLanes {
  int64_t i;
  int64_t count;
  const Vec<T>& lane_mask;

  int64_t lanes() const { return count; }
  Vec<T> read(const T* p) const { return load_vec(p + i, count); }
  Vec<T> read(const uint8_t* bits) const { return lanes_of<T>(read_bits(bits, i, count)); }
  Vec<T> keep(const Vec<T>& u) const { return u & lane_mask; }
  Vec<T> weigh(const Vec<T>& u) const { return u; }
};

// One element, and how much it counts.
template <class T>
struct Single {
  int64_t i;
  double mask;

  Acc<T> read(const T* p) const { return static_cast<Acc<T>>(p[i]); }
  bool read(const uint8_t* branches) const { return read_bits(branches, i, 1) & 1; }
};

struct Pair {
  double u;
  double w;
};

// u = w = x - shift, u as much as the value counts.
template <class T>
struct MomentTerm {
  static constexpr int kCoefficients = 1;
  const T* x;

  template <class Place>
  void add(const Place& at, const Vec<T> (&k)[1], Vec<T>& sum, Vec<T>& sum_product) const {
    const Vec<T> d = at.keep(at.read(x) - k[0]);
    const Vec<T> weighed = at.weigh(d);
    sum = sum + weighed;
    sum_product = at::vec::fmadd(weighed, d, sum_product);
  }
  Pair exact(const Single<T>& at, const Acc<T> (&k)[1]) const {
    const double d = static_cast<double>(x[at.i]) - k[0];
    return {d * at.mask, d};
  }
};

// u = dz, w = x - shift. The coefficients are the forward's: the shift, and with an activation scale and offset too.
template <class T, class Functor>
struct GradientTerm {
  static constexpr int kCoefficients = Gradient<T, Functor>::kActivated ? 3 : 1;
  Gradient<T, Functor> gradient;

  template <class Place>
  void add(const Place& at, const Vec<T> (&k)[kCoefficients], Vec<T>& sum, Vec<T>& sum_product) const {
    const Vec<T> x = at.read(gradient.x);
    const Vec<T> dz = at.keep(gradient.behind(at, x, k));
    sum = sum + dz;
    sum_product = at::vec::fmadd(dz, at.keep(x - k[0]), sum_product);
  }
  Pair exact(const Single<T>& at, const Acc<T> (&k)[kCoefficients]) const {
    const Acc<T> x = at.read(gradient.x);
    return {gradient.behind(at, x, k), static_cast<double>(x) - k[0]};
  }
};

// u = dz, which is made of dy and branch bits, or of dy alone; there is no w.
template <class T, class Functor>
struct SumTerm {
  static constexpr int kCoefficients = GradientTerm<T, Functor>::kCoefficients;
  Gradient<T, Functor> gradient;

  template <class Place>
  void add(const Place& at, const Vec<T> (&k)[kCoefficients], Vec<T>& sum, Vec<T>&) const {
    sum = sum + at.keep(gradient.behind(at, Vec<T>(0), k));
  }
  Pair exact(const Single<T>& at, const Acc<T> (&k)[kCoefficients]) const {
    return {gradient.behind(at, Acc<T>(0), k), 0};
  }
};

// The sums of one channel of a patch, element by element in double precision.
template <class T, class Term, int K>
Pair exact_sums(const Tile& tile, const Extent& e, int64_t c, const Term& term, const Acc<T> (&k)[K]) {
  Pair total{0, 0};
  for (int64_t n = e.n0; n < e.n1; ++n) {
    for (int64_t s = e.s0; s < e.s1; ++s) {
      const Single<T> at{tile.patches.offset(n, c, s), mask_at<T>(tile, n, s)};
      if (at.mask > 0) {
        const auto [u, w] = term.exact(at, k);
        total.u += u;
        total.w += u * w;
      }
    }
  }
  return total;
}

// Replaces sums that are not finite, because a float overflowed or a value is NaN or Inf, by sums in double precision.
template <class T, class Term>
void repair_sums(const Tile& tile,
                 const Extent& e,
                 const Term& term,
                 const Acc<T>* const* coefficients,
                 double* sum,
                 double* sum_product) {
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
        Acc<T> k[Term::kCoefficients];
        for (int j = 0; j < Term::kCoefficients; ++j) {
          k[j] = coefficients[j][c];
        }
        const auto [u, w] = exact_sums<T>(tile, e, tile.c0 + c, term, k);
        sum[c] = u;
        sum_product[c] = w;
      }
    }
  }
}

}  // namespace
}  // namespace bn::cpu
