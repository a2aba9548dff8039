#pragma once

#include "cuda/gpu/gpu.h"
#include "cuda/kernel/branches.h"
#include "cuda/kernel/lane_sums.h"
#include "cuda/kernel/mask.h"
#include "cuda/kernel/slab.h"
#include "cuda/kernel/team_sums.h"
#include "cuda/plan.h"

// The one kernel. For each slab it reads tensors and adds up every channel, finishes the channels, and computes and
// writes every element. The plan decides what stays on chip in between. The pass decides what is added and written; it
// has these members:
//
//   T, A                    the type of the elements, the type of their sums
//   Reference               one per lane: what the factors of its elements refer to
//   Coefficients            one per channel: what its elements are computed with
//   kTensors, kHeld         the number of tensors that it can read; the first kHeld of them can be held
//   kSumBatch, kApplyBatch  packs of each tensor that a thread reads at a time, to sum and to apply
//   summed(j)               tensor j if it is read to be summed, else null
//   applied(j, held)        tensor j if it is read to compute outputs, for packs that are held or not, else null
//   summed_branches(), applied_branches(held)   the branch bits, if they are read, else null
//   kMasked, mask()         whether there is a mask; what it is then
//   writes()                whether there are outputs
//   begin(sums)             is called before a block's first slab
//   reference(set, c)       a channel's reference
//   kRefersToChannels       whether lanes refer to it; else to reference(batch, masks, l), by the first batch
//   prepare(...)            replaces a pack that was read by the pack that is held
//   factors<B>(...)         u and w of an element, in type B
//   settle(...)             turns the sums of a lane into sums about the reference of its channel
//   Inputs, inputs(set, c)  what finishing a channel reads from memory
//   Finished, finish(...)   the coefficients of a channel, and what store() needs besides
//   store(set, c, ...)      stores a channel's results
//   finishes_sets()         whether something is added up over sets
//   finish_sets(c)          adds it up for channel c, when the channel is finished in all sets
//   write(...)              stores a pack of each output
namespace bn::cuda {

// The packs that a thread reads at a time. A tensor that is not read, or branch bits, give zeros.
template <class T, int kTensors, int kPacks>
struct Batch {
  Pack<T> tensor[kTensors][kPacks];
  uint32_t bits[kPacks];
  Acc<T> exact[kPacks][Pack<T>::kLanes];  // prepare's result for the first tensor, before it is rounded
};

template <class Pass>
struct KernelArgs {
  Pass pass;
  Geometry geometry;
  SharedLayout at;
  TeamSums::Workspace workspace;
  unsigned* finished;  // of several sets: the sets in which a run of channels is finished, for each run
};

template <class Pass, int kSummed>
class Block {
 public:
  using T = typename Pass::T;
  using A = typename Pass::A;
  using Reference = typename Pass::Reference;
  using Coefficients = typename Pass::Coefficients;
  using Inputs = typename Pass::Inputs;

  BN_DEVICE explicit Block(const KernelArgs<Pass>& args)
      : pass_(args.pass),
        g_(args.geometry),
        tile_(gpu::shared_array<Pack<T>>(args.at.tile)),
        references_(gpu::shared_array<Reference>(args.at.references)),
        coefficients_(gpu::shared_array<Coefficients>(args.at.coefficients)),
        sums_(args.geometry, args.at, args.workspace),
        finished_(args.finished) {}

  BN_DEVICE void run() {
    pass_.begin(sums_);
    for (int64_t i = sums_.team(); i < g_.slabs; i += g_.teams) {
      const OwnSlab slab(g_, i, sums_.rank());
      const bool reduces = pass_.summed(0) != nullptr;
      LaneSums<kSummed> sums;
      if (reduces) {
        sums = sum(slab);
      }
      const Inputs inputs = kReadsAhead ? read_inputs(slab) : Inputs{};
      if (reduces) {
        sums_.add_up(sums);
      }
      finish(slab, inputs);
      if (pass_.writes()) {
        apply(slab);
      }
      if (pass_.finishes_sets() && sums_.leads()) {
        finish_sets(slab);
      }
    }
    sums_.part();
  }

 private:
  static constexpr bool kMasked = Pass::kMasked;
  // Whether the inputs of the finish are read while the team adds up. With a mask there are no registers for it.
  static constexpr bool kReadsAhead = !kMasked;
  using OwnSlab = Slab<T, (kSummed > 1)>;
  using PackMask = std::conditional_t<kMasked, Masked<T>, Unmasked<T>>;
  template <int kPacks>
  using BatchOf = Batch<T, Pass::kTensors, kPacks>;

