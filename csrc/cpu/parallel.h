#pragma once

#include <ATen/Parallel.h>

#include <cstdint>

namespace bn::cpu {

// Calls f(begin, end) for parts of [0, tasks): on so many threads as ATen has if there are several, else here.
template <class F>
void parallel(int threads, int64_t tasks, const F& f) {
  if (threads == 1) {
    f(int64_t{0}, tasks);
  } else {
    at::parallel_for(0, tasks, 1, f);
  }
}

}  // namespace bn::cpu
