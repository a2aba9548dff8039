#include "core/finish.h"
#include "cuda/kernel/count.h"
#include "cuda/kernel/functor.h"
#include "cuda/kernel/kernel.h"
#include "cuda/launch.h"
#include "cuda/passes/mask.h"

namespace bn::cuda {
namespace {

template <class T_, class Functor, bool kMasked_>
class ForwardPass {
 public:
  using T = T_;
  using A = Acc<T>;
  using Reference = A;
  using Coefficients = NormalizeCoefficients<A>;
  using Inputs = ForwardInputs;
  struct Finished {
    FinishedForward<A> channel;
    Moments batch;
  };
  static constexpr const char* kName = "batch_norm_forward";
  static constexpr bool kMasked = kMasked_;
  static constexpr bool kPlain = std::is_same_v<Functor, activation::Identity>;  // and there is no residual
  static constexpr int kTensors = kPlain ? 1 : 2;
  static constexpr int kHeld = 1;
  static constexpr bool kRefersToChannels = kMasked;
  // Not measured. The mask of a pack takes as many registers as the pack, or twice as many: with it, two packs of a
  // 2-byte type spill.
  static constexpr int kSumBatch = kMasked ? (sizeof(T) == 2 ? 1 : 4) : (sizeof(T) == 2 ? 4 : 8);
  static constexpr int kApplyBatch = kPlain ? kSumBatch : batch_of<Functor>(4);  // of two tensors

  ForwardPass(const ForwardArgs& args, const CountedMask& counted, const Functor& activation)
      : args_(args),
        mask_(args.mask, args.problem),
        samples_(counted.samples),
        count_(static_cast<double>(args.problem.count_of(0))),
        last_count_(static_cast<double>(args.problem.count_of(args.problem.sets() - 1))),
        activation_(activation),
        branches_(pass_of(args).writes().branches ? args.epilogue.branches : nullptr),
        reduces_(pass_of(args).reduces()),
        applies_(pass_of(args).applies()),
        finishes_sets_(bn::finishes_sets(args)) {
    args_.mask = counted.mask;
  }

  BN_DEVICE const T* summed(int j) const { return reduces_ && j == 0 ? x() : nullptr; }
  BN_DEVICE const T* applied(int j, bool) const {
    return j == 0 ? x() : static_cast<const T*>(args_.epilogue.residual);
  }
  BN_DEVICE const uint8_t* summed_branches() const { return nullptr; }
  BN_DEVICE const uint8_t* applied_branches(bool) const { return nullptr; }
  BN_DEVICE const MaskValues<A>& mask() const { return mask_; }
  BN_DEVICE bool writes() const { return applies_; }
  BN_HD bool finishes_sets() const { return finishes_sets_; }

  // Counts the batch once, unless too little counts for a variance, and sets the momentum in the blocks that will write
  // running statistics.
  BN_DEVICE void begin(const TeamSums& team) {
    momentum_ = args_.momentum;
    if (!reduces_ || args_.num_batches_tracked == nullptr) {
      return;
    }
    if (kMasked && freedom_of_all(args_.problem, args_.mask) <= 0) {
      return;
    }
    if (args_.cumulative && team.leads()) {
      momentum_ = team.broadcast([&] { return 1 / static_cast<double>(count_batch(team.teams())); });
    } else if (!args_.cumulative && gpu::block() == 0 && gpu::thread() == 0) {
      ++*args_.num_batches_tracked;
    }
  }

  // One of the lane's own values, so that differences from it lose no digits.
  template <class Batch, class PackMask>
  BN_DEVICE A reference(const Batch& batch, const PackMask (&masks)[kSumBatch], int l) const {
    const A x = batch.tensor[0][0].get(l);
    const A y = masks[1].counts(l) ? batch.tensor[0][1].get(l) : x;
    const A z = masks[2].counts(l) ? batch.tensor[0][2].get(l) : x;
    return middle(x, y, z);
  }

  // The set's first value in the channel: its distance from the mean costs no digits that matter in double precision.
  // With a mask, one of the values that count, because lanes refer to it too: none of their own first ones may count.
  BN_DEVICE A reference(int64_t set, int64_t c) const {
    if constexpr (!kMasked) {
      return finite_or_zero(value(set, c, 0));
    } else {
      const auto& [first, second, third] = samples_[set].position;
      return middle(value(set, c, first), value(set, c, second), value(set, c, third));
    }
  }

  template <class Batch, class PackMask, class ReferenceOf>
  BN_DEVICE void prepare(Batch&, int, const PackMask&, const ReferenceOf&) const {}

  template <class B, class Batch, class PackMask>
  BN_DEVICE Factors<B> factors(const Batch& batch, int u, int l, const PackMask& mask, A reference) const {
    const B d = static_cast<B>(batch.tensor[0][u].get(l)) - static_cast<B>(reference);
    return mask.counts(l) ? Factors<B>{mask.weigh(l, d), d} : Factors<B>{0, 0};
  }

  // `own` is what the lane referred to.
  BN_DEVICE void settle(double& sum, double& sum_sq, double count, A own, A reference) const {
    const double delta = static_cast<double>(own) - static_cast<double>(reference);
    const ShiftedSums moved = move_shift({sum, sum_sq}, count, delta);
    sum = moved.sum;
    sum_sq = moved.sum_sq;
  }

