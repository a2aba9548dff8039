// Dispatch key CPU.

#include "cpu/batch_norm.h"
#include "ops/run.h"

#include <torch/library.h>

namespace bn::ops {
namespace {

struct Cpu {
  static void forward(const ForwardArgs& args, const Tensor&) { cpu::batch_norm_forward(args); }
  static void backward(const BackwardArgs& args, const Tensor&) { cpu::batch_norm_backward(args); }
};

}  // namespace

TORCH_LIBRARY_IMPL(bn_ext, CPU, m) {
  m.impl("batch_norm_forward", batch_norm_forward<Cpu>);
  m.impl("batch_norm_forward.evaluation", batch_norm_forward_evaluation<Cpu>);
  m.impl("batch_norm_backward", batch_norm_backward<Cpu>);
}

}  // namespace bn::ops
