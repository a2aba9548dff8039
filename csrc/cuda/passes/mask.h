#pragma once

#include "core/arguments.h"
#include "cuda/plan.h"

struct CUstream_st;

namespace bn::cuda {

// The positions of values of a set that count: of the first one, the last one, and one between them. 0 if none count.
struct Samples {
  int64_t position[3];
};

struct CountedMask {
  Mask mask;
  const Samples* samples = nullptr;  // of each set
};

// The mask with its sums, which a kernel of its own leaves in the workspace. Nothing, if the pass has no use for sums.
CountedMask counted_mask(
    const Problem& problem, const Mask& mask, const LaunchPlan& plan, void* workspace, CUstream_st* stream);

}  // namespace bn::cuda
