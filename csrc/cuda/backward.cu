#include "core/finish.h"
#include "cuda/batch_norm.h"
#include "cuda/kernel.h"

namespace bn::cuda {
namespace {

template <class T_>
class BackwardPass {
 public:
  using T = T_;
  using A = Acc<T>;
  using Coefficients = Backward<A>;
  static constexpr const char* kName = "batch_norm_backward";
  static constexpr int kTensors = 2;
  static constexpr int kBatch = sizeof(T) == 2 ? 2 : 4;

  explicit BackwardPass(const BackwardArgs& args) : args_(args), work_(work_of(args)) {}

  BN_DEVICE const T* summed(int j) const { return tensor(j, work_.summed); }
  BN_DEVICE const T* applied(int j) const { return tensor(j, work_.applied); }
  BN_DEVICE T* output() const { return static_cast<T*>(args_.dx); }

  BN_DEVICE void begin(const TeamSums&) const {}

  BN_DEVICE A reference(int64_t c, const Pack<T> (&)[kTensors][kBatch], const int (&)[kBatch], int) const {
    return SplitMean<A>(args_.mean[c]).shift;
  }

  // Lanes that are not there have dy = 0.
  template <class B, int kAtOnce>
  BN_DEVICE Factors<B> factors(const Pack<T> (&batch)[kTensors][kAtOnce], int u, int l, bool, A shift) const {
    return {static_cast<B>(batch[0][u].get(l)), static_cast<B>(batch[1][u].get(l)) - static_cast<B>(shift)};
  }

  BN_DEVICE void settle(double&, double&, double, A, int64_t) const {}

  BN_DEVICE Coefficients finish(int64_t c, const TeamSums& sums, int k) const {
    const bool summed = work_.summed > 0;
    return finish_backward<A>(args_, c, summed ? sums.sum(k) : 0, summed ? sums.product(k) : 0, sums.leads());
  }

  BN_DEVICE A apply(const Pack<T> (&batch)[kTensors][kBatch], int u, int l, const Coefficients& k) const {
    const A dy = batch[0][u].get(l);
    return work_.applied < 2 ? dy * k.scale
                             : input_gradient(dy, batch[1][u].get(l), k.shift, k.scale, k.slope, k.offset);
  }

 private:
  BN_DEVICE const T* tensor(int j, int read) const {
    return j < read ? static_cast<const T*>(j == 0 ? args_.dy : args_.x) : nullptr;
  }

  BackwardArgs args_;
  Work work_;
};

}  // namespace

Work work_of(const BackwardArgs& args) {
  const bool through_statistics = args.training && args.dx != nullptr;
  const bool sums_x = through_statistics || args.dweight;
  return {2, sums_x ? 2 : args.dbias ? 1 : 0, through_statistics ? 2 : args.dx != nullptr ? 1 : 0};
}

void batch_norm_backward(const BackwardArgs& args, const LaunchPlan& plan, void* workspace, CUstream_st* stream) {
  with_type(args.problem.dtype, [&](auto type) {
    launch_batch_norm(BackwardPass<decltype(type)>(args), args.problem,
                      packs_align(args.problem, plan, {args.dy, args.x, args.dx}), plan, workspace, stream);
  });
}

}  // namespace bn::cuda
