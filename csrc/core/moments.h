#pragma once

#include "core/host_device.h"
#include "core/numbers.h"

#include <cmath>

// The statistics of a channel, in double precision. A `Count` is a double, or what stands for one: sums are divided by
// it.
namespace bn {

// Count, mean and sum of squared deviations from the mean, of a set of values.
struct Moments {
  double count = 0;
  double mean = 0;
  double m2 = 0;
};

// Moments from the sums of (x - shift) and (x - shift)^2. If the shift is the mean of these values, or of as many
// others of the channel, nothing large cancels: the error of m2, relative to the m2 of the channel, is a few roundings
// of the sums.
template <class Count>
BN_HD Moments shifted_moments(const Count& count, double shift, double sum, double sum_sq) {
  const double offset = sum / count;
  const double m2 = sum_sq - sum * offset;
  return {static_cast<double>(count), shift + offset, m2 < 0 ? 0 : m2};
}

// Sums of (x - shift) and (x - shift)^2.
struct ShiftedSums {
  double sum;
  double sum_sq;
};

// The sums for a shift that is smaller by `delta`.
BN_HD ShiftedSums move_shift(const ShiftedSums& s, double count, double delta) {
  return {s.sum + count * delta, s.sum_sq + delta * (2 * s.sum + count * delta)};
}

// Moments of the union of two disjoint sets (Chan, Golub & LeVeque 1979). An infinite mean stays infinite.
BN_HD Moments merge(const Moments& a, const Moments& b) {
  const double count = a.count + b.count;
  const double part = b.count / count;
  const double delta = b.mean - a.mean;
  const double mean = is_finite(delta) ? a.mean + delta * part : a.mean + b.mean;
  return {count, mean, a.m2 + b.m2 + delta * delta * a.count * part};
}

// 0 where there are no values.
template <class Count>
BN_HD double biased_variance(double m2, const Count& count) {
  return static_cast<double>(count) > 0 ? m2 / count : 0;
}

BN_HD double inverse_std(double var, double eps) {
  return 1 / std::sqrt(var + eps);
}

// `momentum` is the weight of the new value.
BN_HD double running_average(double old, double observed, double momentum) {
  return (1 - momentum) * old + momentum * observed;
}

}  // namespace bn
