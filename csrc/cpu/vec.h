#pragma once

// Vectors of the accumulation type, loaded from and stored to tensors of any type. Included only by the
// units that are compiled once per instruction set.

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bn::cpu {
namespace {

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
using Vec = at::vec::Vectorized<Acc<T>>;

template <class T>
constexpr int64_t kWidth = Vec<T>::size();

template <class T>
constexpr bool kReduced = !std::is_same_v<T, Acc<T>>;

// `count` values at p; the lanes behind them are zero.
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

#if defined(CPU_CAPABILITY_AVX512)
template <class T>
inline __m256i narrow(const Vec<T>& v) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return at::vec::cvtfp32_bf16(v);
  } else {
    return at::vec::cvtfp32_fp16(v);
  }
}
#elif defined(CPU_CAPABILITY_AVX2)
template <class T>
inline __m128i narrow(const Vec<T>& v) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return at::vec::cvtfp32_bf16(v);
  } else {
    return at::vec::cvtfp32_fp16(v);
  }
}
#endif

// Brings the line of p, which may lie outside of any tensor, into the second-level cache.
template <class T>
inline void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// The first `count` lanes to p.
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

// All lanes to p, past the cache: memory is written without being read first. p has to be aligned to the
// bytes of its kWidth elements.
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

// Elements from p to the first address that can be streamed to.
template <class T>
inline int64_t unaligned_head(const T* p) {
  constexpr int64_t bytes = kWidth<T> * static_cast<int64_t>(sizeof(T));
  return (-reinterpret_cast<intptr_t>(p) & (bytes - 1)) / static_cast<int64_t>(sizeof(T));
}

// write(i, count, streamed) over [0, length) in whole vectors; where `bypass_cache`, they lie so that they can
// be streamed to p + i. What is left at an end is written with a whole vector too, over values that have been
// written already: stores in part are slow (measured, 2048 x 49 float on Zen 4: 1.9 against 1.7 ms).
template <class T, class Write>
inline void write_row(const T* p, int64_t length, bool bypass_cache, const Write& write) {
  if (length < kWidth<T>) {
    write(0, length, false);
    return;
  }
  int64_t i = 0;
  if (bypass_cache) {
    if (unaligned_head(p) > 0) {
      write(0, kWidth<T>, false);
      i = unaligned_head(p);
    }
    for (; i + kWidth<T> <= length; i += kWidth<T>) {
      write(i, kWidth<T>, true);
    }
  } else {
    for (; i + kWidth<T> <= length; i += kWidth<T>) {
      write(i, kWidth<T>, false);
    }
  }
  if (i < length) {
    write(length - kWidth<T>, kWidth<T>, false);
  }
}

// All-ones in the first `count` lanes: `v & mask` drops what a short row's tail lanes hold.
template <class T>
inline Vec<T> lane_mask(int64_t count) {
  alignas(64) Acc<T> lanes[kWidth<T>];
  std::memset(lanes, 0, sizeof(lanes));
  std::memset(lanes, 0xff, count * sizeof(Acc<T>));
  return Vec<T>::loadu(lanes);
}

// lanes[i] += v[i]: where short chains of additions in the accumulation type end.
template <class T>
inline void add_to_lanes(double* lanes, const Vec<T>& v) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (!std::is_same_v<T, double>) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    _mm512_storeu_pd(lanes, _mm512_add_pd(_mm512_loadu_pd(lanes), low));
    _mm512_storeu_pd(lanes + 8, _mm512_add_pd(_mm512_loadu_pd(lanes + 8), high));
    return;
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (!std::is_same_v<T, double>) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    _mm256_storeu_pd(lanes, _mm256_add_pd(_mm256_loadu_pd(lanes), low));
    _mm256_storeu_pd(lanes + 4, _mm256_add_pd(_mm256_loadu_pd(lanes + 4), high));
    return;
  }
#endif
  alignas(64) Acc<T> values[kWidth<T>];
  v.store(values);
  for (int64_t i = 0; i < kWidth<T>; ++i) {
    lanes[i] += values[i];
  }
}

template <class T>
inline double sum_of_lanes(const double* lanes) {
  constexpr int64_t chains = std::min<int64_t>(kWidth<T>, 4);
  double sums[4] = {};
  for (int64_t i = 0; i < kWidth<T>; i += chains) {
    for (int64_t k = 0; k < chains; ++k) {
      sums[k] += lanes[i + k];
    }
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace
}  // namespace bn::cpu
