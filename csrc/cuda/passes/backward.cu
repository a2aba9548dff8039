#include "core/finish.h"
#include "cuda/kernel/count.h"
#include "cuda/kernel/functor.h"
#include "cuda/kernel/kernel.h"
#include "cuda/launch.h"
#include "cuda/passes/mask.h"

#include <algorithm>

namespace bn::cuda {
namespace {

// dz, the gradient of the activation's input, replaces dy as soon as dy is read. dz is summed before it is rounded. It
// is held and applied in the type of the tensors, in which the gradient of a residual is written.
template <class T_, class Functor, bool kMasked_>
class BackwardPass {
 public:
  using T = T_;
  using A = Acc<T>;
  using Reference = NormalizeCoefficients<A>;
  struct Coefficients {
    NormalizeCoefficients<A> forward;
    GradientCoefficients<A> backward;
  };
  using Inputs = BackwardInputs;
  struct Finished {
    Coefficients coefficients;
    GradientSums sums;
  };
  static constexpr const char* kName = "batch_norm_backward";
  static constexpr bool kMasked = kMasked_;
  static constexpr bool kPlain = std::is_same_v<Functor, activation::Identity>;
  static constexpr bool kRounds = kIsAny<Functor> && !std::is_same_v<T, A>;
  static constexpr int kTensors = kIsAny<Functor> ? 3 : 2;  // a residual is read by Any alone
  static constexpr bool kRefersToChannels = true;
  static constexpr int kHeld = 2;
  // Not measured. With an activation two packs of a 2-byte type spill on sm_80, per lane.
  static constexpr int kSumBatch = batch_of<Functor>(sizeof(T) == 2 && !kPlain ? 1 : 4);
  static constexpr int kApplyBatch = kSumBatch;

  static_assert(!kMasked || !kPlain, "prepare selects dz by the mask");

  BackwardPass(const BackwardArgs& args, const CountedMask& counted, const Functor& activation)
      : args_(args),
        mask_(args.mask, args.problem),
        count_(static_cast<double>(args.problem.count_of(0))),
        last_count_(static_cast<double>(args.problem.count_of(args.problem.sets() - 1))),
        activation_(activation) {
    const Pass pass = pass_of(args);
    reduce_reads_ = pass.reduce_reads().tensors;
    apply_reads_ = pass.apply_reads().tensors;
    applies_ = pass.applies();
    finishes_sets_ = bn::finishes_sets(args);
    branches_ = pass.chain.branches ? args.epilogue.branches : nullptr;
    args_.mask = counted.mask;
  }

  BN_DEVICE const T* summed(int j) const { return tensor(j, reduce_reads_); }
  BN_DEVICE const T* applied(int j, bool held) const { return held ? nullptr : tensor(j, apply_reads_); }
  BN_DEVICE const uint8_t* summed_branches() const { return branches_; }
  BN_DEVICE const uint8_t* applied_branches(bool held) const { return held ? nullptr : branches_; }
  BN_DEVICE const MaskValues<A>& mask() const { return mask_; }
  BN_DEVICE bool writes() const { return applies_; }
  BN_HD bool finishes_sets() const { return finishes_sets_; }

  BN_DEVICE void begin(const TeamSums&) const {}

  BN_DEVICE Reference reference(int64_t set, int64_t c) const {
    return repeat_forward<A>(args_, set, c, read_inputs(args_, set, c));
  }

  // In lanes that do not count dz is 0.
  template <class Batch, class PackMask, class CoefficientsOf>
  BN_DEVICE void prepare(Batch& batch, int u, const PackMask& mask, const CoefficientsOf& of_lane) const {
    if constexpr (!kPlain) {
      with_known(activation_, [&](const auto& known) {
        Pack<T> dz = {};
#pragma unroll
        for (int l = 0; l < Pack<T>::kLanes; ++l) {
          const A exact = mask.counts(l) ? gradient(known, batch, u, l, forward_of(of_lane(l))) : 0;
          dz.set(l, static_cast<T>(exact));
          batch.exact[u][l] = exact;
        }
        batch.tensor[0][u] = dz;
      });
    }
  }

  template <class B, class Batch, class PackMask>
  BN_DEVICE Factors<B> factors(const Batch& batch, int u, int l, const PackMask& mask, const Reference& k) const {
    const A dz = kRounds ? batch.exact[u][l] : batch.tensor[0][u].get(l);
    const B d = static_cast<B>(batch.tensor[1][u].get(l)) - static_cast<B>(k.shift);
    return {static_cast<B>(dz), mask.keep(l, d)};
  }

  BN_DEVICE Inputs inputs(int64_t set, int64_t c) const { return read_inputs(args_, set, c); }

  BN_DEVICE Finished
  finish(int64_t set, int64_t c, const Inputs& in, const Reference& reference, double sum, double product) const {
    const auto& [coefficients, sums] = finish_backward<A>(args_, set, c, in, count_of(set), sum, product);
    return {{reduce_reads_ > 0 ? reference : repeat_forward<A>(args_, set, c, in), coefficients}, sums};
  }

