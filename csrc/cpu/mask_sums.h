#pragma once

#include "core/arguments.h"
#include "cpu/kernels/kernels.h"

#include <memory>
#include <vector>

namespace bn::cpu {

// What a mask adds up to, by patch and by set, and the mask as vectors of several channels read it. Without a mask it
// is empty.
class MaskSums {
 public:
  MaskSums(const Mask& mask, const Problem& problem, const Plan& plan);

  // The mask with its sums, which live as long as this object.
  Mask mask() const { return {values_, counted_.data()}; }
  SetMask of_set(int64_t set) const;
  // How many values of a channel count in a chunk of a set: all, if there is no mask.
  double count_of(int64_t set, int64_t chunk) const;

 private:
  const Plan& plan_;
  const void* values_;
  std::vector<PatchCount> patches_;  // of each set
  std::vector<Counted> counted_;     // of each set, then of all
  std::unique_ptr<std::byte[]> lanes_;
  int64_t width_ = 0;
};

}  // namespace bn::cpu
