#pragma once

#include "core/arguments.h"

// Batch normalization on all threads that ATen may use.
namespace bn::cpu {

void batch_norm_forward(const ForwardArgs& args);
void batch_norm_backward(const BackwardArgs& args);

// Name of the instruction set in use: that of at::get_cpu_capability(), as far as there are kernels for it.
const char* instruction_set();

}  // namespace bn::cpu
