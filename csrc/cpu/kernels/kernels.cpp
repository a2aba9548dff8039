// Compiled once per instruction set, with BN_KERNELS naming the table it provides. Everything but that one
// function has internal linkage: a symbol shared with another unit could run on a CPU that lacks this
// unit's instructions.

#include "cpu/kernels/kernels.h"

#include "core/coefficients.h"
#include "core/moments.h"
#include "cpu/kernels/interleaved.h"
#include "cpu/kernels/planar.h"

#include <type_traits>

namespace bn::cpu {
namespace {

// An array with a value for each channel of a tile. A small array is on the stack, where the compiler knows that no
// other store changes it. A large array is in the scratch. The limit was not measured.
template <class A, int64_t kMaxChannels>
class ChannelArray {
 public:
  explicit ChannelArray(Scratch& scratch) {
    if constexpr (!kOnStack) {
      values_ = scratch.take<A[kMaxChannels]>();
    }
  }
  operator A*() { return values_; }

 private:
  static constexpr bool kOnStack = kMaxChannels <= 64;
  std::conditional_t<kOnStack, A[kMaxChannels], A*> values_;
};

// The doubles that a kernel takes of the scratch. Per channel: four in moments, two in gradient_sums, none in
// input_gradient. Per lane, in sums or map: a value of each coefficient, and in sums two sums.
template <class Rows>
constexpr bool kFitsScratch = [] {
  const auto bytes = [](int64_t per_channel, int64_t per_lane) {
    return 8 * (per_channel * Rows::kMaxChannels + per_lane * Rows::kMaxLanes) + 10 * Scratch::kAlignment;
  };
  return std::max({bytes(4, 1 + 2), bytes(2, 3 + 2), bytes(0, 5)}) <= Scratch::kBytes;
}();
static_assert(kFitsScratch<Interleaved<double, true>> && kFitsScratch<Planar<double, true>>);

// The shift of a patch is the mean of the patches before it: if the patch is far from that mean, the variance is as
// large. The shift of the first patch, and of one that counts more than four times as much as those before it, is the
// mean of its first quarter, which takes a pass of its own: the squared distance of that mean from the patch's mean is
// at most three times the patch's variance. If a mask leaves less than an eighth of the patch in that quarter, it is
// the mean of the whole patch. If the mean is within one deviation of zero, the shift is zero, because differences from
// zero are exact. Means are kept as distances from the set's first value: if that value is like the others, their
// common offset costs no digits, and the mean of equal values is exactly that value.
template <template <class> class Rows, class T>
void moments(const Tile& tile, const void* x_, double* mean, double* m2) {
  const auto* x = static_cast<const T*>(x_);
  const Rows<T> rows{tile};
  Scratch scratch = tile.scratch;
  ChannelArray<double, Rows<T>::kMaxChannels> origin(scratch), sum(scratch), sum_sq(scratch);
  ChannelArray<Acc<T>, Rows<T>::kMaxChannels> shift(scratch);
  const Acc<T>* const about[] = {shift};
  mean += tile.c0;
  m2 += tile.c0;
  for (int64_t c = 0; c < tile.channels(); ++c) {
    const int64_t n = tile.mask.first / tile.patches.s;
    const int64_t s = tile.mask.first % tile.patches.s;
    origin[c] = finite_or_zero(static_cast<double>(x[tile.patches.offset(tile.n0 + n, tile.c0 + c, s)]));
    mean[c] = 0;
    m2[c] = 0;
  }
  const auto set_shift = [&](int64_t c, const Moments& of) {
    const double at = origin[c] + of.mean;
    shift[c] = of.count > 0 && at * at < of.m2 / of.count ? 0 : finite_or_zero(static_cast<Acc<T>>(at));
  };
  const auto sum_up = [&](const Extent& e) { rows.sums(e, MomentTerm<T>{x}, about, sum, sum_sq, scratch); };
  const auto summed_up = [&](double count, int64_t c) {
    return shifted_moments(count, shift[c] - origin[c], sum[c], sum_sq[c]);
  };
  double count = 0;
  for (int64_t b = tile.b0; b < tile.b1; ++b) {
    const auto [whole, quarter] = tile.count(b);
    if (whole == 0) {
      continue;
    }
    const Extent e = tile.extent(b);
    for (int64_t c = 0; c < tile.channels(); ++c) {
      set_shift(c, {count, mean[c], m2[c]});
    }
    if (4 * count < whole) {
      const bool representative = 8 * quarter >= whole;
      sum_up(representative ? e.quarter() : e);
      for (int64_t c = 0; c < tile.channels(); ++c) {
        set_shift(c, summed_up(representative ? quarter : whole, c));
      }
    }
    sum_up(e);
    for (int64_t c = 0; c < tile.channels(); ++c) {
      const Moments all = merge({count, mean[c], m2[c]}, summed_up(whole, c));
      mean[c] = all.mean;
      m2[c] = all.m2;
    }
    count += whole;
  }
}

// Points to the coefficient of the tile's first channel.
template <class T>
const Acc<T>* of_tile(const Tile& tile, const void* coefficients) {
  return static_cast<const Acc<T>*>(coefficients) + tile.c0;
}

// kMore: there is a residual, branch bits, or both.
template <bool kMore, template <class> class Rows, class T, class Functor>
void normalize_and_more(
    const Tile& tile, const T* x, const Epilogue& epilogue, const CoefficientArrays& arrays, T* y, bool bypass_cache) {
  const auto* residual = static_cast<const T*>(epilogue.residual);
  uint8_t* const branches = epilogue.branches;
  const auto functor = functor_of<Functor>(epilogue.activation);
  const Acc<T>* const coefficients[] = {of_tile<T>(tile, arrays.shift), of_tile<T>(tile, arrays.scale),
                                        of_tile<T>(tile, arrays.offset)};
  Rows<T>{tile}.template map<3>(coefficients,
                                [=](const auto& at, const Vec<T>(&k)[3]) BN_INLINE {
                                  Vec<T> z = bn::normalize(at.read(x), k[0], k[1], k[2]);
                                  if (kMore && residual != nullptr) {
                                    z = z + at.read(residual);
                                  }
                                  if constexpr (kMore && Gradient<T, Functor>::kActivated) {
                                    if (branches != nullptr) {
                                      at.write(branches, functor.branch(z));
                                    }
                                  }
                                  at.write(y, at.keep(functor.value(z)));
                                },
                                {bypass_cache || branches != nullptr, bypass_cache, tile.ahead});
}

template <template <class> class Rows, class T, class Functor>
void normalize(const Tile& tile,
               const void* x,
               const Epilogue& epilogue,
               const CoefficientArrays& arrays,
               void* y,
               bool bypass_cache) {
  const bool more = Rows<T>::kMasked || epilogue.residual != nullptr || epilogue.branches != nullptr;
  const auto run =
      more ? normalize_and_more<true, Rows, T, Functor> : normalize_and_more<Rows<T>::kMasked, Rows, T, Functor>;
  run(tile, static_cast<const T*>(x), epilogue, arrays, static_cast<T*>(y), bypass_cache);
  fence();
}

template <template <class> class Rows, class T, class Functor>
void gradient_sums(const Tile& tile,
                   const void* dy,
                   const void* x,
                   const Epilogue& epilogue,
                   const CoefficientArrays& arrays,
                   double* sum_dz,
                   double* sum_dz_shifted) {
  const Rows<T> rows{tile};
  const Acc<T>* const coefficients[] = {of_tile<T>(tile, arrays.shift), of_tile<T>(tile, arrays.scale),
                                        of_tile<T>(tile, arrays.offset)};
  Scratch scratch = tile.scratch;
  ChannelArray<double, Rows<T>::kMaxChannels> sum(scratch), sum_shifted(scratch);
  std::fill_n(sum_dz + tile.c0, tile.channels(), 0.0);
  std::fill_n(sum_dz_shifted + tile.c0, tile.channels(), 0.0);
  for (int64_t b = tile.b0; b < tile.b1; ++b) {
    const Extent e = tile.extent(b);
    if (x != nullptr) {
      rows.sums(e, GradientTerm<T, Functor>{{dy, x, epilogue}}, coefficients, sum, sum_shifted, scratch);
    } else {
      rows.sums(e, SumTerm<T, Functor>{{dy, x, epilogue}}, coefficients, sum, sum_shifted, scratch);
    }
    for (int64_t c = 0; c < tile.channels(); ++c) {
      sum_dz[tile.c0 + c] += sum[c];
      sum_dz_shifted[tile.c0 + c] += sum_shifted[c];
    }
  }
}

template <template <class> class Rows, class T, class Functor>
void input_gradient(const Tile& tile,
                    const void* dy,
                    const void* x,
                    const Epilogue& epilogue,
                    const CoefficientArrays& arrays,
                    void* dx_,
                    void* dresidual_,
                    bool bypass_cache) {
  const Gradient<T, Functor> gradient(dy, x, epilogue);
  auto* const dx = static_cast<T*>(dx_);
  auto* const dresidual = static_cast<T*>(dresidual_);
  const Rows<T> rows{tile};
  const Writes writes{bypass_cache, bypass_cache, tile.ahead};
  constexpr bool kWritesResidual = Gradient<T, Functor>::kActivated || Rows<T>::kMasked;
  const auto write = [=](const auto& at, const Vec<T>& dz, const auto& gradient_of) BN_INLINE {
    if (kWritesResidual && dresidual != nullptr) {
      at.write(dresidual, dz);
    }
    if (!kWritesResidual || dx != nullptr) {
      at.write(dx, gradient_of(dz));
    }
  };
  // The forward's offset comes last: without an activation it is not needed.
  if (arrays.slope != nullptr) {
    constexpr int kCoefficients = Gradient<T, Functor>::kActivated ? 5 : 4;
    const Acc<T>* const coefficients[] = {of_tile<T>(tile, arrays.shift), of_tile<T>(tile, arrays.scale),
                                          of_tile<T>(tile, arrays.slope), of_tile<T>(tile, arrays.gradient_offset),
                                          of_tile<T>(tile, arrays.offset)};
    rows.template map<kCoefficients>(
        coefficients,
        [=](const auto& at, const Vec<T>(&k)[kCoefficients]) BN_INLINE {
          const Vec<T> x = at.read(gradient.x);
          write(at, at.keep(gradient.behind(at, x, k)), [&](const Vec<T>& dz) {
            const Vec<T> through = at.keep(bn::through_statistics(x, k[0], k[2], k[3]));
            return bn::input_gradient(dz, at.weigh(through), k[1]);
          });
        },
        writes);
  } else {
    constexpr int kCoefficients = Gradient<T, Functor>::kActivated ? 3 : 2;
    const Acc<T>* const coefficients[] = {of_tile<T>(tile, arrays.shift), of_tile<T>(tile, arrays.scale),
                                          of_tile<T>(tile, arrays.offset)};
    rows.template map<kCoefficients>(
        coefficients,
        [=](const auto& at, const Vec<T>(&k)[kCoefficients]) BN_INLINE {
          const Vec<T> x = gradient.repeats_forward() ? at.read(gradient.x) : Vec<T>(0);
          write(at, at.keep(gradient.behind(at, x, k)), [&](const Vec<T>& dz) { return dz * k[1]; });
        },
        writes);
  }
  fence();
}

template <template <class> class Rows, class T, class Functor>
constexpr Kernels kKernels = {kWidth<T>, moments<Rows, T>, normalize<Rows, T, Functor>, gradient_sums<Rows, T, Functor>,
                              input_gradient<Rows, T, Functor>};

template <template <class> class Rows, class Functor>
constexpr Kernels kOfDType[kDTypes] = {kKernels<Rows, double, Functor>, kKernels<Rows, float, Functor>,
                                       kKernels<Rows, c10::Half, Functor>, kKernels<Rows, c10::BFloat16, Functor>};

template <class T>
using WholePlanar = Planar<T, false>;
template <class T>
using WholeInterleaved = Interleaved<T, false>;
template <class T>
using MaskedPlanar = Planar<T, true>;
template <class T>
using MaskedInterleaved = Interleaved<T, true>;

}  // namespace

const Kernels& BN_KERNELS(Layout layout, DType dtype, const Activation& activation, bool masked) {
  const int i = static_cast<int>(dtype);
  return with_compiled(activation, [&](const auto& functor) -> const Kernels& {
    using Functor = std::decay_t<decltype(functor)>;
    if (masked) {
      using Called = std::conditional_t<std::is_same_v<Functor, activation::Any>, AnyCalled, Functor>;
      return layout == Layout::Planar ? kOfDType<MaskedPlanar, Called>[i] : kOfDType<MaskedInterleaved, Called>[i];
    }
    return layout == Layout::Planar ? kOfDType<WholePlanar, Functor>[i] : kOfDType<WholeInterleaved, Functor>[i];
  });
}

}  // namespace bn::cpu
