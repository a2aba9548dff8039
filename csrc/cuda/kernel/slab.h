#pragma once

#include "cuda/gpu/gpu.h"
#include "cuda/kernel/divider.h"
#include "cuda/kernel/pack.h"
#include "cuda/plan.h"

#include <initializer_list>

namespace bn::cuda {

// Whether every pack of these tensors begins at a multiple of its size.
inline bool packs_align(const Problem& problem, const LaunchPlan& plan, std::initializer_list<const void*> tensors) {
  const int64_t size = size_of(problem.dtype);
  bool aligned = problem.c * problem.s * size % kPackBytes == 0 &&
                 (plan.channels == problem.c || plan.channels * problem.s * size % kPackBytes == 0);
  for (const void* tensor : tensors) {
    aligned &= reinterpret_cast<uintptr_t>(tensor) % kPackBytes == 0;
  }
  return aligned;
}

// The place of a pack: its first element in the tensors, its number of elements, its row in the tensors, and its first
// position in the slab's part of the row.
struct PackPlace {
  int64_t offset;
  int lanes;
  int64_t row;
  int64_t position;
};

// A problem and its plan in the form that kernels use.
struct Geometry {
  int64_t c;
  int64_t s;
  int64_t rows;        // of each set but the last
  int64_t last_rows;   // of the last set
  int64_t row_stride;  // elements from one row to the next
  int64_t sets;
  int64_t slabs;  // of all sets
  int64_t teams;
  int64_t share;
  int channels;
  int width;
  int active;
  int rows_at_once;  // rows that the active threads cover, if each stays in its column
  int held;
  int tensors_held;
  int team_blocks;
  Team team;
  bool aligned;
  bool whole_bytes;  // no row and no block's share ends within a byte of the branch bits
  Divider by_width;
  Divider by_s;  // divides positions in rows of several channels

  Geometry(const Problem& problem, const LaunchPlan& plan, bool aligned)
      : c(problem.c),
        s(problem.s),
        rows(problem.rows_of(0)),
        last_rows(problem.rows_of(plan.sets - 1)),
        row_stride(problem.c * problem.s),
        sets(plan.sets),
        slabs(plan.slabs),
        teams(plan.teams),
        share(plan.share),
        channels(plan.channels),
        width(plan.width),
        active(plan.active),
        rows_at_once(plan.active / plan.width),
        held(plan.held),
        tensors_held(plan.tensors_held),
        team_blocks(plan.team_blocks),
        team(plan.team),
        aligned(aligned),
        whole_bytes(!plan.zeroed_branches),
        by_width(plan.width),
        by_s(plan.per_lane() ? static_cast<uint32_t>(problem.s) : 1) {}
};

// One thread's part of a slab; the slabs of a set follow each other. With `kColumn` all of its packs are in one column.
template <class T, bool kColumn>
class Slab {
 public:
  static constexpr int kLanes = Pack<T>::kLanes;

  BN_DEVICE Slab(const Geometry& g, int64_t slab, int rank)
      : g_(g), slab_(slab), first_channel_((slab - set() * (g.slabs / g.sets)) * g.channels) {
    const int64_t begin = rank * g.share;
    const int64_t rows = set() < g.sets - 1 ? g.rows : g.last_rows;
    const int64_t rest = rows * g.width - begin;
    const int mine = static_cast<int>(rest < 0 ? 0 : rest < g.share ? rest : g.share);
    const int t = gpu::thread();
    packs_ = t < g.active && t < mine ? (mine - t + g.active - 1) / g.active : 0;
    const int64_t left = g.c - first_channel_;
    channels_ = left < g.channels ? static_cast<int>(left) : g.channels;
    const int64_t row = begin / g.width;
    row_ = set() * g.rows + row;
    start_ = row_ * g.row_stride + first_channel_ * g.s;
    first_ = static_cast<int>(begin - row * g.width) + t;
    if constexpr (kColumn) {
      first_ = g.by_width.quotient(t);  // the row of the first pack
      column_ = t - first_ * g.width;
    }
  }

  // The set is found again wherever it is needed, which takes fewer registers.
  BN_DEVICE int64_t set() const { return g_.sets == 1 ? 0 : slab_ / (g_.slabs / g_.sets); }
  BN_DEVICE int64_t number() const { return first_channel_ / g_.channels; }  // in its set
  BN_DEVICE int64_t first_channel() const { return first_channel_; }
  BN_DEVICE int channels() const { return channels_; }
  BN_DEVICE int packs() const { return packs_; }

  // The place of the thread's i-th pack. Beyond the last pack, a place without elements.
  BN_DEVICE PackPlace place(int i) const {
    int row;
    int column;
    if constexpr (kColumn) {
      row = first_ + i * g_.rows_at_once;
      column = column_;
    } else {
      const int pack = first_ + i * g_.active;
      row = g_.by_width.quotient(pack);
      column = pack - row * g_.width;
    }
    const int64_t position = int64_t{kLanes} * column;
    const int64_t rest = i < packs_ ? channels_ * g_.s - position : 0;
    const int lanes = static_cast<int>(rest < 0 ? 0 : rest < kLanes ? rest : kLanes);
    return {start_ + row * g_.row_stride + position, lanes, row_ + row, position};
  }

  // The number in the slab of the channel of lane l, for a thread that stays in its column.
  BN_DEVICE int channel(int l) const {
    const int channel = g_.by_s.quotient(kLanes * column_ + l);
    return channel < channels_ ? channel : channels_ - 1;
  }

 private:
  const Geometry& g_;
  int64_t slab_;
  int64_t first_channel_;
  int64_t row_;
  int64_t start_;
  int first_;
  int column_ = 0;
  int packs_;
  int channels_;
};

}  // namespace bn::cuda
