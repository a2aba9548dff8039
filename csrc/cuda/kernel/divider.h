#pragma once

#include "core/host_device.h"

#include <cstdint>

namespace bn::cuda {

// Divides 0 <= n < 2^31 by a divisor that is known in advance, with a multiplication and a shift.
class Divider {
 public:
  explicit Divider(uint32_t divisor) {
    while ((uint64_t{1} << shift_) < divisor) {
      ++shift_;
    }
    shift_ += 31;
    // Rounding up adds less than 1 to the factor, and so less than n / 2^shift < 1 / divisor to the quotient: too
    // little to reach the next whole number.
    factor_ = ((uint64_t{1} << shift_) + divisor - 1) / divisor;
  }

  BN_HD int quotient(int n) const {
    return static_cast<int>((static_cast<uint64_t>(static_cast<uint32_t>(n)) * factor_) >> shift_);
  }

 private:
  uint32_t shift_ = 0;
  uint32_t factor_;
};

}  // namespace bn::cuda