  // The number in the slab of the channel of lane l, which is the same in all packs of this thread.
  BN_DEVICE int lane_in_slab(const OwnSlab& slab, int l) const { return kSummed == 1 ? 0 : slab.channel(l); }

  // The sums of this thread, about the references of the channels.
  BN_DEVICE LaneSums<kSummed> sum(const OwnSlab& slab) const {
    Reference reference[kSummed] = {};
    LaneSums<kSummed> sums = sum_packs<A, Pass::kSumBatch>(slab, reference);
    if constexpr (sizeof(A) < sizeof(double)) {
      if (!sums.finite()) {
        sums = sum_packs<double, 1>(slab, reference);
      }
    }
    if constexpr (!Pass::kRefersToChannels) {
      gpu::sync_block();
#pragma unroll
      for (int l = 0; l < kSummed; ++l) {
        pass_.settle(sums.sum[l], sums.product[l], sums.count, reference[l], references_.read(lane_in_slab(slab, l)));
      }
    }
    return sums;
  }

  // Sums all packs of this thread, in batches that are added up in type B, and writes those that are held to the tile.
  // The first batch in type A also gives the references.
  template <class B, int kAtOnce>
  BN_DEVICE LaneSums<kSummed> sum_packs(const OwnSlab& slab, Reference (&reference)[kSummed]) const {
    constexpr bool kRefers = std::is_same_v<A, B>;
    LaneSums<kSummed> sums;
    for (int i = 0; i < slab.packs() || (kRefers && i == 0); i += kAtOnce) {
      BatchOf<kAtOnce> batch;
      PackMask masks[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const PackPlace place = slab.place(i + u);
        masks[u] = mask_of(place);
        sums.count += kSummed == 1 ? place.lanes : i + u < slab.packs();
#pragma unroll
        for (int j = 0; j < Pass::kTensors; ++j) {
          batch.tensor[j][u] = load(pass_.summed(j), place);
        }
        batch.bits[u] = load_bits(pass_.summed_branches(), place);
      }
      if constexpr (kRefers) {
        if (i == 0) {
          refer(slab, batch, masks, reference);
        }
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        pass_.prepare(batch, u, masks[u], [&](int l) -> const Reference& { return reference[l % kSummed]; });
#pragma unroll
        for (int j = 0; j < Pass::kHeld; ++j) {
          if (i + u < g_.held && j < g_.tensors_held) {
            tile_.write(tile_index(i + u, j), batch.tensor[j][u]);
          }
        }
      }
      const auto factors = [&](int u, int l) {
        return pass_.template factors<B>(batch, u, l, masks[u], reference[l % kSummed]);
      };
      add_batch<B, kAtOnce, Pack<T>::kLanes>(factors, sums);
    }
    return sums;
  }

  // The reference of a channel is computed by one thread for the block, while the first batch is being loaded.
  template <int kAtOnce>
  BN_DEVICE void refer(const OwnSlab& slab,
                       const BatchOf<kAtOnce>& batch,
                       const PackMask (&masks)[kAtOnce],
                       Reference (&reference)[kSummed]) const {
    // A block has threads for all channels; without a loop backwards of bfloat16 spill on sm_75.
    for (int k = gpu::thread(); k < slab.channels(); k += gpu::threads()) {
      references_.write(k, pass_.reference(slab.set(), slab.first_channel() + k));
    }
    if constexpr (Pass::kRefersToChannels) {
      gpu::sync_block();
    }
#pragma unroll
    for (int l = 0; l < kSummed; ++l) {
      if constexpr (Pass::kRefersToChannels) {
        reference[l] = references_.read(lane_in_slab(slab, l));
      } else {
        reference[l] = pass_.reference(batch, masks, l);
      }
    }
  }

  // Each channel is finished by one thread; a block has threads for all channels of a slab.
  BN_DEVICE static bool has_channel(const OwnSlab& slab) { return gpu::thread() < slab.channels(); }
  BN_DEVICE static int64_t own_channel(const OwnSlab& slab) { return slab.first_channel() + gpu::thread(); }

  BN_DEVICE Inputs read_inputs(const OwnSlab& slab) const {
    return has_channel(slab) ? pass_.inputs(slab.set(), own_channel(slab)) : Inputs{};
  }

  // All threads wait for the coefficients, none for what is stored for the caller.
  BN_DEVICE void finish(const OwnSlab& slab, Inputs inputs) {
    const int k = gpu::thread();
    const int64_t set = slab.set();
    const int64_t c = own_channel(slab);
    typename Pass::Finished finished;
    if (has_channel(slab)) {
      const bool reduces = pass_.summed(0) != nullptr;
      if constexpr (!kReadsAhead) {
        inputs = read_inputs(slab);
      }
      finished = reduces ? pass_.finish(set, c, inputs, references_.read(k), sums_.sum(k), sums_.product(k))
                         : pass_.finish(set, c, inputs, {}, 0, 0);
      coefficients_.write(k, pass_.coefficients(finished));
    }
    gpu::sync_block();
    if (has_channel(slab) && sums_.leads()) {
      pass_.store(set, c, inputs, finished);
    }
  }

