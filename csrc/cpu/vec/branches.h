#pragma once

#include "cpu/vec/vec.h"

// Branch bits, one per element in the order of memory, and lane masks, vectors with all ones in a lane or zero.
namespace bn::cpu {
namespace {

// Bit i is 1 if lane i is all ones.
template <class T>
inline uint32_t bits_of(const Vec<T>& lanes) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, double>) {
    return _mm512_movepi64_mask(_mm512_castpd_si512(lanes));
  } else {
    return _mm512_movepi32_mask(_mm512_castps_si512(lanes));
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, double>) {
    return _mm256_movemask_pd(lanes);
  } else {
    return _mm256_movemask_ps(lanes);
  }
#else
  Acc<T> values[kWidth<T>];
  lanes.store(values);
  uint32_t bits = 0;
  for (int64_t i = 0; i < kWidth<T>; ++i) {
    bits |= uint32_t{std::signbit(values[i])} << i;
  }
  return bits;
#endif
}

// Lane i is all ones if bit i is 1.
template <class T>
inline Vec<T> lanes_of(uint32_t bits) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, double>) {
    return _mm512_castsi512_pd(_mm512_movm_epi64(static_cast<__mmask8>(bits)));
  } else {
    return _mm512_castsi512_ps(_mm512_movm_epi32(static_cast<__mmask16>(bits)));
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, double>) {
    const __m256i bit = _mm256_setr_epi64x(1, 2, 4, 8);
    return _mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(bits), bit), bit));
  } else {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, bit), bit));
  }
#else
  using Bits = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;
  Bits values[kWidth<T>];
  for (int64_t i = 0; i < kWidth<T>; ++i) {
    values[i] = -static_cast<Bits>(bits >> i & 1);
  }
  return Vec<T>::loadu(values);
#endif
}

constexpr int64_t kPair = 16;  // bits of two bytes

// The bits of the elements [i, i + count).
inline uint32_t read_bits(const uint8_t* branches, int64_t i, int64_t count) {
  if (count == kPair && i % 8 == 0) {
    uint16_t bits;
    std::memcpy(&bits, branches + i / 8, sizeof(bits));
    return bits;
  }
  uint32_t bits = 0;
  for (int64_t b = i / 8; b * 8 < i + count; ++b) {
    bits |= uint32_t{branches[b]} << (b - i / 8) * 8;
  }
  return bits >> i % 8;
}

// Writes the bits of the elements [i, i + count). A byte that these elements do not fill has to be zero before; another
// thread may set bits of it at the same time.
inline void write_bits(uint8_t* branches, int64_t i, int64_t count, uint32_t bits) {
  if (count == kPair && i % 8 == 0) {
    const auto pair = static_cast<uint16_t>(bits);
    std::memcpy(branches + i / 8, &pair, sizeof(pair));
    return;
  }
  if (count == 8 && i % 8 == 0) {
    branches[i / 8] = static_cast<uint8_t>(bits);
    return;
  }
  bits = (bits & ((1u << count) - 1)) << i % 8;
  for (int64_t b = i / 8; bits != 0; ++b, bits >>= 8) {
    __atomic_fetch_or(branches + b, static_cast<uint8_t>(bits), __ATOMIC_RELAXED);
  }
}

}  // namespace
}  // namespace bn::cpu
