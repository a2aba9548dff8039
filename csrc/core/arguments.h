#pragma once

#include "core/activation.h"
#include "core/dtype.h"
#include "core/numbers.h"
#include "core/pass.h"
#include "core/problem.h"

// What a backend is asked to do: raw pointers, all of one device.
namespace bn {

// A value per channel of any floating type, or none at all.
struct PerChannel {
  void* data = nullptr;
  DType dtype = DType::Float32;
  int64_t stride = 1;

  BN_HD explicit operator bool() const { return data != nullptr; }

  BN_HD double get(int64_t c, double otherwise) const {
    if (data == nullptr) {
      return otherwise;
    }
    return with_type(dtype, [&](auto type) {
      using T = decltype(type);
      return static_cast<double>(static_cast<Acc<T>>(static_cast<const T*>(data)[c * stride]));
    });
  }

  BN_HD void set(int64_t c, double value) const {
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      static_cast<T*>(data)[c * stride] = static_cast<T>(static_cast<Acc<T>>(value));
    });
  }
};

// What follows the normalization: y = activation(z), z = normalized + residual.
struct Epilogue {
  Activation activation;
  const void* residual = nullptr;  // laid out as x, or null
  // A bit for each element, in the order of memory: the branch of the activation that z is on. A forward writes it, and
  // zeros behind the last one; a backward then needs no z. Or null.
  uint8_t* mask = nullptr;
};

// Normalize by the batch's own statistics and update the running ones (training), or by the running ones.
struct ForwardArgs {
  Problem problem;
  const void* x;
  PerChannel weight;
  PerChannel bias;
  PerChannel running_mean;
  PerChannel running_var;
  int64_t* num_batches_tracked;  // or null
  bool training;
  bool cumulative;  // the running statistics are averages over num_batches_tracked batches, else
  double momentum;
  double eps;
  Epilogue epilogue;
  void* y;
  double* mean;
  double* invstd;
};

// Gradients of the forward; those whose pointer is null cost nothing.
struct BackwardArgs {
  Problem problem;
  const void* dy;
  const void* x;
  PerChannel weight;
  PerChannel bias;
  const double* mean;
  const double* invstd;
  bool training;
  Epilogue epilogue;
  void* dx;
  void* dresidual;
  PerChannel dweight;
  PerChannel dbias;
};

inline Chain chain_of(const Epilogue& e) {
  return {e.activation.kind, e.residual != nullptr, e.mask != nullptr && has_branches(e.activation)};
}

// The pass of a call: which of its pointers are null.
inline Pass pass_of(const ForwardArgs& args) {
  return {args.problem, Direction::Forward, args.training, Wants{}, chain_of(args.epilogue)};
}

inline Pass pass_of(const BackwardArgs& args) {
  const Wants wants{args.dx != nullptr, args.dresidual != nullptr, bool(args.dweight), bool(args.dbias)};
  return {args.problem, Direction::Backward, args.training, wants, chain_of(args.epilogue)};
}

}  // namespace bn
