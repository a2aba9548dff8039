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
inline Vec<T> load(const T* p, int64_t count = kWidth<T>) {
  if constexpr (!kReduced<T>) {
    return Vec<T>::loadu(p, count);
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    __m512 wide;
    at::vec::cvt_to_fp32<T>(count == 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                                        : _mm256_maskz_loadu_epi16(mask, p),
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

template <class T>
inline void store(T* p, const Vec<T>& v, int64_t count = kWidth<T>) {
  if constexpr (!kReduced<T>) {
    v.store(p, static_cast<int>(count));
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    __m256i narrow;
    if constexpr (std::is_same_v<T, c10::BFloat16>) {
      narrow = at::vec::cvtfp32_bf16(v);
    } else {
      narrow = at::vec::cvtfp32_fp16(v);
    }
    if (count == 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
    } else {
      _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1), narrow);
    }
#elif defined(CPU_CAPABILITY_AVX2)
    __m128i narrow;
    if constexpr (std::is_same_v<T, c10::BFloat16>) {
      narrow = at::vec::cvtfp32_bf16(v);
    } else {
      narrow = at::vec::cvtfp32_fp16(v);
    }
    if (count == 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
    } else {
      std::memcpy(p, &narrow, count * sizeof(T));
    }
#else
    alignas(64) float wide[kWidth<T>];
    v.store(wide);
    for (int64_t i = 0; i < count; ++i) {
      p[i] = static_cast<T>(wide[i]);
    }
#endif
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

template <class T>
inline double sum_of_lanes(const Vec<T>& v) {
  alignas(64) Acc<T> lanes[kWidth<T>];
  v.store(lanes);
  double even = 0;
  double odd = 0;
  for (int64_t i = 0; i < kWidth<T>; i += 2) {
    even += lanes[i];
    odd += lanes[i + 1];
  }
  return even + odd;
}

// Copies around the cache: whole lines go straight to memory, without being read first.
template <class T>
inline void stream(T* to, const T* from, int64_t count) {
#if defined(__x86_64__)
  constexpr int64_t line = 64;
  auto* out = reinterpret_cast<char*>(to);
  const auto* in = reinterpret_cast<const char*>(from);
  int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  const int64_t head = -reinterpret_cast<intptr_t>(out) & (line - 1);
  if (bytes >= head + line) {
    std::memcpy(out, in, head);
    out += head;
    in += head;
    bytes -= head;
    for (; bytes >= line; bytes -= line, out += line, in += line) {
#if defined(CPU_CAPABILITY_AVX512)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(in));
#else
      for (int64_t i = 0; i < line; i += 16) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
      }
#endif
    }
  }
  std::memcpy(out, in, bytes);
#else
  std::memcpy(to, from, count * sizeof(T));
#endif
}

// Makes streamed stores visible to other threads.
inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace bn::cpu
