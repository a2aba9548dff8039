#include "cpu/driver.h"

#include "core/finish.h"
#include "cpu/kernels/kernels.h"
#include "cpu/last_cache.h"
#include "cpu/mask_sums.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"

#include <ATen/Version.h>

#include <cstring>
#include <memory>
#include <string>

namespace bn::cpu {
namespace {

struct InstructionSet {
  const char* name;
  const Kernels& (*kernels)(Layout, DType, const Activation&, bool masked);
};

InstructionSet choose_instruction_set() {
#if defined(__x86_64__)
  const std::string best = at::get_cpu_capability();
  if (best == "AVX512") {
    return {"AVX512", kernels_avx512};
  }
  if (best == "AVX2") {
    return {"AVX2", kernels_avx2};
  }
#endif
  return {"DEFAULT", kernels_default};
}

const InstructionSet& chosen() {
  static const InstructionSet set = choose_instruction_set();
  return set;
}

// Kept from call to call: to ask for it anew costs a small call more than its kernel.
Scratch scratch_of_thread() {
  struct alignas(Scratch::kAlignment) Memory {
    std::byte bytes[Scratch::kBytes];
  };
  thread_local const std::unique_ptr<Memory> memory(new Memory);
  return Scratch(memory->bytes);
}

// Calls f(i) for every i below `count`, which together finish every channel of every set: on all threads if they are
// many.
template <class F>
void for_each(const Plan& plan, int64_t count, const F& f) {
  constexpr int64_t kSerial = 4096;  // not measured
  parallel(plan.sets > 1 && plan.sets * plan.patches.c >= kSerial ? plan.threads : 1, count,
           [&](int64_t begin, int64_t end) {
             for (int64_t i = begin; i < end; ++i) {
               f(i);
             }
           });
}

// Runs reduce(tile, set, chunk), then finish(set, c0, c1), then apply(tile, set) over a problem: tile by tile while it
// is in a thread's cache, or, where tiles are shared, pass by pass. The second pass goes backwards, to begin with what
// the first one touched last.
template <class Reduce, class Finish, class Apply>
void run(const Plan& plan,
         const MaskSums& mask,
         bool reduces,
         bool applies,
         const Reduce& reduce,
         const Finish& finish,
         const Apply& apply) {
  const int64_t channels = plan.patches.c;
  const auto tile = [&](int64_t set, int64_t t, int64_t chunk) {
    const Patches& patches = plan.patches_of(set);
    return Tile{patches,
                set * plan.patches.n,
                t * plan.tile,
                std::min((t + 1) * plan.tile, channels),
                chunk * patches.per_chunk,
                std::min((chunk + 1) * patches.per_chunk, patches.count),
                plan.ahead,
                scratch_of_thread(),
                mask.of_set(set)};
  };
  const int64_t tiles = plan.tiles();
  if (!plan.split) {
    parallel(plan.threads, plan.sets * tiles, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t set = i / tiles;
        const int64_t t = i % tiles;
        const int64_t chunks = plan.patches_of(set).chunks;
        for (int64_t chunk = 0; reduces && chunk < chunks; ++chunk) {
          reduce(tile(set, t, chunk), set, chunk);
        }
        const Tile whole = tile(set, t, 0);
        finish(set, whole.c0, whole.c1);
        for (int64_t chunk = chunks - 1; applies && chunk >= 0; --chunk) {
          apply(tile(set, t, chunk), set);
        }
      }
    });
    return;
  }
  // Tasks are numbered by set, chunk and tile. The last set may have fewer chunks.
  const int64_t of_set = plan.patches.chunks * tiles;
  const int64_t tasks = (plan.sets - 1) * of_set + plan.last.chunks * tiles;
  const auto for_task = [&](int64_t i, const auto& f) {
    const int64_t set = i / of_set;
    const int64_t chunk = i % of_set / tiles;
    f(tile(set, i % tiles, chunk), set, chunk);
  };
  if (reduces) {
    parallel(plan.threads, tasks, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for_task(i, reduce);
      }
    });
  }
  parallel(reduces ? plan.threads : 1, channels, [&](int64_t begin, int64_t end) {
    for (int64_t set = 0; set < plan.sets; ++set) {
      finish(set, begin, end);
    }
  });
  if (applies) {
    parallel(plan.threads, tasks, [&](int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; --i) {
        for_task(i, [&](const Tile& at, int64_t set, int64_t) { apply(at, set); });
      }
    });
  }
}

// Arrays that live as long as one call.
template <class T>
std::unique_ptr<T[]> workspace(int64_t size) {
  return std::unique_ptr<T[]>(new T[size]);
}

// Whether vectors at multiples of their width are aligned.
bool streamable(const void* tensor) {
  return reinterpret_cast<uintptr_t>(tensor) % 64 == 0;
}

