// Compiled once per instruction set, with BN_KERNELS naming the table it provides. Everything but that one
// function has internal linkage: a symbol shared with another unit could run on a CPU that lacks this
// unit's instructions.

#include "cpu/kernels.h"

#include "core/normalize.h"
#include "core/statistics.h"
#include "cpu/interleaved.h"
#include "cpu/planar.h"

namespace bn::cpu {
namespace {

// Each block is summed around the mean of the values before it, which nothing in the block can be far from
// unless the variance is as large; the first block around the mean of its first quarter, found in a pass of its own,
// whose squared distance from the block's mean is at most three times the block's variance. A mean within the
// deviation from zero is no better than zero, from which distances are exact. Means are kept as distances from the
// channel's first value: where that is like the others, no digit is lost to their common offset, and the mean of equal
// values is exactly that value.
template <template <class> class Rows, class T>
void moments(const Tile& tile, const void* x_, double* mean, double* m2) {
  const auto* x = static_cast<const T*>(x_);
  const Rows<T> rows{tile};
  double origin[Rows<T>::kMaxChannels];
  Acc<T> shift[Rows<T>::kMaxChannels];
  double sum[Rows<T>::kMaxChannels];
  double sum_sq[Rows<T>::kMaxChannels];
  mean += tile.c0;
  m2 += tile.c0;
  for (int64_t c = 0; c < tile.channels(); ++c) {
    origin[c] = finite_or_zero(static_cast<double>(x[tile.blocks.offset(0, tile.c0 + c, 0)]));
    mean[c] = 0;
    m2[c] = 0;
  }
  double count = 0;
  const auto set_shift = [&](double so_far) {
    for (int64_t c = 0; c < tile.channels(); ++c) {
      const double at = origin[c] + mean[c];
      shift[c] = at * at < m2[c] / so_far ? 0 : finite_or_zero(static_cast<Acc<T>>(at));
    }
  };
  for (int64_t b = tile.b0; b < tile.b1; ++b) {
    const Extent e = tile.blocks.extent(b);
    const auto block_count = static_cast<double>(e.count());
    set_shift(count);
    if (b == tile.b0) {
      rows.sums(e.quarter(), MomentTerm<T>{x}, shift, sum, sum_sq);
      const auto quarter_count = static_cast<double>(e.quarter().count());
      for (int64_t c = 0; c < tile.channels(); ++c) {
        const Moments quarter = shifted_moments(quarter_count, shift[c] - origin[c], sum[c], sum_sq[c]);
        mean[c] = quarter.mean;
        m2[c] = quarter.m2;
      }
      set_shift(quarter_count);
      std::fill_n(m2, tile.channels(), 0.0);
    }
    rows.sums(e, MomentTerm<T>{x}, shift, sum, sum_sq);
    for (int64_t c = 0; c < tile.channels(); ++c) {
      const Moments block = shifted_moments(block_count, shift[c] - origin[c], sum[c], sum_sq[c]);
      const Moments all = merge({count, mean[c], m2[c]}, block);
      mean[c] = all.mean;
      m2[c] = all.m2;
    }
    count += block_count;
  }
}

template <template <class> class Rows, class T>
void normalize(const Tile& tile,
               const void* x_,
               const void* shift,
               const void* scale,
               const void* offset,
               void* y,
               bool bypass_cache) {
  const auto* x = static_cast<const T*>(x_);
  const Acc<T>* const coefficients[] = {static_cast<const Acc<T>*>(shift) + tile.c0,
                                        static_cast<const Acc<T>*>(scale) + tile.c0,
                                        static_cast<const Acc<T>*>(offset) + tile.c0};
  Rows<T>{tile}.map(
      coefficients,
      [x, ahead = tile.ahead](int64_t i, int64_t count, const Vec<T>(&k)[3]) {
        prefetch(x + i + ahead);
        return bn::normalize(load_vec(x + i, count), k[0], k[1], k[2]);
      },
      static_cast<T*>(y), bypass_cache);
  fence();
}

template <template <class> class Rows, class T>
void gradient_sums(
    const Tile& tile, const void* dy_, const void* x_, const double* mean, double* sum_dy, double* sum_dy_shifted) {
  const auto* dy = static_cast<const T*>(dy_);
  const auto* x = static_cast<const T*>(x_);
  const Rows<T> rows{tile};
  Acc<T> shift[Rows<T>::kMaxChannels];
  double sum[Rows<T>::kMaxChannels];
  double sum_shifted[Rows<T>::kMaxChannels];
  for (int64_t c = 0; c < tile.channels(); ++c) {
    shift[c] = x != nullptr ? SplitMean<Acc<T>>(mean[tile.c0 + c]).shift : 0;
    sum_dy[tile.c0 + c] = 0;
    sum_dy_shifted[tile.c0 + c] = 0;
  }
  for (int64_t b = tile.b0; b < tile.b1; ++b) {
    const Extent e = tile.blocks.extent(b);
    if (x != nullptr) {
      rows.sums(e, GradientTerm<T>{dy, x}, shift, sum, sum_shifted);
    } else {
      rows.sums(e, SumTerm<T>{dy}, shift, sum, sum_shifted);
    }
    for (int64_t c = 0; c < tile.channels(); ++c) {
      sum_dy[tile.c0 + c] += sum[c];
      sum_dy_shifted[tile.c0 + c] += sum_shifted[c];
    }
  }
}

template <template <class> class Rows, class T>
void input_gradient(const Tile& tile,
                    const void* dy_,
                    const void* x_,
                    const void* shift,
                    const void* scale,
                    const void* slope,
                    const void* offset,
                    void* dx,
                    bool bypass_cache) {
  const auto* dy = static_cast<const T*>(dy_);
  const auto* scales = static_cast<const Acc<T>*>(scale) + tile.c0;
  const Rows<T> rows{tile};
  if (const auto* x = static_cast<const T*>(x_)) {
    const Acc<T>* const coefficients[] = {static_cast<const Acc<T>*>(shift) + tile.c0, scales,
                                          static_cast<const Acc<T>*>(slope) + tile.c0,
                                          static_cast<const Acc<T>*>(offset) + tile.c0};
    rows.map(
        coefficients,
        [dy, x, ahead = tile.ahead](int64_t i, int64_t count, const Vec<T>(&k)[4]) {
          prefetch(dy + i + ahead);
          prefetch(x + i + ahead);
          return bn::input_gradient(load_vec(dy + i, count), load_vec(x + i, count), k[0], k[1], k[2], k[3]);
        },
        static_cast<T*>(dx), bypass_cache);
  } else {
    const Acc<T>* const coefficients[] = {scales};
    rows.map(
        coefficients, [dy](int64_t i, int64_t count, const Vec<T>(&k)[1]) { return load_vec(dy + i, count) * k[0]; },
        static_cast<T*>(dx), bypass_cache);
  }
  fence();
}

template <template <class> class Rows, class T>
constexpr Kernels kKernels = {moments<Rows, T>, normalize<Rows, T>, gradient_sums<Rows, T>, input_gradient<Rows, T>};

template <template <class> class Rows>
constexpr Kernels kOfDType[kDTypes] = {kKernels<Rows, double>, kKernels<Rows, float>, kKernels<Rows, c10::Half>,
                                       kKernels<Rows, c10::BFloat16>};

}  // namespace

const Kernels& BN_KERNELS(Layout layout, DType dtype) {
  const int i = static_cast<int>(dtype);
  return layout == Layout::Planar ? kOfDType<Planar>[i] : kOfDType<Interleaved>[i];
}

}  // namespace bn::cpu
