#pragma once

#include "core/host_device.h"
#include "core/numbers.h"

#include <cstdint>

namespace bn {

enum class DType : int { Float64, Float32, Half, BFloat16 };

constexpr int kDTypes = 4;

BN_HD constexpr int64_t size_of(DType dtype) {
  return dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2;
}

enum class Layout : int {
  Planar,      // (n, c, s): each image holds c planes of s contiguous values
  Interleaved  // (n, c), s = 1: each of n positions holds c contiguous values
};

constexpr int kLayouts = 2;

// The input of a batch norm, as every kernel sees it. Each statistic set, a run of images or positions, is normalized
// by statistics of its own; parameters are shared.
struct Problem {
  Layout layout = Layout::Planar;
  DType dtype = DType::Float32;
  int64_t n = 0;
  int64_t c = 0;
  int64_t s = 1;
  int64_t per_set = 0;  // images or positions of a statistic set; the last set may have fewer

  bool operator==(const Problem&) const = default;

  // Values per channel.
  BN_HD constexpr int64_t count() const { return n * s; }

  BN_HD constexpr bool one_set() const { return n <= per_set; }
  BN_HD constexpr int64_t sets() const { return divide_up(n, per_set); }
  BN_HD constexpr int64_t rows_of(int64_t set) const {
    const int64_t left = n - set * per_set;
    return left < per_set ? left : per_set;
  }
  // Values per channel in a set.
  BN_HD constexpr int64_t count_of(int64_t set) const { return rows_of(set) * s; }
  // Where statistics of a set and channel lie in arrays of them.
  BN_HD constexpr int64_t statistic(int64_t set, int64_t channel) const { return set * c + channel; }
};

// n images of c channels of s values each, in the one form of a problem: sets of a single channel are runs of values,
// and planes of one value are rows of channels.
BN_HD constexpr Problem problem_of(
    Layout layout, DType dtype, int64_t n, int64_t c, int64_t s, int64_t images_per_set) {
  if (c == 1 && n % images_per_set == 0) {
    return {Layout::Planar, dtype, n / images_per_set, 1, images_per_set * s, 1};
  }
  if (layout == Layout::Interleaved || s == 1) {
    return {Layout::Interleaved, dtype, n * s, c, 1, images_per_set * s};
  }
  return {layout, dtype, n, c, s, images_per_set};
}

}  // namespace bn