  BN_DEVICE void finish_sets(const OwnSlab& slab) const {
    if (gpu::last_to_arrive(finished_ + slab.number(), static_cast<unsigned>(g_.sets)) && has_channel(slab)) {
      pass_.finish_sets(own_channel(slab));
    }
  }

  // Goes backwards: the last packs are still in the cache, the first ones are in the tile.
  BN_DEVICE void apply(const OwnSlab& slab) const {
    constexpr int kAtOnce = Pass::kApplyBatch;
    static_assert(Pass::kSumBatch % kAtOnce == 0, "what is read of the tile was written");
    Coefficients k[kSummed];
#pragma unroll
    for (int l = 0; l < kSummed; ++l) {
      k[l] = coefficients_.read(lane_in_slab(slab, l));
    }
    const auto of_lane = [&](int l) -> const Coefficients& { return k[l % kSummed]; };
    for (int i = (slab.packs() + kAtOnce - 1) / kAtOnce * kAtOnce - kAtOnce; i >= 0; i -= kAtOnce) {
      BatchOf<kAtOnce> batch;
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const bool held = i + u < g_.held;
#pragma unroll
        for (int j = 0; j < Pass::kTensors; ++j) {
          batch.tensor[j][u] = held && j < Pass::kHeld && j < g_.tensors_held
                                   ? tile_.read(tile_index(i + u, j))
                                   : load(pass_.applied(j, held), slab.place(i + u));
        }
        batch.bits[u] = load_bits(pass_.applied_branches(held), slab.place(i + u));
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const PackPlace place = slab.place(i + u);
        const PackMask mask = mask_of(place);
        if (i + u >= g_.held) {
          pass_.prepare(batch, u, mask, of_lane);
        }
        pass_.write(batch, u, place, mask, of_lane, g_);
      }
    }
  }

  BN_DEVICE PackMask mask_of(const PackPlace& place) const {
    if constexpr (!kMasked) {
      return {place.lanes};
    } else if constexpr (kSummed == 1) {
      return load_weights<T>(pass_.mask(), place, g_);
    } else {
      return load_weights_per_lane<T>(pass_.mask(), place, g_);
    }
  }

  // Zeros if there is no tensor.
  BN_DEVICE Pack<T> load(const T* tensor, const PackPlace& place) const {
    return tensor == nullptr ? Pack<T>{} : load_pack(tensor + place.offset, place.lanes, g_.aligned);
  }

  BN_DEVICE int tile_index(int i, int j) const { return (i * g_.tensors_held + j) * gpu::threads() + gpu::thread(); }

  Pass pass_;
  const Geometry& g_;
  gpu::Shared<Pack<T>> tile_;
  gpu::Shared<Reference> references_;
  gpu::Shared<Coefficients> coefficients_;
  TeamSums sums_;
  unsigned* finished_;
};

template <class Pass, int kSummed>
BN_KERNEL(kMaxThreads)
batch_norm_kernel(KernelArgs<Pass> args) {
  Block<Pass, kSummed>(args).run();
}

template <class Pass>
void launch_batch_norm(const Pass& pass,
                       const Problem& problem,
                       bool aligned,
                       const LaunchPlan& plan,
                       void* workspace,
                       gpu::Stream stream) {
  constexpr int kLanes = Pack<typename Pass::T>::kLanes;
  char* const finished = static_cast<char*>(workspace) + plan.arrivals_bytes();
  const KernelArgs<Pass> args{
      pass,
      Geometry(problem, plan, aligned),
      plan.layout(kLanes),
      {static_cast<unsigned*>(workspace), reinterpret_cast<double*>(finished + plan.finished_bytes())},
      reinterpret_cast<unsigned*>(finished)};
  if (pass.finishes_sets()) {
    gpu::set_to_zero(finished, plan.finished_bytes(), stream);
  }
  const gpu::LaunchShape shape{plan.blocks(), plan.threads, plan.shared_bytes,
                               plan.team == Team::Cluster ? plan.team_blocks : 1, plan.team == Team::Grid};
  const auto kernel = plan.per_lane() ? batch_norm_kernel<Pass, kLanes> : batch_norm_kernel<Pass, 1>;
  gpu::launch(Pass::kName, kernel, shape, stream, args);
}

}  // namespace bn::cuda
