// The CUDA backend on the model of a GPU, for ctypes: what csrc/ops/cuda.cpp does around its kernels.

#include "cuda/fitting.h"
#include "cuda/launch.h"
#include "model.h"

#include <vector>

namespace {

using bn::cuda::LaunchPlan, bn::cuda::Limits, bn::cuda::Team;

struct Device {
  int multiprocessors;
  int64_t shared_per_block;
  int64_t shared_per_multiprocessor;
  int max_cluster;
};

Limits limits_of(const Device& device) {
  return {"model",
          device.multiprocessors,
          device.shared_per_block,
          device.shared_per_multiprocessor,
          device.max_cluster,
          bn::cuda::clusters_in({std::max(device.multiprocessors, device.max_cluster)}, device.max_cluster)};
}

bn::Problem in_one_form(const bn::Problem& p) {
  return bn::problem_of(p.layout, p.dtype, p.n, p.c, p.s, p.per_set);
}

template <class Args, class Launch>
const char* plan_and_launch(Args args, const Device& device, const Launch& launch) {
  return bn::simt::error_of([&] {
    args.problem = in_one_form(args.problem);
    bn::cuda::launch_fitting(bn::pass_of(args), limits_of(device), [&](const LaunchPlan& plan) {
      const int64_t in_memory = device.shared_per_multiprocessor / (plan.shared_bytes + 1024);
      const int64_t resident =
          device.multiprocessors * std::min<int64_t>(in_memory, bn::cuda::kMaxThreads / plan.threads);
      if (plan.shared_bytes > device.shared_per_block || (plan.team == Team::Grid && plan.blocks() > resident)) {
        throw std::runtime_error("the device is too small for " + to_string(plan));
      }
      std::vector<unsigned char> workspace(plan.workspace_bytes, 0xff);
      launch(args, plan, workspace.data(), nullptr);
    });
  });
}

}  // namespace

extern "C" {

// The sizes of the structures that ctypes mirrors, in the order of MIRRORED in batch_norm.py.
int64_t bn_sizes[] = {sizeof(Device),          sizeof(bn::Problem),      sizeof(bn::PerChannel),
                      sizeof(bn::Mask),        sizeof(bn::Activation),   sizeof(bn::Epilogue),
                      sizeof(bn::ForwardArgs), sizeof(bn::BackwardArgs), sizeof(bn::MergeArgs)};

const char* batch_norm_forward(const bn::ForwardArgs& args, const Device& device) {
  return plan_and_launch(args, device, bn::cuda::batch_norm_forward);
}

const char* batch_norm_backward(const bn::BackwardArgs& args, const Device& device) {
  return plan_and_launch(args, device, bn::cuda::batch_norm_backward);
}

const char* batch_norm_merge_rows(const bn::MergeArgs& args) {
  return bn::simt::error_of([&] { bn::cuda::batch_norm_merge_rows(args, nullptr); });
}

// Writes the plan's strategy and team, as "resident cluster".
const char* name_plan(const bn::Pass& pass, const Device& device, char* name) {
  return bn::simt::error_of([&] {
    bn::Pass call = pass;
    call.problem = in_one_form(call.problem);
    const LaunchPlan plan = bn::cuda::plan(call, limits_of(device));
    std::snprintf(name, 64, "%s %s", name_of(plan.strategy), name_of(plan.team));
  });
}
}
