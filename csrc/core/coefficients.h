#pragma once

#include "core/host_device.h"
#include "core/numbers.h"

#include <cstdint>

// The element-wise half of a batch norm: the coefficients of a channel, computed in double precision, and the
// expression for each element, for scalars and for vectors.
namespace bn {

// The mean as the sum of a number of type A, the shift, and a rest. If the scale is not finite, the shift is 0, so that
// (x - shift) * scale + offset is NaN exactly where x * scale + (bias - mean * scale) is.
template <class A>
struct SplitMean {
  A shift;
  double rest;

  BN_HD SplitMean(double mean, double scale)
      : shift(is_finite(scale) ? static_cast<A>(mean) : 0),
        rest(is_finite(scale) ? finite_or_zero(mean - static_cast<double>(shift)) : mean) {}
};

// Forward: y = (x - shift) * scale + offset. x - shift is exact for x near the mean, so a mean far larger than the
// deviation costs no digits.
template <class A>
struct NormalizeCoefficients {
  A shift;
  A scale;
  A offset;
};

template <class A>
BN_HD NormalizeCoefficients<A> normalize_coefficients(double mean, double invstd, double weight, double bias) {
  const double scale = weight * invstd;
  const SplitMean<A> split(mean, scale);
  return {split.shift, static_cast<A>(scale), static_cast<A>(bias - split.rest * scale)};
}

template <class V>
BN_HD V normalize(const V& x, const V& shift, const V& scale, const V& offset) {
  return (x - shift) * scale + offset;
}

// The two sums over a channel that the backward needs; xmu = x - mean.
struct GradientSums {
  double dz = 0;
  double dz_xmu = 0;
};

// Turns the sum of dz * (x - shift) into the sum of dz * (x - mean).
template <class A>
BN_HD GradientSums centred(double mean, double scale, double sum_dz, double sum_dz_shifted) {
  return {sum_dz, sum_dz_shifted - finite_or_zero(SplitMean<A>(mean, scale).rest * sum_dz)};
}

// Backward: dx = (dz + ((x - shift) * slope + offset)) * scale, with the forward's shift and scale. For constant
// statistics slope and offset are 0.
template <class A>
struct GradientCoefficients {
  A slope;
  A offset;
};

// dx = weight * invstd * (dz - mean(dz) - x_hat * mean(dz * x_hat)), x_hat = (x - mean) * invstd. The
// order of operations, and finite_or_zero, put NaN and Inf where torch puts them.
template <class A, class Count>
BN_HD GradientCoefficients<A> gradient_coefficients(
    double mean, double invstd, double weight, const Count& count, const GradientSums& sums) {
  const double slope = -invstd * invstd * (sums.dz_xmu / count);
  const double rest = SplitMean<A>(mean, weight * invstd).rest;
  return {static_cast<A>(slope), static_cast<A>(-(sums.dz / count) - finite_or_zero(slope * rest))};
}

// The part of dx that goes through the statistics, before the scale. With a mask it is weighted as the value is.
template <class V>
BN_HD V through_statistics(const V& x, const V& shift, const V& slope, const V& offset) {
  return (x - shift) * slope + offset;
}

template <class V>
BN_HD V input_gradient(const V& dz, const V& through_statistics, const V& scale) {
  return (dz + through_statistics) * scale;
}

}  // namespace bn
