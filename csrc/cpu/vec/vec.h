#pragma once

// Vectors of the accumulation type, loaded from and stored to tensors of any type. Included only by the
// units that are compiled once per instruction set.

#include "core/dtype.h"
#include "core/math.h"

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// For functions and lambdas between an innermost loop and the vector that it writes. Only if they are inlined does the
// compiler know whether the vector is whole and where it is stored, and GCC stops inlining a function with many calls.
#define BN_INLINE __attribute__((always_inline))

// For the loops over rows. If they are inlined into their callers, GCC gives them fewer registers (measured, contiguous
// bfloat16: forward and inference 1.05 times faster if they are not).
#define BN_NOINLINE __attribute__((noinline))

namespace bn {

template <class A>
struct Math<at::vec::Vectorized<A>> {
  using V = at::vec::Vectorized<A>;
  using Mask = V;  // all ones in a lane, or zero

  BN_HD static V constant(double value) { return V(static_cast<A>(value)); }
  BN_HD static V select(const V& where, const V& a, const V& b) { return V::blendv(b, a, where); }
  BN_HD static V exp(const V& x) { return x.exp(); }
  BN_HD static V expm1(const V& x) { return x.expm1(); }
  BN_HD static V tanh(const V& x) { return x.tanh(); }
  BN_HD static V erf(const V& x) { return x.erf(); }
};

}  // namespace bn

namespace bn::cpu {
namespace {

template <class T>
using Vec = at::vec::Vectorized<Acc<T>>;

template <class T>
constexpr int64_t kWidth = Vec<T>::size();

template <class T>
constexpr bool kReduced = !std::is_same_v<T, Acc<T>>;

// Loads `count` values at p. The other lanes are zero.
template <class T>
inline Vec<T> load_vec(const T* p, int64_t count = kWidth<T>) {
  if constexpr (!kReduced<T>) {
    return Vec<T>::loadu(p, count);
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    __m512 wide;
    at::vec::cvt_to_fp32<T>(
        count == 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)) : _mm256_maskz_loadu_epi16(mask, p),
        wide);
    return wide;
#elif defined(CPU_CAPABILITY_AVX2)
    __m128i narrow = _mm_setzero_si128();
    if (count == 8) {
      narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    } else {
      std::memcpy(&narrow, p, count * sizeof(T));
    }
    __m256 wide;
    at::vec::cvt_to_fp32<T>(narrow, wide);
    return wide;
#else
    alignas(64) float wide[kWidth<T>] = {};
    for (int64_t i = 0; i < count; ++i) {
      wide[i] = static_cast<float>(p[i]);
    }
    return Vec<T>::loadu(wide);
#endif
  }
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
template <class T>
inline auto narrow(const Vec<T>& v) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return at::vec::cvtfp32_bf16(v);
  } else {
    return at::vec::cvtfp32_fp16(v);
  }
}
#endif

// Fetches the line of p, which may lie outside of any tensor, into the second-level cache; other levels were not
// measured. It is inlined, because GCC drops calls of a function that has no effect it can see.
template <class T>
BN_INLINE inline void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// Stores the first `count` lanes at p.
template <class T>
inline void store_vec(T* p, const Vec<T>& v, int64_t count = kWidth<T>) {
  if constexpr (!kReduced<T>) {
    v.store(p, static_cast<int>(count));
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    if (count == kWidth<T>) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow<T>(v));
    } else {
      _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1), narrow<T>(v));
    }
#elif defined(CPU_CAPABILITY_AVX2)
    const __m128i lanes = narrow<T>(v);
    std::memcpy(p, &lanes, count * sizeof(T));
#else
    alignas(64) float wide[kWidth<T>];
    v.store(wide);
    for (int64_t i = 0; i < count; ++i) {
      p[i] = static_cast<T>(wide[i]);
    }
#endif
  }
}

