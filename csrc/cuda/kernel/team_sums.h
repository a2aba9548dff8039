#pragma once

#include "cuda/gpu/gpu.h"
#include "cuda/kernel/lane_sums.h"
#include "cuda/kernel/slab.h"
#include "cuda/plan.h"

// Adds up the two sums of each channel of a slab: over the lanes and threads of a block, then over the blocks of a
// team. All is in double precision, in an order that the plan alone decides.
namespace bn::cuda {

// Reads from other blocks that a thread has under way at a time: each takes many times as long as an addition. Not
// measured.
constexpr int kReadsAtOnce = 8;

// The sum of read(i) over i = first, first + step, ... < entries, added in this order.
template <int kAtOnce, class Read>
BN_DEVICE double sum_steps(int first, int step, int entries, const Read& read) {
  double sum = 0;
  for (int i = first; i < entries; i += kAtOnce * step) {
    double values[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      values[u] = i + u * step < entries ? read(i + u * step) : 0;
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      sum += values[u];
    }
  }
  return sum;
}

// Calls write(k, sum over i < entries of read(k, i)) for each k < channels. Adjacent lanes of a warp share a channel.
template <int kAtOnce, class Read, class Write>
BN_DEVICE void sum_entries(int channels, int entries, const Read& read, const Write& write) {
  int lanes = gpu::kWarp;
  while (lanes > 1 && channels * lanes > gpu::threads()) {
    lanes /= 2;
  }
  const int lane = gpu::thread() % lanes;
  for (int first = 0; first < channels; first += gpu::threads() / lanes) {
    const int k = first + gpu::thread() / lanes;
    double sum = sum_steps<kAtOnce>(lane, lanes, k < channels ? entries : 0, [&](int i) { return read(k, i); });
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
      sum += gpu::shuffle_xor(gpu::kAllLanes, sum, mask);
    }
    if (k < channels && lane == 0) {
      write(k, sum);
    }
  }
}

// The team of blocks that share a slab, as one of its blocks sees it.
class TeamSums {
 public:
  struct Workspace {
    unsigned* arrivals;  // one per team
    double* totals;      // [team][half][block][channel][2]; successive meetings alternate between the halves
  };

  BN_DEVICE TeamSums(const Geometry& g, const SharedLayout& at, const Workspace& workspace)
      : g_(g),
        rank_(gpu::block() % g.team_blocks),
        team_(gpu::block() / g.team_blocks),
        partial_(gpu::shared_array<double>(at.partial)),
        totals_(gpu::shared_array<double>(at.totals)),
        sums_(gpu::shared_array<double>(at.sums)),
        arrivals_(workspace.arrivals + team_),
        exchanged_(workspace.totals + team_ * exchange_size()) {
    if (g_.team == Team::Grid && leads() && gpu::thread() == 0) {
      *arrivals_ = 0;  // the first meeting, of the whole grid, makes it visible to all
    }
  }

  BN_DEVICE int rank() const { return rank_; }
  BN_DEVICE bool leads() const { return rank_ == 0; }
  BN_DEVICE int64_t team() const { return team_; }
  BN_DEVICE int64_t teams() const { return g_.teams; }

  // The result of find(), which one thread calls, for all threads of the block.
  template <class Find>
  BN_DEVICE double broadcast(const Find& find) const {
    if (gpu::thread() == 0) {
      partial_.write(0, find());
    }
    gpu::sync_block();
    const double value = partial_.read(0);
    gpu::sync_block();
    return value;
  }

  // Leaves the sums over all values of the slab in shared memory.
  template <int kLanes>
  BN_DEVICE void add_up(const LaneSums<kLanes>& mine) {
    const bool alone = g_.team == Team::Block;
    const auto own = alone ? sums_ : totals_;
    add_up_block(mine.sum, 0, own);
    add_up_block(mine.product, 1, own);
    if (!alone) {
      exchange(own);
      gpu::sync_block();
    }
    if (g_.team == Team::Cluster) {
      gpu::arrive_cluster();
    }
  }

  BN_DEVICE double sum(int k) const { return sums_.read(2 * k); }
  BN_DEVICE double product(int k) const { return sums_.read(2 * k + 1); }

  // No block may end while another block still reads its shared memory. All have arrived when the last one has added up
  // the sums, long before outputs are stored.
  BN_DEVICE void part() const {
    if (g_.team == Team::Cluster) {
      gpu::wait_cluster();
    }
  }

 private:
  // The last slab may have fewer channels. The sums of the missing ones are meaningless, and nothing reads them.
  template <int kLanes>
  BN_DEVICE void add_up_block(const double (&mine)[kLanes], int which, const gpu::Shared<double>& out) const {
#pragma unroll
    for (int l = 0; l < kLanes; ++l) {
      partial_.write(l * gpu::threads() + gpu::thread(), mine[l]);
    }
    gpu::sync_block();
    const auto write = [&](int k, double sum) { out.write(2 * k + which, sum); };
    if constexpr (kLanes == 1) {
      sum_entries<1>(1, gpu::threads(), [&](int, int i) { return partial_.read(i); }, write);
    } else {
      const int s = static_cast<int>(g_.s);
      const auto read = [&](int k, int i) {
        const int row = g_.by_s.quotient(i);
        const int position = k * s + i - row * s;
        return partial_.read(position % kLanes * gpu::threads() + row * g_.width + position / kLanes);
      };
      sum_entries<1>(g_.channels, g_.rows_at_once * s, read, write);
    }
    gpu::sync_block();
  }

  BN_DEVICE void exchange(const gpu::Shared<double>& own) {
    const int sums = 2 * g_.channels;
    const auto write = [&](int k, double sum) { sums_.write(k, sum); };
    if (g_.team == Team::Cluster) {  // one meeting: a cluster has one slab
      gpu::sync_cluster();
      sum_entries<kReadsAtOnce>(sums, g_.team_blocks, [&](int k, int i) { return own.of_block(i).read(k); }, write);
    } else {
      double* const all = exchanged_ + (meetings_ % 2) * g_.team_blocks * sums;
      for (int k = gpu::thread(); k < sums; k += gpu::threads()) {
        all[rank_ * sums + k] = own.read(k);
      }
      if (meetings_ == 0) {
        gpu::sync_grid();
      } else {
        gpu::sync_blocks(arrivals_, meetings_ * g_.team_blocks);
      }
      sum_entries<kReadsAtOnce>(
          sums, g_.team_blocks, [&](int k, int i) { return gpu::load_written(all + i * sums + k); }, write);
    }
    ++meetings_;
  }

  BN_DEVICE int64_t exchange_size() const { return int64_t{4} * g_.team_blocks * g_.channels; }

  const Geometry& g_;
  int rank_;
  int64_t team_;
  gpu::Shared<double> partial_;
  gpu::Shared<double> totals_;
  gpu::Shared<double> sums_;
  unsigned* arrivals_;
  double* exchanged_;
  int meetings_ = 0;
};

}  // namespace bn::cuda
