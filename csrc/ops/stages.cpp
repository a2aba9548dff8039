// The stages under autograd: they have no derivatives of their own. Whoever composes them defines a gradient of the
// whole; to differentiate one is an error that names it, in a second derivative as well.

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

TORCH_LIBRARY_IMPL(bn_ext, Autograd, m) {
  for (const char* stage : {"batch_norm_stats", "batch_norm_merge_stats", "batch_norm_elemt",
                            "batch_norm_backward_reduce", "batch_norm_backward_elemt"}) {
    m.impl(stage, torch::autograd::autogradNotImplementedFallback());
  }
}