  BN_DEVICE Inputs inputs(int64_t set, int64_t c) const { return read_inputs(args_, set, c); }

  BN_DEVICE Finished finish(int64_t set, int64_t, const Inputs& in, A reference, double sum, double sum_sq) const {
    const auto count = count_of(set);
    const bool some = reduces_ && (!kMasked || static_cast<double>(count) > 0);
    const Moments batch = some ? shifted_moments(count, static_cast<double>(reference), sum, sum_sq) : Moments{};
    return {finish_forward<A>(args_, in, batch, count), batch};
  }

  BN_DEVICE static const Coefficients& coefficients(const Finished& finished) { return finished.channel.coefficients; }

  BN_DEVICE void store(int64_t set, int64_t c, const Inputs& in, const Finished& finished) const {
    store_forward(args_, set, c, in, finished.batch, finished.channel, momentum_);
  }

  BN_DEVICE void finish_sets(int64_t c) const {
    bn::finish_sets(args_, c, momentum_, [](const double* p) { return gpu::load_written(p); });
  }

  template <class Batch, class PackMask, class CoefficientsOf>
  BN_DEVICE void write(const Batch& batch,
                       int u,
                       const PackPlace& place,
                       const PackMask& mask,
                       const CoefficientsOf& of_lane,
                       const Geometry& g) const {
    Pack<T> y = {};
    uint32_t bits = 0;
    with_known(activation_, [&](const auto& known) {
#pragma unroll
      for (int l = 0; l < Pack<T>::kLanes; ++l) {
        const Coefficients& k = of_lane(l);
        A z = normalize(batch.tensor[0][u].get(l), k.shift, k.scale, k.offset);
        if constexpr (!kPlain) {
          z = z + batch.tensor[1][u].get(l);
        }
        y.set(l, static_cast<T>(mask.keep(l, known.value(z))));
        if constexpr (std::decay_t<decltype(known)>::kBranches) {
          bits |= static_cast<uint32_t>(known.branch(z)) << l;
        }
      }
    });
    store_pack(static_cast<T*>(args_.y) + place.offset, y, place.lanes, g.aligned);
    if (!kPlain && branches_ != nullptr) {
      store_bits<Pack<T>::kLanes>(branches_, bits, place, g.whole_bytes);
    }
  }

 private:
  BN_DEVICE const T* x() const { return static_cast<const T*>(args_.x); }

  BN_DEVICE auto count_of(int64_t set) const {
    if constexpr (kMasked) {
      return counted(args_.problem, args_.mask, set).count;
    } else {
      return set < args_.problem.sets() - 1 ? count_ : last_count_;
    }
  }

  // In a channel of a set.
  BN_DEVICE A value(int64_t set, int64_t c, int64_t position) const {
    const Problem& p = args_.problem;
    const int64_t row = set * p.per_set + position / p.s;
    return static_cast<A>(x()[(row * p.c + c) * p.s + position % p.s]);
  }

  // The middle one of three values is no single outlier.
  static BN_DEVICE A middle(A x, A y, A z) {
    const A low = x < y ? x : y;
    const A high = x < y ? y : x;
    return finite_or_zero(z < low ? low : z < high ? z : high);
  }

  // Returns the number of batches, this one included. The leaders of all teams have to read the counter before one of
  // them increments it: each leader adds 1 to the upper 24 bits as it reads, and the last leader writes the new count.
  // There is room for 2^24 teams and 2^40 batches.
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
  MaskValues<A> mask_;
  const Samples* samples_;
  Count count_;  // of each set but the last
  Count last_count_;
  Functor activation_;
  uint8_t* branches_;
  bool reduces_;
  bool applies_;
  bool finishes_sets_;
  double momentum_ = 0;
};

}  // namespace

void batch_norm_forward(const ForwardArgs& args, const LaunchPlan& plan, void* workspace, CUstream_st* stream) {
  const bool aligned = packs_align(args.problem, plan, {args.x, args.epilogue.residual, args.y});
  if (plan.zeroed_branches) {
    gpu::set_to_zero(args.epilogue.branches, branch_bytes(args.problem.count() * args.problem.c), stream);
  }
  const CountedMask counted = counted_mask(args.problem, args.mask, plan, workspace, stream);
  const auto run = [&](const auto& activation, auto masked) {
    with_type(args.problem.dtype, [&](auto type) {
      using Pass = ForwardPass<decltype(type), std::decay_t<decltype(activation)>, masked.value>;
      launch_batch_norm(Pass(args, counted, activation), args.problem, aligned, plan, workspace, stream);
    });
  };
  const Epilogue& e = args.epilogue;
  if (args.mask) {
    run(activation::Any{{}, e.activation}, std::true_type{});
  } else if (e.activation.kind == ActivationKind::Identity && e.residual != nullptr) {
    run(activation::Any{{}, e.activation}, std::false_type{});
  } else {
    with_compiled(e.activation, [&](const auto& activation) { run(activation, std::false_type{}); });
  }
}

}  // namespace bn::cuda