  BN_DEVICE static const Coefficients& coefficients(const Finished& finished) { return finished.coefficients; }

  BN_DEVICE void store(int64_t set, int64_t c, const Inputs& in, const Finished& finished) const {
    store_backward(args_, set, c, in, finished.sums);
  }

  BN_DEVICE void finish_sets(int64_t c) const {
    bn::finish_sets(args_, c, [](const double* p) { return gpu::load_written(p); });
  }

  template <class Batch, class PackMask, class CoefficientsOf>
  BN_DEVICE void write(const Batch& batch,
                       int u,
                       const PackPlace& place,
                       const PackMask& mask,
                       const CoefficientsOf& of_lane,
                       const Geometry& g) const {
    const Pack<T>& dz = batch.tensor[0][u];
    if (args_.dx != nullptr) {
      Pack<T> dx = {};
#pragma unroll
      for (int l = 0; l < Pack<T>::kLanes; ++l) {
        const auto& [forward, backward] = of_lane(l);
        const A x = batch.tensor[1][u].get(l);
        const A through = through_statistics(x, forward.shift, backward.slope, backward.offset);
        const A own = args_.training ? input_gradient(dz.get(l), mask.weigh(l, through), forward.scale)
                                     : dz.get(l) * forward.scale;
        dx.set(l, static_cast<T>(mask.keep(l, own)));
      }
      store_pack(static_cast<T*>(args_.dx) + place.offset, dx, place.lanes, g.aligned);
    }
    if (args_.dresidual != nullptr) {
      store_pack(static_cast<T*>(args_.dresidual) + place.offset, dz, place.lanes, g.aligned);
    }
  }

 private:
  // The number of values that the statistics of a set are of.
  BN_DEVICE Count count_of(int64_t set) const {
    if (args_.counts != nullptr) {
      return Count(args_.counts[set]);
    }
    if constexpr (kMasked) {
      return Count(counted(args_.problem, args_.mask, set).count);
    } else {
      return set < args_.problem.sets() - 1 ? count_ : last_count_;
    }
  }

  static BN_DEVICE const NormalizeCoefficients<A>& forward_of(const NormalizeCoefficients<A>& k) { return k; }
  static BN_DEVICE const NormalizeCoefficients<A>& forward_of(const Coefficients& k) { return k.forward; }

  template <class Known, class Batch>
  BN_DEVICE A gradient(const Known& known, const Batch& batch, int u, int l, const NormalizeCoefficients<A>& k) const {
    const A dy = batch.tensor[0][u].get(l);
    if constexpr (Known::kBranches) {
      if (branches_ != nullptr) {
        return known.gradient_on((batch.bits[u] >> l & 1) != 0, dy);
      }
    }
    A z = normalize(batch.tensor[1][u].get(l), k.shift, k.scale, k.offset);
    if constexpr (kTensors > 2) {
      z = z + batch.tensor[2][u].get(l);
    }
    return activation::gradient(known, dy, z);
  }

  BN_DEVICE const T* tensor(int j, int read) const {
    const void* const tensors[] = {args_.dy, args_.x, args_.epilogue.residual};
    return j < read ? static_cast<const T*>(tensors[j]) : nullptr;
  }

  BackwardArgs args_;
  MaskValues<A> mask_;
  Count count_;  // of each set but the last
  Count last_count_;
  Functor activation_;
  int reduce_reads_;  // of dy, x and the residual, the first so many
  int apply_reads_;
  bool applies_;
  bool finishes_sets_;
  const uint8_t* branches_;
};

}  // namespace

void batch_norm_backward(const BackwardArgs& args, const LaunchPlan& plan, void* workspace, CUstream_st* stream) {
  const bool aligned =
      packs_align(args.problem, plan, {args.dy, args.x, args.epilogue.residual, args.dx, args.dresidual});
  const CountedMask counted = counted_mask(args.problem, args.mask, plan, workspace, stream);
  const auto run = [&](const auto& activation, auto masked) {
    with_type(args.problem.dtype, [&](auto type) {
      using Pass = BackwardPass<decltype(type), std::decay_t<decltype(activation)>, masked.value>;
      launch_batch_norm(Pass(args, counted, activation), args.problem, aligned, plan, workspace, stream);
    });
  };
  const Pass pass = pass_of(args);
  const bool reads_residual = std::max(pass.reduce_reads().tensors, pass.apply_reads().tensors) == 3;
  if (args.mask) {
    run(activation::Any{{}, args.epilogue.activation}, std::true_type{});
  } else if (reads_residual) {
    run(activation::Any{{}, args.epilogue.activation}, std::false_type{});
  } else {
    with_compiled(args.epilogue.activation, [&](const auto& activation) { run(activation, std::false_type{}); });
  }
}

}  // namespace bn::cuda