// Two sums of each chunk, set and channel.
class Partial {
 public:
  Partial(const Plan& plan, bool used)
      : c_(plan.patches.c),
        chunks_(plan.patches.chunks),
        values_(workspace<double>(used ? 2 * plan.sets * chunks_ * c_ : 0)) {}

  double* first(int64_t set, int64_t chunk) const { return values_.get() + 2 * (set * chunks_ + chunk) * c_; }
  double* second(int64_t set, int64_t chunk) const { return first(set, chunk) + c_; }

 private:
  int64_t c_;
  int64_t chunks_;
  std::unique_ptr<double[]> values_;
};

// Coefficients of each set and channel: of the normalization, and in a backward of the gradient.
template <class A>
class Coefficients {
 public:
  Coefficients(const Plan& plan, Direction direction)
      : c_(plan.patches.c),
        size_(plan.sets * c_),
        values_(workspace<A>((direction == Direction::Forward ? 3 : 5) * size_)) {}

  void set_channel(int64_t set, int64_t c, const NormalizeCoefficients<A>& k) {
    array(0, set)[c] = k.shift;
    array(1, set)[c] = k.scale;
    array(2, set)[c] = k.offset;
  }
  void set_channel(int64_t set, int64_t c, const GradientCoefficients<A>& k) {
    array(3, set)[c] = k.slope;
    array(4, set)[c] = k.offset;
  }

  // The gradient's coefficients, too, if dx goes through the statistics.
  CoefficientArrays of_set(int64_t set, bool through_statistics = false) const {
    CoefficientArrays arrays{array(0, set), array(1, set), array(2, set)};
    if (through_statistics) {
      arrays.slope = array(3, set);
      arrays.gradient_offset = array(4, set);
    }
    return arrays;
  }

 private:
  A* array(int which, int64_t set) const { return values_.get() + which * size_ + set * c_; }

  int64_t c_;
  int64_t size_;
  std::unique_ptr<A[]> values_;
};

// The first value of a set in a channel that counts.
double first_value(const ForwardArgs& args, int64_t set, int64_t c) {
  const Problem& p = args.problem;
  const int64_t first = counted(p, args.mask, set).first;
  const int64_t row = (set * p.per_set + first / p.s) * p.c + c;
  return PerChannel{const_cast<void*>(args.x), p.dtype}.get(row * p.s + first % p.s, 0);
}

template <class A>
void forward(ForwardArgs args, const Kernels& kernels) {
  const Pass pass = pass_of(args);
  const bool reduces = pass.reduces();
  const Plan plan = cpu::plan(pass, at::get_num_threads(), last_cache_bytes());
  const MaskSums mask(args.mask, pass, plan);
  args.mask = mask.counted_mask();
  const Partial partial(plan, reduces);
  Coefficients<A> coefficients(plan, Direction::Forward);
  double momentum = args.momentum;
  if (reduces && args.num_batches_tracked != nullptr && freedom_of_all(args.problem, args.mask) > 0) {
    const int64_t batches = ++*args.num_batches_tracked;
    momentum = args.cumulative ? 1 / static_cast<double>(batches) : momentum;
  }

  if (args.epilogue.branches != nullptr &&
      !(plan.whole_bytes && kernels.lanes % 8 == 0)) {  // bits are added to others'
    std::memset(args.epilogue.branches, 0, branch_bytes(args.problem.count() * args.problem.c));
  }

  const auto reduce = [&](const Tile& tile, int64_t set, int64_t chunk) {
    kernels.moments(tile, args.x, partial.first(set, chunk), partial.second(set, chunk));
  };
  const auto merge_chunks = [&](int64_t set, int64_t begin, int64_t end) {
    const Patches& patches = plan.patches_of(set);
    if (patches.chunks == 1) {
      return;
    }
    double* const mean = partial.first(set, 0);
    double* const m2 = partial.second(set, 0);
    double count = mask.count_of(set, 0);
    for (int64_t chunk = 1; chunk < patches.chunks; ++chunk) {
      const double of_chunk = mask.count_of(set, chunk);
      if (of_chunk == 0) {
        continue;
      }
      for (int64_t i = begin; i < end; ++i) {
        const Moments all =
            merge({count, mean[i], m2[i]}, {of_chunk, partial.first(set, chunk)[i], partial.second(set, chunk)[i]});
        mean[i] = all.mean;
        m2[i] = all.m2;
      }
      count += of_chunk;
    }
  };
  const auto finish = [&](int64_t set, int64_t begin, int64_t end) {
    if (reduces) {
      merge_chunks(set, begin, end);
    }
    const double count = counted(args.problem, args.mask, set).count;
    for (int64_t i = begin; i < end; ++i) {
      const Moments batch = reduces && count > 0
                                ? Moments{count, finite_or_zero(first_value(args, set, i)) + partial.first(set, 0)[i],
                                          partial.second(set, 0)[i]}
                                : Moments{};
      const ForwardInputs inputs = read_inputs(args, set, i);
      const auto finished = finish_forward<A>(args, inputs, batch, count);
      coefficients.set_channel(set, i, finished.coefficients);
      store_forward(args, set, i, inputs, batch, finished, momentum);
    }
  };
  const bool bypass_cache = plan.bypass_cache && streamable(args.y);
  const auto apply = [&](const Tile& tile, int64_t set) {
    kernels.normalize(tile, args.x, args.epilogue, coefficients.of_set(set), args.y, bypass_cache);
  };
  run(plan, mask, reduces, pass.applies(), reduce, finish, apply);
  if (finishes_sets(args)) {
    for_each(plan, args.problem.c,
             [&](int64_t i) { finish_sets(args, i, momentum, [](const double* p) { return *p; }); });
  }
}

