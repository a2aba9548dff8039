#pragma once

#include "core/arguments.h"
#include "cuda/plan.h"

struct CUstream_st;

// Batch normalization on the GPU that is current, in order with what else is on the stream. `plan` is the plan of
// pass_of(args). The workspace has plan.workspace_bytes and need not be initialized.
namespace bn::cuda {

void batch_norm_forward(const ForwardArgs& args, const LaunchPlan& plan, void* workspace, CUstream_st* stream);
void batch_norm_backward(const BackwardArgs& args, const LaunchPlan& plan, void* workspace, CUstream_st* stream);
void batch_norm_merge_rows(const MergeArgs& args, CUstream_st* stream);

}  // namespace bn::cuda
