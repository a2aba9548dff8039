#include "core/finish.h"
#include "cuda/gpu/gpu.h"
#include "cuda/launch.h"

namespace bn::cuda {
namespace {

constexpr int kThreads = 128;  // not measured

// A thread for each channel: rows have to be merged in their order. The sanitizers of `make gpu` look at kernels with
// batch_norm_kernel in their names.
BN_KERNEL(kThreads) merge_rows_batch_norm_kernel(MergeArgs args) {
  const int64_t c = int64_t{gpu::block()} * kThreads + gpu::thread();
  if (c < args.c) {
    merge_rows(args, c);
  }
}

}  // namespace

void batch_norm_merge_rows(const MergeArgs& args, CUstream_st* stream) {
  gpu::launch("batch_norm_merge_rows", merge_rows_batch_norm_kernel,
              {divide_up(args.c, kThreads), kThreads, 0, 1, false}, stream, args);
}

}  // namespace bn::cuda