template <class A>
void backward(BackwardArgs args, const Kernels& kernels) {
  const Pass pass = pass_of(args);
  const bool reduces = pass.reduces();
  const bool reduces_dz_alone = pass.reduce_reads().tensors == 1;
  const Plan plan = cpu::plan(pass, at::get_num_threads(), last_cache_bytes());
  const MaskSums mask(args.mask, pass, plan);
  args.mask = mask.counted_mask();
  const Partial partial(plan, reduces);
  Coefficients<A> coefficients(plan, Direction::Backward);
  for_each(plan, plan.sets, [&](int64_t set) {
    for (int64_t i = 0; i < args.problem.c; ++i) {
      coefficients.set_channel(set, i, repeat_forward<A>(args, set, i, read_inputs(args, set, i)));
    }
  });

  const auto reduce = [&](const Tile& tile, int64_t set, int64_t chunk) {
    kernels.gradient_sums(tile, args.dy, reduces_dz_alone ? nullptr : args.x, args.epilogue, coefficients.of_set(set),
                          partial.first(set, chunk), partial.second(set, chunk));
  };
  const auto add_chunks = [&](int64_t set, int64_t begin, int64_t end) {
    for (int64_t chunk = 1; chunk < plan.patches_of(set).chunks; ++chunk) {
      for (int64_t i = begin; i < end; ++i) {
        partial.first(set, 0)[i] += partial.first(set, chunk)[i];
        partial.second(set, 0)[i] += partial.second(set, chunk)[i];
      }
    }
  };
  const auto finish = [&](int64_t set, int64_t begin, int64_t end) {
    if (reduces) {
      add_chunks(set, begin, end);
    }
    const double count = args.counts != nullptr ? args.counts[set] : counted(args.problem, args.mask, set).count;
    for (int64_t i = begin; i < end; ++i) {
      const double sum_dz = reduces ? partial.first(set, 0)[i] : 0;
      const double sum_dz_shifted = reduces ? partial.second(set, 0)[i] : 0;
      const BackwardInputs inputs = read_inputs(args, set, i);
      const auto finished = finish_backward<A>(args, set, i, inputs, count, sum_dz, sum_dz_shifted);
      coefficients.set_channel(set, i, finished.coefficients);
      store_backward(args, set, i, inputs, finished.sums);
    }
  };
  const bool bypass_cache = plan.bypass_cache && streamable(args.dx) && streamable(args.dresidual);
  const auto apply = [&](const Tile& tile, int64_t set) {
    kernels.input_gradient(tile, args.dy, args.x, args.epilogue, coefficients.of_set(set, pass.through_statistics()),
                           args.dx, args.dresidual, bypass_cache);
  };
  run(plan, mask, reduces, pass.applies(), reduce, finish, apply);
  if (finishes_sets(args)) {
    for_each(plan, args.problem.c, [&](int64_t i) { finish_sets(args, i, [](const double* p) { return *p; }); });
  }
}

template <class Args>
const Kernels& kernels_of(const Args& args) {
  return chosen().kernels(args.problem.layout, args.problem.dtype, args.epilogue.activation, bool(args.mask));
}

}  // namespace

void batch_norm_forward(const ForwardArgs& args) {
  const Kernels& kernels = kernels_of(args);
  args.problem.dtype == DType::Float64 ? forward<double>(args, kernels) : forward<float>(args, kernels);
}

void batch_norm_backward(const BackwardArgs& args) {
  const Kernels& kernels = kernels_of(args);
  args.problem.dtype == DType::Float64 ? backward<double>(args, kernels) : backward<float>(args, kernels);
}

void batch_norm_merge_rows(const MergeArgs& args) {
  for (int64_t c = 0; c < args.c; ++c) {
    merge_rows(args, c);
  }
}

const char* instruction_set() {
  return chosen().name;
}

}  // namespace bn::cpu
