#pragma once

#include "core/host_device.h"
#include "core/numbers.h"

#include <cstdint>

// The element-wise half of a batch norm: per-channel coefficients, made in double precision, and the one
// expression applied to every element, for scalars and for vectors of them.
namespace bn {

// The mean as a number of type A plus what its rounding left over.
template <class A>
struct SplitMean {
  A shift;
  double rest;

  BN_HD explicit SplitMean(double mean)
      : shift(static_cast<A>(mean)), rest(finite_or_zero(mean - static_cast<double>(shift))) {}
};

// Forward: y = (x - shift) * scale + offset. x - shift is exact near the mean, so a mean far larger than
// the deviation costs no digits.
template <class A>
struct Forward {
  A shift;
  A scale;
  A offset;
};

template <class A>
BN_HD Forward<A> forward_coefficients(double mean, double invstd, double weight, double bias) {
  const double scale = weight * invstd;
  if (!is_finite(scale)) {  // NaN where x * scale + (bias - mean * scale) has it
    return {0, static_cast<A>(scale), static_cast<A>(bias - mean * scale)};
  }
  const SplitMean<A> split(mean);
  return {split.shift, static_cast<A>(scale), static_cast<A>(bias - split.rest * scale)};
}

template <class V>
BN_HD V normalize(const V& x, const V& shift, const V& scale, const V& offset) {
  return (x - shift) * scale + offset;
}

// The two sums that a backward needs of each channel; xmu = x - mean.
struct GradientSums {
  double dy = 0;
  double dy_xmu = 0;
};

// From the sum of dy * (x - shift) to that of dy * (x - mean).
template <class A>
BN_HD GradientSums centred(double mean, double sum_dy, double sum_dy_shifted) {
  return {sum_dy, sum_dy_shifted - finite_or_zero(SplitMean<A>(mean).rest * sum_dy)};
}

// Backward: dx = (dy + ((x - shift) * slope + offset)) * scale. With constant statistics slope and offset are 0.
template <class A>
struct Backward {
  A shift;
  A scale;
  A slope;
  A offset;
};

// dx = weight * invstd * (dy - mean(dy) - x_hat * mean(dy * x_hat)), x_hat = (x - mean) * invstd. In this
// order, and with nothing subtracted from infinity, NaN and Inf go where torch puts them.
template <class A>
BN_HD Backward<A> backward_coefficients(
    double mean, double invstd, double weight, double count, const GradientSums& sums) {
  const SplitMean<A> split(mean);
  const double slope = -invstd * invstd * (sums.dy_xmu / count);
  const double offset = -(sums.dy / count) - finite_or_zero(slope * split.rest);
  return {split.shift, static_cast<A>(weight * invstd), static_cast<A>(slope), static_cast<A>(offset)};
}

template <class V>
BN_HD V input_gradient(const V& dy, const V& x, const V& shift, const V& scale, const V& slope, const V& offset) {
  return (dy + ((x - shift) * slope + offset)) * scale;
}

}  // namespace bn
