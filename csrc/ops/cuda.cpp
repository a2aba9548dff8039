// Dispatch key CUDA.

#include "cuda/fitting.h"
#include "cuda/launch.h"
#include "cuda/limits.h"
#include "ops/fused.h"
#include "ops/sm_margin.h"
#include "ops/stages.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

namespace bn::ops {
namespace {

template <class Args, class Launch>
void plan_and_launch(const Args& args, const Tensor& input, const Launch& launch) {
  const c10::cuda::CUDAGuard on_device_of(input.device());
  cuda::Limits limits = cuda::current_limits();
  limits.margin = sm_margin();
  cuda::launch_fitting(pass_of(args), limits, [&](const cuda::LaunchPlan& plan) {
    const Tensor workspace = at::empty({plan.workspace_bytes}, at::device(input.device()).dtype(at::kByte));
    launch(args, plan, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream().stream());
  });
}

struct Cuda {
  static void forward(const ForwardArgs& args, const Tensor& input) {
    plan_and_launch(args, input, cuda::batch_norm_forward);
  }
  static void backward(const BackwardArgs& args, const Tensor& input) {
    plan_and_launch(args, input, cuda::batch_norm_backward);
  }
  static void merge_rows(const MergeArgs& args, const Tensor& means) {
    const c10::cuda::CUDAGuard on_device_of(means.device());
    cuda::batch_norm_merge_rows(args, c10::cuda::getCurrentCUDAStream().stream());
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(bn_ext, CUDA, m) {
  m.impl("batch_norm_forward", batch_norm_forward<Cuda>);
  m.impl("batch_norm_forward.evaluation", batch_norm_forward_evaluation<Cuda>);
  m.impl("batch_norm_backward", batch_norm_backward<Cuda>);
  m.impl("batch_norm_stats", batch_norm_stats<Cuda>);
  m.impl("batch_norm_merge_stats", batch_norm_merge_stats<Cuda>);
  m.impl("batch_norm_elemt", batch_norm_elemt<Cuda>);
  m.impl("batch_norm_backward_reduce", batch_norm_backward_reduce<Cuda>);
  m.impl("batch_norm_backward_elemt", batch_norm_backward_elemt<Cuda>);
}

}  // namespace bn::ops
