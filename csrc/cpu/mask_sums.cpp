#include "cpu/mask_sums.h"

#include "core/dtype.h"
#include "cpu/parallel.h"

#include <algorithm>
#include <limits>

namespace bn::cpu {
namespace {

struct Sums {
  double sum = 0;
  double squares = 0;
  int64_t positive = 0;
  int64_t first = std::numeric_limits<int64_t>::max();  // position of the first positive number

  void add(const Sums& other) {
    sum += other.sum;
    squares += other.squares;
    positive += other.positive;
    first = std::min(first, other.first);
  }
};

// Sums over a patch of a set's values. Images and positions of the patch are counted from the set's first.
template <class A>
Sums sums_of(const A* values, const Extent& e, int64_t s) {
  Sums sums;
  for (int64_t n = e.n0; n < e.n1; ++n) {
    for (int64_t i = n * s + e.s0; i < n * s + e.s1; ++i) {
      const double value = values[i];
      sums.sum += value;
      sums.squares += value * value;
      sums.positive += value > 0;
      sums.first = value > 0 ? std::min(sums.first, i) : sums.first;
    }
  }
  return sums;
}

}  // namespace

MaskSums::MaskSums(const Mask& mask, const Pass& pass, const Plan& plan) : plan_(plan), values_(mask.values) {
  const auto make = [&](auto type) {
    using A = decltype(type);
    if (pass.counts_masked()) {
      add_up<A>(pass.problem);
    }
    spread<A>(pass.problem);
  };
  if (mask) {
    pass.problem.dtype == DType::Float64 ? make(double{}) : make(float{});
  }
}

template <class A>
void MaskSums::add_up(const Problem& problem) {
  const auto* const values = static_cast<const A*>(values_);
  const int64_t count = plan_.patches.count;
  const int64_t patches = (plan_.sets - 1) * count + plan_.last.count;
  std::vector<Sums> sums(patches);
  patches_.resize(patches);
  parallel(plan_.threads, patches, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t set = std::min(i / count, plan_.sets - 1);
      const Extent e = plan_.patches_of(set).extent(i - set * count);
      const A* const of_set = values + set * problem.per_set * problem.s;
      sums[i] = sums_of(of_set, e, problem.s);
      patches_[i] = {sums[i].sum, sums_of(of_set, e.quarter(), problem.s).sum};
    }
  });
  Counted all;
  for (int64_t set = 0; set < plan_.sets; ++set) {
    Sums of_set;
    for (int64_t b = 0; b < plan_.patches_of(set).count; ++b) {
      of_set.add(sums[set * count + b]);
    }
    const int64_t first = of_set.positive > 0 ? of_set.first : 0;
    counted_.push_back(counted_of(of_set.sum, of_set.squares, of_set.positive, first));
    all.count += counted_.back().count;
    all.freedom += counted_.back().freedom;
  }
  counted_.push_back(all);
}

// Repeats the mask of each image or position for the channels of a tile, where a vector holds values of several.
template <class A>
void MaskSums::spread(const Problem& problem) {
  const bool joined = plan_.patches.joined || plan_.last.joined;
  if (!joined && (problem.layout == Layout::Planar || !folds(problem.c))) {
    return;
  }
  const auto* const values = static_cast<const A*>(values_);
  const int64_t channels = joined ? plan_.tile : problem.c;
  width_ = channels * problem.s;
  lanes_.reset(new std::byte[problem.n * width_ * sizeof(A)]);
  auto* const lanes = reinterpret_cast<A*>(lanes_.get());
  parallel(plan_.threads, problem.n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * channels; i < end * channels; ++i) {
      std::copy_n(values + i / channels * problem.s, problem.s, lanes + i * problem.s);
    }
  });
}

SetMask MaskSums::of_set(int64_t set) const {
  if (values_ == nullptr) {
    return {};
  }
  if (counted_.empty()) {
    return {values_, lanes_.get(), width_};
  }
  return {values_, lanes_.get(), width_, patches_.data() + set * plan_.patches.count, counted_[set].first};
}

double MaskSums::count_of(int64_t set, int64_t chunk) const {
  const Patches& patches = plan_.patches_of(set);
  if (counted_.empty()) {
    return static_cast<double>(patches.values(chunk));
  }
  const SetMask mask = of_set(set);
  double count = 0;
  for (int64_t b = chunk * patches.per_chunk; b < std::min((chunk + 1) * patches.per_chunk, patches.count); ++b) {
    count += mask.patches[b].whole;
  }
  return count;
}

}  // namespace bn::cpu
