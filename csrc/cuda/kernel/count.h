#pragma once

#include "core/host_device.h"

namespace bn::cuda {

// A number of values. Sums are divided by it while all threads of a block wait: its inverse is computed ahead, and a
// multiplication takes a fraction of a division's time.
class Count {
 public:
  Count() = default;
  BN_HD explicit Count(double value) : value_(value), inverse_(1 / value) {}

  BN_HD explicit operator double() const { return value_; }
  BN_HD double inverse() const { return inverse_; }

 private:
  double value_ = 0;
  double inverse_ = 0;
};

BN_HD double operator/(double sum, const Count& count) {
  return sum * count.inverse();
}

}  // namespace bn::cuda
