#pragma once

#include "core/host_device.h"

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

// The input of a batch norm, as every kernel sees it.
struct Problem {
  Layout layout = Layout::Planar;
  DType dtype = DType::Float32;
  int64_t n = 0;
  int64_t c = 0;
  int64_t s = 1;

  bool operator==(const Problem&) const = default;

  // Values per channel.
  BN_HD constexpr int64_t count() const { return n * s; }
};

// n images of c channels of s values each, in the one form of a problem: a single channel is one run of values, and
// planes of one value are rows of channels.
BN_HD constexpr Problem problem_of(Layout layout, DType dtype, int64_t n, int64_t c, int64_t s) {
  if (c == 1) {
    return {Layout::Planar, dtype, 1, 1, n * s};
  }
  if (layout == Layout::Interleaved || s == 1) {
    return {Layout::Interleaved, dtype, n * s, c, 1};
  }
  return {layout, dtype, n, c, s};
}

}  // namespace bn
