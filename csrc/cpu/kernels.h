#pragma once

#include "cpu/plan.h"

namespace bn::cpu {

// The widest tile a kernel takes, by layout: what its accumulators hold on the stack.
constexpr int64_t kMaxTile[kLayouts] = {64, 2048};

// Values of an image's short planes that are handled together, so that memory is passed over in runs of kilobytes.
constexpr int64_t kPlanarRun = 2048;

// As many rows of lanes are added up before double precision takes over.
constexpr int64_t kRowsAtOnce = 8;

// Interleaved rows with fewer channels than this are read several at a time, so that vectors stay full.
constexpr int64_t kFoldBelow = 64;

// The channels [c0, c1) of the blocks [b0, b1). While a tile is written, memory has time to read: what lies
// `ahead` elements further on, and comes next, is fetched meanwhile.
struct Tile {
  const Blocks& blocks;
  int64_t c0, c1;
  int64_t b0, b1;
  int64_t ahead;

  BN_HD constexpr int64_t channels() const { return c1 - c0; }
};

// The serial kernels of one instruction set for one layout and dtype. Tensors are whole, contiguous in
// their layout and of the problem's dtype; everything per channel starts at channel 0. `shift`, `scale`,
// `slope` and `offset` are of the accumulation type: float, or double for float64.
struct Kernels {
  // mean is the distance from the channel's first value, or, where that is not finite, from 0.
  void (*moments)(const Tile&, const void* x, double* mean, double* m2);
  void (*normalize)(
      const Tile&, const void* x, const void* shift, const void* scale, const void* offset, void* y, bool bypass_cache);
  // Without x, only the first of the two sums.
  void (*gradient_sums)(
      const Tile&, const void* dy, const void* x, const double* mean, double* sum_dy, double* sum_dy_shifted);
  // Without x, dx = dy * scale.
  void (*input_gradient)(const Tile&,
                         const void* dy,
                         const void* x,
                         const void* shift,
                         const void* scale,
                         const void* slope,
                         const void* offset,
                         void* dx,
                         bool bypass_cache);
};

// kernels.cpp, compiled once per instruction set.
const Kernels& kernels_default(Layout layout, DType dtype);
#if defined(__x86_64__)
const Kernels& kernels_avx2(Layout layout, DType dtype);
const Kernels& kernels_avx512(Layout layout, DType dtype);
#endif

}  // namespace bn::cpu
