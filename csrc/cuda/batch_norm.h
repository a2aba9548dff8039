#pragma once

#include "core/arguments.h"
#include "cuda/plan.h"

struct CUstream_st;

// Batch normalization on the GPU that is current, in order with what else is on the stream. The plan is that of the
// problem and of work_of the arguments; the workspace, of workspace_bytes, need not be initialized.
namespace bn::cuda {

void batch_norm_forward(const ForwardArgs& args, const LaunchPlan& plan, void* workspace, CUstream_st* stream);
void batch_norm_backward(const BackwardArgs& args, const LaunchPlan& plan, void* workspace, CUstream_st* stream);

}  // namespace bn::cuda
