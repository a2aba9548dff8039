#pragma once

#include "cuda/gpu.h"
#include "cuda/lane_sums.h"
#include "cuda/plan.h"
#include "cuda/slab.h"
#include "cuda/team_sums.h"

// The one kernel: of each slab, read tensors and add up every channel, finish the channels, write what one expression
// makes of every element. What stays on chip meanwhile is the plan's choice; what is added and written, the pass's:
//
//   T, A, Coefficients    of the elements, of their sums, of a channel
//   kTensors, kBatch      tensors it can read; packs of each that a thread reads at a time
//   summed(j), applied(j) the j-th tensor where it is read to be summed, to be applied; null where it is not
//   output()              or null
//   begin(sums)           what has to be known before a block's first slab
//   reference(c, ...)     a number that u and w refer to, for a lane of channel c and the first batch
//   factors<B>(...)       u and w of an element, in the type B
//   settle(...)           turns the sums of a lane into those that all lanes of the channel can add up
//   finish(c, sums, k)    the coefficients of channel c, k in its slab
//   apply(x, l, k)        an element from the l-th lane of each tensor
namespace bn::cuda {

template <class Pass>
struct KernelArgs {
  Pass pass;
  Geometry geometry;
  SharedLayout at;
  TeamSums::Workspace workspace;
};

template <class Pass, int kSummed>
class Block {
 public:
  using T = typename Pass::T;
  using A = typename Pass::A;
  static constexpr int kBatch = Pass::kBatch;

  BN_DEVICE explicit Block(const KernelArgs<Pass>& args)
      : pass_(args.pass),
        g_(args.geometry),
        tile_(gpu::shared_array<Pack<T>>(args.at.tile)),
        coefficients_(gpu::shared_array<typename Pass::Coefficients>(args.at.coefficients)),
        sums_(args.geometry, args.at, args.workspace) {}

  BN_DEVICE void run() {
    pass_.begin(sums_);
    for (int64_t i = sums_.team(); i < g_.slabs; i += g_.teams) {
      const OwnSlab slab(g_, i, sums_.rank());
      if (pass_.summed(0) != nullptr) {
        add_up(slab);
      }
      finish(slab);
      if (pass_.output() != nullptr) {
        apply(slab);
      }
    }
    sums_.part();
  }

 private:
  using OwnSlab = Slab<T, (kSummed > 1)>;

  // Of a lane of this thread's packs, which is always the same: in the slab, and of all.
  BN_DEVICE int lane_in_slab(const OwnSlab& slab, int l) const { return kSummed == 1 ? 0 : slab.channel(l); }
  BN_DEVICE int64_t channel_of_lane(const OwnSlab& slab, int l) const {
    return slab.first_channel() + lane_in_slab(slab, l);
  }

  BN_DEVICE void add_up(const OwnSlab& slab) {
    A reference[kSummed] = {};
    LaneSums<kSummed> sums = sum_packs<A, kBatch>(slab, reference);
    if (sizeof(A) < sizeof(double) && !sums.finite()) {
      sums = sum_packs<double, 1>(slab, reference);
    }
#pragma unroll
    for (int l = 0; l < kSummed; ++l) {
      pass_.settle(sums.sum[l], sums.product[l], sums.count, reference[l], channel_of_lane(slab, l));
    }
    sums_.add_up(sums);
  }

  // Of all packs of this thread, in batches that are summed in the type B; some of them stay on chip. The references
  // are those that the first batch of kBatch packs gives.
  template <class B, int kAtOnce>
  BN_DEVICE LaneSums<kSummed> sum_packs(const OwnSlab& slab, A (&reference)[kSummed]) const {
    LaneSums<kSummed> sums;
    for (int i = 0; i < slab.packs(); i += kAtOnce) {
      Pack<T> batch[Pass::kTensors][kAtOnce];
      int lanes[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const auto place = slab.place(i + u);
        lanes[u] = place.lanes;
        sums.count += kSummed == 1 ? place.lanes : i + u < slab.packs();
#pragma unroll
        for (int j = 0; j < Pass::kTensors; ++j) {
          batch[j][u] = load(pass_.summed(j), place);
        }
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
        for (int j = 0; j < Pass::kTensors; ++j) {
          if (i + u < g_.held && j < g_.tensors_held) {
            tile_.write(tile_index(i + u, j), batch[j][u]);
          }
        }
      }
      if constexpr (kAtOnce == kBatch) {
#pragma unroll
        for (int l = 0; i == 0 && l < kSummed; ++l) {
          reference[l] = pass_.reference(channel_of_lane(slab, l), batch, lanes, l);
        }
      }
      const auto factors = [&](int u, int l) {
        return pass_.template factors<B>(batch, u, l, l < lanes[u], reference[l % kSummed]);
      };
      add_batch<B, kAtOnce, Pack<T>::kLanes>(factors, sums);
    }
    return sums;
  }

  BN_DEVICE void finish(const OwnSlab& slab) {
    for (int k = gpu::thread(); k < slab.channels(); k += gpu::threads()) {
      coefficients_.write(k, pass_.finish(slab.first_channel() + k, sums_, k));
    }
    gpu::sync_block();
  }

  // Backwards, from what the cache saw last to what the tile holds.
  BN_DEVICE void apply(const OwnSlab& slab) const {
    typename Pass::Coefficients k[kSummed];
#pragma unroll
    for (int l = 0; l < kSummed; ++l) {
      k[l] = coefficients_.read(lane_in_slab(slab, l));
    }
    for (int i = (slab.packs() + kBatch - 1) / kBatch * kBatch - kBatch; i >= 0; i -= kBatch) {
      Pack<T> batch[Pass::kTensors][kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
#pragma unroll
        for (int j = 0; j < Pass::kTensors; ++j) {
          batch[j][u] = i + u < g_.held && j < g_.tensors_held ? tile_.read(tile_index(i + u, j))
                                                               : load(pass_.applied(j), slab.place(i + u));
        }
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        Pack<T> out = {};
#pragma unroll
        for (int l = 0; l < Pack<T>::kLanes; ++l) {
          out.set(l, static_cast<T>(pass_.apply(batch, u, l, k[l % kSummed])));
        }
        const auto place = slab.place(i + u);
        store_pack(pass_.output() + place.offset, out, place.lanes, g_.aligned);
      }
    }
  }

  // Zeros where there is no tensor.
  BN_DEVICE Pack<T> load(const T* tensor, const typename OwnSlab::Place& place) const {
    return tensor == nullptr ? Pack<T>{} : load_pack(tensor + place.offset, place.lanes, g_.aligned);
  }

  BN_DEVICE int tile_index(int i, int j) const { return (i * g_.tensors_held + j) * gpu::threads() + gpu::thread(); }

  Pass pass_;
  const Geometry& g_;
  gpu::Shared<Pack<T>> tile_;
  gpu::Shared<typename Pass::Coefficients> coefficients_;
  TeamSums sums_;
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
  const KernelArgs<Pass> args{pass,
                              Geometry(problem, plan, aligned),
                              plan.layout(kLanes),
                              {static_cast<unsigned*>(workspace),
                               reinterpret_cast<double*>(static_cast<char*>(workspace) + plan.arrivals_bytes())}};
  const gpu::LaunchShape shape{plan.blocks(), plan.threads, plan.shared_bytes,
                               plan.team == Team::Cluster ? plan.team_blocks : 1, plan.team == Team::Grid};
  const auto kernel = plan.per_lane() ? batch_norm_kernel<Pass, kLanes> : batch_norm_kernel<Pass, 1>;
  gpu::launch(Pass::kName, kernel, shape, stream, args);
}

}  // namespace bn::cuda
