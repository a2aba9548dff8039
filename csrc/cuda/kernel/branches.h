#pragma once

#include "cuda/gpu/gpu.h"
#include "cuda/kernel/slab.h"

// Branch bits: one bit per element. Among the bits of a pack, bit l belongs to lane l.
namespace bn::cuda {

BN_DEVICE uint32_t load_bits(const uint8_t* branches, const PackPlace& place) {
  if (branches == nullptr || place.lanes == 0) {
    return 0;
  }
  const int64_t first = place.offset / 8;
  const int64_t last = (place.offset + place.lanes - 1) / 8;
  const uint32_t low = branches[first];
  const uint32_t high = last > first ? branches[last] : 0;
  return (low | high << 8) >> place.offset % 8;
}

// With `whole_bytes`, adjacent threads of a warp give the bits of a byte, and all or none of these threads have a pack.
// Otherwise the branch bits were set to zero before, and bits are added.
template <int kLanes>
BN_DEVICE void store_bits(uint8_t* branches, uint32_t bits, const PackPlace& place, bool whole_bytes) {
  if (place.lanes == 0) {
    return;
  }
  if (whole_bytes) {
    constexpr int kThreads = 8 / kLanes;
    const int lane = gpu::thread() % gpu::kWarp;
    const int turn = lane % kThreads;
    bits <<= turn * kLanes;
#pragma unroll
    for (int step = 1; step < kThreads; step *= 2) {
      bits |= gpu::shuffle_xor(((1U << kThreads) - 1) << (lane - turn), bits, step);
    }
    if (turn == 0) {
      branches[place.offset / 8] = static_cast<uint8_t>(bits);
    }
    return;
  }
  const uint64_t in_words = static_cast<uint64_t>(bits & ((1U << place.lanes) - 1)) << place.offset % 32;
  auto* const word = reinterpret_cast<unsigned*>(branches) + place.offset / 32;
  if (const auto low = static_cast<unsigned>(in_words); low != 0) {
    gpu::atomic_or(word, low);
  }
  if (const auto high = static_cast<unsigned>(in_words >> 32); high != 0) {
    gpu::atomic_or(word + 1, high);
  }
}

}  // namespace bn::cuda
