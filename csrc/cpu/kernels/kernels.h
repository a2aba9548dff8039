#pragma once

#include "core/arguments.h"
#include "core/coefficients.h"
#include "cpu/plan.h"

#include <cstddef>

namespace bn::cpu {

// The most channels of a tile, by layout. Not measured.
constexpr int64_t kMaxTile[kLayouts] = {64, 2048};

// Values of an image's short planes that are handled together, so that memory is read in runs of kilobytes. Not
// measured.
constexpr int64_t kPlanarRun = 2048;

// Rows of lanes that are added up in the accumulation type before double precision takes over. Not measured.
constexpr int64_t kRowsAtOnce = 8;

// Interleaved rows with fewer channels than this are folded, so that vectors stay full. Not measured.
constexpr int64_t kFoldBelow = 64;

// Memory for the arrays of a kernel, for which a thread's stack may be too small. It is passed by value, so that the
// arrays of a function are free again when the function returns.
class Scratch {
 public:
  static constexpr int64_t kBytes = 128 << 10;  // kernels.cpp asserts that it is enough
  static constexpr int64_t kAlignment = 64;

  explicit Scratch(std::byte* memory) : next_(memory) {}

  template <class Array>
  Array& take() {
    auto* const array = reinterpret_cast<Array*>(next_);
    next_ += round_up(sizeof(Array), kAlignment);
    return *array;
  }

 private:
  std::byte* next_;
};

// The sums of a mask over a patch and over the patch's first quarter.
struct PatchCount {
  double whole;
  double quarter;
};

// The mask of a statistic set.
struct SetMask {
  const void* values = nullptr;  // of the accumulation type, for each image and position of the problem; or null
  // The values repeated for the channels of a tile, in rows of `width`: a lane of joined planes or folded rows has one.
  const void* lanes = nullptr;
  int64_t width = 0;
  const PatchCount* patches = nullptr;
  int64_t first = 0;  // the position of the first value that counts
};

// The channels [c0, c1) of the patches [b0, b1) of a statistic set, whose first image or position is n0. While a tile
// is written, the input `ahead` elements further on, which is needed next, is prefetched.
struct Tile {
  const Patches& patches;
  int64_t n0;
  int64_t c0, c1;
  int64_t b0, b1;
  int64_t ahead;
  Scratch scratch;
  SetMask mask;

  BN_HD constexpr int64_t channels() const { return c1 - c0; }
  BN_HD constexpr Extent extent(int64_t patch) const {
    const Extent e = patches.extent(patch);
    return {n0 + e.n0, n0 + e.n1, e.s0, e.s1};
  }
  // How many values of a channel count, in a patch and in its first quarter.
  PatchCount count(int64_t patch) const {
    if (mask.patches != nullptr) {
      return mask.patches[patch];
    }
    const Extent e = patches.extent(patch);
    return {static_cast<double>(e.count()), static_cast<double>(e.quarter().count())};
  }
};

// Coefficients of every channel, of the accumulation type: float, or double for float64. Those that a kernel does not
// need are null.
struct CoefficientArrays {
  const void* shift = nullptr;
  const void* scale = nullptr;
  const void* offset = nullptr;
  const void* slope = nullptr;
  const void* gradient_offset = nullptr;
};

// Whether vectors of interleaved rows hold several rows, which takes tiles of all channels.
constexpr bool folds(int64_t channels) {
  return channels < kFoldBelow;
}

// The serial kernels of one instruction set for one layout, dtype and activation, with a mask or without. Tensors are
// whole, contiguous in their layout and of the problem's dtype. Arrays per channel start at channel 0 and are those of
// the tile's set.
struct Kernels {
  int64_t lanes;  // of a vector
  // mean is a distance from the set's first value in the channel that counts, or from 0 if that value is not finite.
  void (*moments)(const Tile&, const void* x, double* mean, double* m2);
  void (*normalize)(const Tile&, const void* x, const Epilogue&, const CoefficientArrays&, void* y, bool bypass_cache);
  // The sums of dz and of dz * (x - shift). Without an activation x may be null: only the first sum is computed then.
  void (*gradient_sums)(const Tile&,
                        const void* dy,
                        const void* x,
                        const Epilogue&,
                        const CoefficientArrays&,
                        double* sum_dz,
                        double* sum_dz_shifted);
  // dx and dresidual, or one of them. If the slope is null, for constant statistics, dx = dz * scale.
  void (*input_gradient)(const Tile&,
                         const void* dy,
                         const void* x,
                         const Epilogue&,
                         const CoefficientArrays&,
                         void* dx,
                         void* dresidual,
                         bool bypass_cache);
};

// kernels.cpp, compiled once per instruction set.
const Kernels& kernels_default(Layout layout, DType dtype, const Activation& activation, bool masked);
#if defined(__x86_64__)
const Kernels& kernels_avx2(Layout layout, DType dtype, const Activation& activation, bool masked);
const Kernels& kernels_avx512(Layout layout, DType dtype, const Activation& activation, bool masked);
#endif

}  // namespace bn::cpu
