#pragma once

#include "core/arguments.h"
#include "cpu/kernels/kernels.h"

#include <memory>
#include <vector>

namespace bn::cpu {

// The sums of a mask over patches and sets, and the mask as vectors of several channels read it. Without a mask the
// object is empty; sums are made for a pass that needs them.
class MaskSums {
 public:
  MaskSums(const Mask& mask, const Pass& pass, const Plan& plan);

  // The mask with its sums, which live as long as this object; no mask where there are no sums.
  Mask counted_mask() const { return counted_.empty() ? Mask{} : Mask{values_, counted_.data()}; }
  // The part that kernels read.
  SetMask of_set(int64_t set) const;
  // How many values of a channel count in a chunk of a set: all, if there is no mask.
  double count_of(int64_t set, int64_t chunk) const;

 private:
  template <class A>
  void add_up(const Problem& problem);
  template <class A>
  void spread(const Problem& problem);

  const Plan& plan_;
  const void* values_;
  std::vector<PatchCount> patches_;  // of each set
  std::vector<Counted> counted_;     // of each set, then of all
  std::unique_ptr<std::byte[]> lanes_;
  int64_t width_ = 0;
};

}  // namespace bn::cpu
