#include "cuda/passes/mask.h"

#include "cuda/gpu/gpu.h"

#include <limits>

namespace bn::cuda {
namespace {

constexpr int kThreads = 256;  // not measured
constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

// Of numbers of a mask.
struct MaskSums {
  double sum = 0;
  double squares = 0;
  int64_t positive = 0;
  // Positions in the set: of the first positive number, of the first one in the second half, of the last one.
  int64_t first = kNone;
  int64_t middle = kNone;
  int64_t last = 0;

  BN_DEVICE void add(const MaskSums& other) {
    sum += other.sum;
    squares += other.squares;
    positive += other.positive;
    first = other.first < first ? other.first : first;
    middle = other.middle < middle ? other.middle : middle;
    last = other.last > last ? other.last : last;
  }
};

// Of all sets.
struct Totals {
  double count = 0;
  double freedom = 0;

  BN_DEVICE void add(const Totals& other) {
    count += other.count;
    freedom += other.freedom;
  }
};

template <class A>
struct MaskArgs {
  Problem problem;
  const A* values;
  int parts;
  Counted* counted;    // of each set, then of all
  Samples* samples;    // of each set
  unsigned* arrivals;  // of the parts of each set, then of the sets
  MaskSums* sums;      // of each part of each set
};

// Adds up what the threads of a block have, in a fixed order, for thread 0.
template <class V>
BN_DEVICE V fold(V mine) {
  const auto all = gpu::shared_array<V>(0);
  const int t = gpu::thread();
  all.write(t, mine);
  gpu::sync_block();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (t < half) {
      mine.add(all.read(t + half));
      all.write(t, mine);
    }
    gpu::sync_block();
  }
  return mine;
}

// A block for each part of each set. The last block of a set adds up its parts, the last block of all adds up the sets.
template <class A>
BN_KERNEL(kThreads)
mask_batch_norm_kernel(MaskArgs<A> args) {
  const Problem& p = args.problem;
  const int t = gpu::thread();
  const int64_t set = gpu::block() / args.parts;
  const int64_t part = gpu::block() % args.parts;
  const int64_t share = divide_up(p.count_of(0), args.parts);
  const int64_t values = p.count_of(set);
  const int64_t end = (part + 1) * share < values ? (part + 1) * share : values;
  const A* const of_set = args.values + set * p.count_of(0);
  MaskSums sums;
#pragma unroll 4
  for (int64_t i = part * share + t; i < end; i += kThreads) {
    const double value = of_set[i];
    if (value > 0) {
      sums.add({value, value * value, 1, i, 2 * i < values ? kNone : i, i});
    }
  }
  sums = fold(sums);
  if (args.parts > 1) {
    MaskSums* const of_parts = args.sums + set * args.parts;
    if (t == 0) {
      of_parts[part] = sums;
    }
    if (!gpu::last_to_arrive(args.arrivals + set, args.parts)) {
      return;
    }
    sums = {};
    for (int i = t; i < args.parts; i += kThreads) {
      const MaskSums& one = of_parts[i];
      sums.add({gpu::load_written(&one.sum), gpu::load_written(&one.squares), gpu::load_written(&one.positive),
                gpu::load_written(&one.first), gpu::load_written(&one.middle), gpu::load_written(&one.last)});
    }
    sums = fold(sums);
  }
  if (t == 0) {
    const int64_t first = sums.positive > 0 ? sums.first : 0;
    args.counted[set] = counted_of(sums.sum, sums.squares, sums.positive, first);
    args.samples[set] = {{first, sums.middle == kNone ? sums.last : sums.middle, sums.last}};
  }
  const int64_t sets = p.sets();
  if (sets > 1 && !gpu::last_to_arrive(args.arrivals + sets, static_cast<unsigned>(sets))) {
    return;
  }
  Totals totals;
  for (int64_t i = t; i < sets; i += kThreads) {
    totals.add({gpu::load_written(&args.counted[i].count), gpu::load_written(&args.counted[i].freedom)});
  }
  totals = fold(totals);
  if (t == 0) {
    args.counted[sets] = {totals.count, totals.freedom, 0};
  }
}

}  // namespace

CountedMask counted_mask(
    const Problem& problem, const Mask& mask, const LaunchPlan& plan, void* workspace, CUstream_st* stream) {
  if (plan.mask_parts == 0) {
    return {};
  }
  static_assert(sizeof(Counted) == MaskLayout::kCounted && sizeof(Samples) == MaskLayout::kSamples &&
                sizeof(MaskSums) == MaskLayout::kSums);
  const MaskLayout at = plan.mask_layout();
  char* const memory = static_cast<char*>(workspace) + plan.workspace_bytes - at.bytes;
  auto* const counted = reinterpret_cast<Counted*>(memory + at.counted);
  auto* const samples = reinterpret_cast<Samples*>(memory + at.samples);
  auto* const arrivals = reinterpret_cast<unsigned*>(memory + at.arrivals);
  auto* const sums = reinterpret_cast<MaskSums*>(memory + at.sums);
  const int64_t blocks = plan.sets * plan.mask_parts;
  if (blocks > 1) {
    gpu::set_to_zero(arrivals, at.sums - at.arrivals, stream);
  }
  const gpu::LaunchShape shape{blocks, kThreads, kThreads * int64_t{sizeof(MaskSums)}, 1, false};
  const auto launch = [&](auto type) {
    using A = decltype(type);
    const auto* const values = static_cast<const A*>(mask.values);
    const MaskArgs<A> args{problem, values, plan.mask_parts, counted, samples, arrivals, sums};
    gpu::launch("batch_norm_mask", mask_batch_norm_kernel<A>, shape, stream, args);
  };
  problem.dtype == DType::Float64 ? launch(double{}) : launch(float{});
  return {{mask.values, counted}, samples};
}

}  // namespace bn::cuda
