#include "cuda/work.h"

#include <algorithm>

namespace bn::cuda {
namespace {

bool has_mask(const Epilogue& e) {
  return e.mask != nullptr && has_branches(e.activation);
}

}  // namespace

Work work_of(const ForwardArgs& args) {
  const Epilogue& e = args.epilogue;
  const bool residual = e.residual != nullptr;
  // Of no account to `bits` is whether this call keeps a mask: it is to find the same statistics either way.
  return {.tensors = 1,
          .summed = {args.training ? 1 : 0},
          .applied = {1},
          .held = 1,
          .besides = {residual ? 2 : 1, has_mask(e)},
          .bits = residual && has_branches(e.activation)};
}

// Read are the first of dy, x and the residual.
Work work_of(const BackwardArgs& args) {
  const Epilogue& e = args.epilogue;
  const bool mask = has_mask(e);
  const bool needs_z = !mask && e.activation.kind != ActivationKind::Identity;
  const int for_dz = !needs_z ? 1 : e.residual == nullptr ? 2 : 3;
  const int outputs = (args.dx != nullptr ? 1 : 0) + (args.dresidual != nullptr ? 1 : 0);
  const int kept = args.training && args.dx != nullptr ? 2 : 1;
  const int in_sums = args.dweight ? 2 : kept;
  const bool sums = in_sums == 2 || args.dbias;
  return {.tensors = 2,
          .summed = sums ? Traffic{std::max(for_dz, in_sums), mask} : Traffic{},
          .applied = outputs > 0 ? Traffic{std::max(for_dz, kept), mask} : Traffic{},
          .held = outputs > 0 ? kept : 0,
          .besides = {outputs}};
}

}  // namespace bn::cuda