// Stores all lanes at p, past the cache: memory is written without being read first. p has to be aligned to the
// size of kWidth elements.
template <class T>
inline void stream_vec(T* p, const Vec<T>& v) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (kReduced<T>) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow<T>(v));
  } else if constexpr (std::is_same_v<T, double>) {
    _mm512_stream_pd(p, v);
  } else {
    _mm512_stream_ps(p, v);
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (kReduced<T>) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow<T>(v));
  } else if constexpr (std::is_same_v<T, double>) {
    _mm256_stream_pd(p, v);
  } else {
    _mm256_stream_ps(p, v);
  }
#else
  store_vec(p, v);
#endif
}

// Makes streamed stores visible to other threads.
inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Calls write(i, count, streamed) over [0, length) for whole vectors; `start` is the index of element 0 in the tensor.
// With `aligned`, vectors begin at multiples of their width in the tensor, so that they can be streamed, and fill whole
// bytes of branch bits. The rest at either end is written with a whole vector too, over values that are written
// already, because partial stores are slow (measured, 2048 x 49 float on Zen 4: 1.9 against 1.7 ms).
template <class T, class Write>
BN_INLINE inline void write_row(int64_t start, int64_t length, bool aligned, bool streamed, const Write& write) {
  if (length < kWidth<T>) {
    write(0, length, false);
    return;
  }
  int64_t i = aligned ? -start & (kWidth<T> - 1) : 0;
  if (i > 0) {
    write(0, kWidth<T>, false);
  }
  for (; i + kWidth<T> <= length; i += kWidth<T>) {
    write(i, kWidth<T>, streamed);
  }
  if (i < length) {
    write(length - kWidth<T>, kWidth<T>, false);
  }
}

// All ones in the first `count` lanes: `v & mask` clears the lanes past the end of a row.
template <class T>
inline Vec<T> lane_mask(int64_t count) {
  alignas(64) Acc<T> lanes[kWidth<T>];
  std::memset(lanes, 0, sizeof(lanes));
  std::memset(lanes, 0xff, count * sizeof(Acc<T>));
  return Vec<T>::loadu(lanes);
}

// The sum, in four chains that hide the latency of an addition. The number of chains was not measured.
inline double sum_of(const double* values, int64_t count) {
  double sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int64_t k = 0; k < 4; ++k) {
      sums[k] += values[i + k];
    }
  }
  for (; i < count; ++i) {
    sums[0] += values[i];
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// A sum in double precision for each lane of a vector. It adds up the results of short chains in the accumulation type.
template <class T>
class DoubleLanes {
 public:
  explicit DoubleLanes(const double* lanes) {
    for (int k = 0; k < kVectors; ++k) {
      doubles_[k] = Doubles::loadu(lanes + k * Doubles::size());
    }
  }
  void add(const Vec<T>& v) {
    for (int k = 0; k < kVectors; ++k) {
      doubles_[k] = doubles_[k] + widened(v, k);
    }
  }
  void store(double* lanes) const {
    for (int k = 0; k < kVectors; ++k) {
      doubles_[k].store(lanes + k * Doubles::size());
    }
  }

 private:
  using Doubles = at::vec::Vectorized<double>;
  static constexpr int kVectors = kWidth<T> / Doubles::size();

  Doubles doubles_[kVectors];

  // The lanes of v that vector k sums.
  static Doubles widened(const Vec<T>& v, int k) {
    if constexpr (std::is_same_v<T, double>) {
      return v;
    } else {
#if defined(CPU_CAPABILITY_AVX512)
      return _mm512_cvtps_pd(k == 0 ? _mm512_castps512_ps256(v) : _mm512_extractf32x8_ps(v, 1));
#elif defined(CPU_CAPABILITY_AVX2)
      return _mm256_cvtps_pd(k == 0 ? _mm256_castps256_ps128(v) : _mm256_extractf128_ps(v, 1));
#else
      float values[kWidth<T>];
      v.store(values);
      double wide[Doubles::size()];
      std::copy_n(values + k * Doubles::size(), Doubles::size(), wide);
      return Doubles::loadu(wide);
#endif
    }
  }
};

}  // namespace
}  // namespace bn::cpu
