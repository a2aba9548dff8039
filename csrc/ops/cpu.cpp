// Dispatch key CPU.

#include "cpu/driver.h"
#include "ops/fused.h"
#include "ops/stages.h"

#include <torch/library.h>

namespace bn::ops {

TORCH_LIBRARY_IMPL(bn_ext, CPU, m) {
  m.impl("batch_norm_forward", batch_norm_forward<cpu::Backend>);
  m.impl("batch_norm_forward.evaluation", batch_norm_forward_evaluation<cpu::Backend>);
  m.impl("batch_norm_backward", batch_norm_backward<cpu::Backend>);
  m.impl("batch_norm_stats", batch_norm_stats<cpu::Backend>);
  m.impl("batch_norm_merge_stats", batch_norm_merge_stats<cpu::Backend>);
  m.impl("batch_norm_elemt", batch_norm_elemt<cpu::Backend>);
  m.impl("batch_norm_backward_reduce", batch_norm_backward_reduce<cpu::Backend>);
  m.impl("batch_norm_backward_elemt", batch_norm_backward_elemt<cpu::Backend>);
}

}  // namespace bn::ops
