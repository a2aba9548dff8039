#include "core/finish.h"
#include "cuda/batch_norm.h"
#include "cuda/kernel.h"

namespace bn::cuda {
namespace {

template <class T_>
class ForwardPass {
 public:
  using T = T_;
  using A = Acc<T>;
  using Coefficients = Forward<A>;
  static constexpr const char* kName = "batch_norm_forward";
  static constexpr int kTensors = 1;
  static constexpr int kBatch = sizeof(T) == 2 ? 4 : 8;

  explicit ForwardPass(const ForwardArgs& args) : args_(args) {}

  BN_DEVICE const T* summed(int) const { return args_.training ? applied(0) : nullptr; }
  BN_DEVICE const T* applied(int) const { return static_cast<const T*>(args_.x); }
  BN_DEVICE T* output() const { return static_cast<T*>(args_.y); }

  // Counts the batch, once, and finds the momentum for the blocks that will write running statistics.
  BN_DEVICE void begin(const TeamSums& team) {
    momentum_ = args_.momentum;
    if (!args_.training || args_.num_batches_tracked == nullptr) {
      return;
    }
    if (args_.cumulative && team.leads()) {
      momentum_ = team.broadcast([&] { return 1 / static_cast<double>(count_batch(team.teams())); });
    } else if (!args_.cumulative && gpu::block() == 0 && gpu::thread() == 0) {
      ++*args_.num_batches_tracked;
    }
  }

  // Distances from one of the lane's own values lose no digits; of three, so that a single outlier is not it.
  BN_DEVICE A reference(int64_t, const Pack<T> (&batch)[kTensors][kBatch], const int (&lanes)[kBatch], int l) const {
    const A x = batch[0][0].get(l);
    const A y = l < lanes[1] ? batch[0][1].get(l) : x;
    const A z = l < lanes[2] ? batch[0][2].get(l) : x;
    const A low = x < y ? x : y;
    const A high = x < y ? y : x;
    return finite_or_zero(z < low ? low : z < high ? z : high);
  }

  template <class B, int kAtOnce>
  BN_DEVICE Factors<B> factors(const Pack<T> (&batch)[kTensors][kAtOnce], int u, int l, bool there, A reference) const {
    const B d = static_cast<B>(batch[0][u].get(l)) - static_cast<B>(reference);
    return there ? Factors<B>{d, d} : Factors<B>{0, 0};
  }

  // From sums about the lane's reference to sums about the channel's origin.
  BN_DEVICE void settle(double& sum, double& sum_sq, double count, A reference, int64_t c) const {
    const ShiftedSums moved = move_shift({sum, sum_sq}, count, static_cast<double>(reference) - origin(c));
    sum = moved.sum;
    sum_sq = moved.sum_sq;
  }

  BN_DEVICE Coefficients finish(int64_t c, const TeamSums& sums, int k) const {
    const auto count = static_cast<double>(args_.problem.count());
    const Moments batch = args_.training ? shifted_moments(count, origin(c), sums.sum(k), sums.product(k)) : Moments{};
    return finish_forward<A>(args_, c, batch, momentum_, sums.leads());
  }

  BN_DEVICE A apply(const Pack<T> (&batch)[kTensors][kBatch], int u, int l, const Coefficients& k) const {
    return normalize(batch[0][u].get(l), k.shift, k.scale, k.offset);
  }

 private:
  // The channel's first value: in double precision its distance from the mean cancels nothing that would be felt.
  BN_DEVICE double origin(int64_t c) const {
    return finite_or_zero(static_cast<double>(static_cast<A>(applied(0)[c * args_.problem.s])));
  }

  // All that lead a team read the counter before one adds to it: each of them notes that it did in the upper bits,
  // and the last one counts. There is room for 2^24 teams and 2^40 batches. Returns the number of batches, this one
  // included.
  BN_DEVICE int64_t count_batch(int64_t leaders) const {
    constexpr int kCountBits = 40;
    auto* const counter = reinterpret_cast<unsigned long long*>(args_.num_batches_tracked);
    const unsigned long long seen = gpu::atomic_add(counter, 1ULL << kCountBits);
    const auto batches = static_cast<int64_t>((seen & ((1ULL << kCountBits) - 1)) + 1);
    if (static_cast<int64_t>(seen >> kCountBits) == leaders - 1) {
      *args_.num_batches_tracked = batches;
    }
    return batches;
  }

  ForwardArgs args_;
  double momentum_ = 0;
};

}  // namespace

Work work_of(const ForwardArgs& args) {
  return {1, args.training ? 1 : 0, 1};
}

void batch_norm_forward(const ForwardArgs& args, const LaunchPlan& plan, void* workspace, CUstream_st* stream) {
  with_type(args.problem.dtype, [&](auto type) {
    launch_batch_norm(ForwardPass<decltype(type)>(args), args.problem,
                      packs_align(args.problem, plan, {args.x, args.y}), plan, workspace, stream);
  });
}

}  // namespace bn::cuda
