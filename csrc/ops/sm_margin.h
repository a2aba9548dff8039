#pragma once

#include <atomic>

namespace bn::ops {

// Multiprocessors that grids leave to other kernels, on every GPU.
inline std::atomic<int>& sm_margin() {
  static std::atomic<int> margin{0};
  return margin;
}

}  // namespace bn::ops
