#pragma once

#include "core/arguments.h"

// Batch normalization on all threads that ATen may use.
namespace bn::cpu {

void batch_norm_forward(const ForwardArgs& args);
void batch_norm_backward(const BackwardArgs& args);
void batch_norm_merge_rows(const MergeArgs& args);

// The three as ops/fused.h and ops/stages.h call a backend; it does not matter here which tensor they are for.
struct Backend {
  template <class Tensor>
  static void forward(const ForwardArgs& args, const Tensor&) {
    batch_norm_forward(args);
  }
  template <class Tensor>
  static void backward(const BackwardArgs& args, const Tensor&) {
    batch_norm_backward(args);
  }
  template <class Tensor>
  static void merge_rows(const MergeArgs& args, const Tensor&) {
    batch_norm_merge_rows(args);
  }
};

// Name of the instruction set in use: that of at::get_cpu_capability(), as far as there are kernels for it.
const char* instruction_set();

}  // namespace bn::cpu
