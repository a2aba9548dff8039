#pragma once

#include <stdexcept>

namespace bn::gpu {

// A cooperative launch was refused, because not all of its blocks can run at the same time.
struct TooLarge : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace bn::gpu
