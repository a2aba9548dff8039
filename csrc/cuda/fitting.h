#pragma once

#include "cuda/gpu/too_large.h"
#include "cuda/plan.h"

namespace bn::cuda {

// Calls launch(plan). Where a process has a part of a GPU only, a grid of all of it is refused: then with a plan for
// half as many multiprocessors, until one is there. A launch that is refused has done nothing that the next one does
// not do again.
template <class Launch>
void launch_fitting(const Pass& pass, Limits limits, const Launch& launch) {
  for (;;) {
    const LaunchPlan fitting = plan(pass, limits);
    try {
      launch(fitting);
      return;
    } catch (const gpu::TooLarge&) {
      const int left = limits.for_grids() / 2;
      if (left == 0) {
        throw;
      }
      limits.margin = limits.multiprocessors - left;
    }
  }
}

}  // namespace bn::cuda
