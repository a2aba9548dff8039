#include "cpu/batch_norm.h"

#include "core/finish.h"
#include "cpu/kernels.h"
#include "cpu/last_cache.h"
#include "cpu/plan.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <cstring>
#include <memory>
#include <string>

namespace bn::cpu {
namespace {

struct InstructionSet {
  const char* name;
  const Kernels& (*kernels)(Layout, DType, const Activation&);
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

template <class F>
void parallel(int threads, int64_t tasks, const F& f) {
  if (threads == 1) {
    f(int64_t{0}, tasks);
  } else {
    at::parallel_for(0, tasks, 1, f);
  }
}

// Runs reduce(tile, chunk), then finish(c0, c1), then apply(tile) over a problem: tile by tile while it is
// in a thread's cache, or, where tiles are shared, pass by pass. The second pass goes backwards, to begin
// with what the first one touched last.
template <class Reduce, class Finish, class Apply>
void run(const Plan& plan, bool reduces, bool applies, const Reduce& reduce, const Finish& finish, const Apply& apply) {
  const Blocks& blocks = plan.blocks;
  const auto tile = [&](int64_t t, int64_t chunk) {
    return Tile{blocks,
                t * plan.tile,
                std::min((t + 1) * plan.tile, blocks.c),
                chunk * blocks.per_chunk,
                std::min((chunk + 1) * blocks.per_chunk, blocks.count),
                plan.ahead,
                scratch_of_thread()};
  };
  const int64_t tiles = plan.tiles();
  if (!plan.split) {
    parallel(plan.threads, tiles, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t chunk = 0; reduces && chunk < blocks.chunks; ++chunk) {
          reduce(tile(t, chunk), chunk);
        }
        const Tile whole = tile(t, 0);
        finish(whole.c0, whole.c1);
        for (int64_t chunk = blocks.chunks - 1; applies && chunk >= 0; --chunk) {
          apply(tile(t, chunk));
        }
      }
    });
    return;
  }
  const int64_t tasks = blocks.chunks * tiles;
  if (reduces) {
    parallel(plan.threads, tasks, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        reduce(tile(i % tiles, i / tiles), i / tiles);
      }
    });
  }
  parallel(reduces ? plan.threads : 1, blocks.c, finish);
  if (applies) {
    parallel(plan.threads, tasks, [&](int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; --i) {
        apply(tile(i % tiles, i / tiles));
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

template <class A>
void forward(const ForwardArgs& args, const Kernels& kernels) {
  const int64_t c = args.problem.c;
  const Pass pass = pass_of(args);
  const Plan plan = cpu::plan(pass, at::get_num_threads(), last_cache_bytes());
  const Blocks& blocks = plan.blocks;
  const auto partial = workspace<double>(args.training ? 2 * blocks.chunks * c : 0);
  double* const partial_mean = partial.get();
  double* const partial_m2 = partial_mean + blocks.chunks * c;
  const auto counts = workspace<double>(args.training ? blocks.chunks : 0);
  for (int64_t chunk = 0; args.training && chunk < blocks.chunks; ++chunk) {
    counts[chunk] = static_cast<double>(blocks.values(chunk));
  }
  const auto coefficients = workspace<A>(3 * c);
  A* const shift = coefficients.get();
  A* const scale = shift + c;
  A* const offset = scale + c;
  double momentum = args.momentum;
  if (args.training && args.num_batches_tracked != nullptr) {
    const int64_t batches = ++*args.num_batches_tracked;
    momentum = args.cumulative ? 1 / static_cast<double>(batches) : momentum;
  }

  if (args.epilogue.mask != nullptr && !(plan.whole_bytes && kernels.lanes % 8 == 0)) {  // bits are added to others'
    std::memset(args.epilogue.mask, 0, mask_bytes(args.problem.count() * c));
  }

  const auto reduce = [&](const Tile& tile, int64_t chunk) {
    kernels.moments(tile, args.x, partial_mean + chunk * c, partial_m2 + chunk * c);
  };
  const PerChannel first{const_cast<void*>(args.x), args.problem.dtype, blocks.s};
  const auto merge_chunks = [&](int64_t begin, int64_t end) {
    double count = counts[0];
    for (int64_t chunk = 1; chunk < blocks.chunks; count += counts[chunk++]) {
      for (int64_t i = begin; i < end; ++i) {
        const Moments next{counts[chunk], partial_mean[chunk * c + i], partial_m2[chunk * c + i]};
        const Moments all = merge({count, partial_mean[i], partial_m2[i]}, next);
        partial_mean[i] = all.mean;
        partial_m2[i] = all.m2;
      }
    }
  };
  const auto finish = [&](int64_t begin, int64_t end) {
    if (args.training) {
      merge_chunks(begin, end);
    }
    for (int64_t i = begin; i < end; ++i) {
      const Moments batch = args.training ? Moments{static_cast<double>(args.problem.count()),
                                                    finite_or_zero(first.get(i, 0)) + partial_mean[i], partial_m2[i]}
                                          : Moments{};
      const auto k = finish_forward<A>(args, i, batch, momentum, /*writes=*/true);
      shift[i] = k.shift;
      scale[i] = k.scale;
      offset[i] = k.offset;
    }
  };
  const bool bypass_cache = plan.bypass_cache && streamable(args.y);
  const auto apply = [&](const Tile& tile) {
    kernels.normalize(tile, args.x, args.epilogue, {shift, scale, offset}, args.y, bypass_cache);
  };
  run(plan, pass.reduces(), pass.applies(), reduce, finish, apply);
}

template <class A>
void backward(const BackwardArgs& args, const Kernels& kernels) {
  const int64_t c = args.problem.c;
  const Pass pass = pass_of(args);
  const bool reduces = pass.reduces();
  const bool reduces_dy_alone = pass.reduce_reads() == Traffic{1, false};
  const Plan plan = cpu::plan(pass, at::get_num_threads(), last_cache_bytes());
  const Blocks& blocks = plan.blocks;
  const auto partial = workspace<double>(reduces ? 2 * blocks.chunks * c : 0);
  double* const partial_dz = partial.get();
  double* const partial_dz_shifted = partial_dz + blocks.chunks * c;
  const auto coefficients = workspace<A>(5 * c);
  A* const shift = coefficients.get();
  A* const scale = shift + c;
  A* const forward_offset = scale + c;
  A* const slope = forward_offset + c;
  A* const offset = slope + c;
  for (int64_t i = 0; i < c; ++i) {
    const auto k = repeat_forward<A>(args, i);
    shift[i] = k.shift;
    scale[i] = k.scale;
    forward_offset[i] = k.offset;
  }
  const Forward<const void*> forward{shift, scale, forward_offset};

  const auto reduce = [&](const Tile& tile, int64_t chunk) {
    kernels.gradient_sums(tile, args.dy, reduces_dy_alone ? nullptr : args.x, args.epilogue, forward,
                          partial_dz + chunk * c, partial_dz_shifted + chunk * c);
  };
  const auto add_chunks = [&](int64_t begin, int64_t end) {
    for (int64_t chunk = 1; chunk < blocks.chunks; ++chunk) {
      for (int64_t i = begin; i < end; ++i) {
        partial_dz[i] += partial_dz[chunk * c + i];
        partial_dz_shifted[i] += partial_dz_shifted[chunk * c + i];
      }
    }
  };
  const auto finish = [&](int64_t begin, int64_t end) {
    if (reduces) {
      add_chunks(begin, end);
    }
    for (int64_t i = begin; i < end; ++i) {
      const auto k = finish_backward<A>(args, i, reduces ? partial_dz[i] : 0, reduces ? partial_dz_shifted[i] : 0,
                                        /*writes=*/true);
      slope[i] = k.slope;
      offset[i] = k.offset;
    }
  };
  const bool bypass_cache = plan.bypass_cache && streamable(args.dx) && streamable(args.dresidual);
  const auto apply = [&](const Tile& tile) {
    kernels.input_gradient(tile, args.dy, args.x, args.epilogue, forward,
                           pass.through_statistics() ? Backward<const void*>{slope, offset} : Backward<const void*>{},
                           args.dx, args.dresidual, bypass_cache);
  };
  run(plan, reduces, pass.applies(), reduce, finish, apply);
}

}  // namespace

void batch_norm_forward(const ForwardArgs& args) {
  const Kernels& kernels = chosen().kernels(args.problem.layout, args.problem.dtype, args.epilogue.activation);
  args.problem.dtype == DType::Float64 ? forward<double>(args, kernels) : forward<float>(args, kernels);
}

void batch_norm_backward(const BackwardArgs& args) {
  const Kernels& kernels = chosen().kernels(args.problem.layout, args.problem.dtype, args.epilogue.activation);
  args.problem.dtype == DType::Float64 ? backward<double>(args, kernels) : backward<float>(args, kernels);
}

const char* instruction_set() {
  return chosen().name;
}

}  // namespace bn::cpu
