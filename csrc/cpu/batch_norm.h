#pragma once

#include "core/problem.h"

#include <cstdint>
#include <optional>

// Batch normalization over raw pointers, on all threads that ATen may use.
namespace bn::cpu {

// A value per channel of any floating type, or none at all.
struct PerChannel {
  void* data = nullptr;
  DType dtype = DType::Float32;
  int64_t stride = 1;

  explicit operator bool() const { return data != nullptr; }
  double get(int64_t c, double otherwise) const;
  void set(int64_t c, double value) const;
};

// Normalizes by the batch's own statistics and updates the running ones (training), or by the running ones.
struct ForwardArgs {
  Problem problem;
  const void* x;
  PerChannel weight;
  PerChannel bias;
  PerChannel running_mean;
  PerChannel running_var;
  int64_t* num_batches_tracked;  // or null
  bool training;
  std::optional<double> momentum;  // none: the cumulative average, 1 / num_batches_tracked
  double eps;
  void* y;
  double* mean;
  double* invstd;
};

void batch_norm_forward(const ForwardArgs& args);

// Gradients of the forward; those whose pointer is null cost nothing.
struct BackwardArgs {
  Problem problem;
  const void* dy;
  const void* x;
  PerChannel weight;
  const double* mean;
  const double* invstd;
  bool training;
  void* dx;
  PerChannel dweight;
  PerChannel dbias;
};

void batch_norm_backward(const BackwardArgs& args);

// Name of the instruction set in use: that of at::get_cpu_capability(), as far as there are kernels for it.
const char* instruction_set();

}  // namespace bn::cpu
