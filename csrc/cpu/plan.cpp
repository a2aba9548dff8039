#include "cpu/plan.h"

#include "cpu/kernels.h"

namespace bn::cpu {
namespace {

// Values that are summed in the accumulation type: few enough that a float keeps its digits, enough that
// ending a block costs little.
constexpr int64_t kPlanarBlock = 1024;
constexpr int64_t kInterleavedBlock = 4096;
constexpr int64_t kInterleavedRows = 32;

// Chunks are what threads share: enough of them to balance, not so many that merging them is felt.
constexpr int64_t kPlanarChunk = 16;
constexpr int64_t kInterleavedChunk = 131072;
constexpr int64_t kMaxChunks = 64;

// Below this many elements another thread costs more than it brings.
constexpr int64_t kSerial = 32768;

// What a thread can count on to find again in its own cache.
constexpr int64_t kCachedBytes = 512 << 10;

// Outputs of this size and more would push everything else out of the cache.
constexpr int64_t kBypassBytes = 8 << 20;

constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

Blocks cut(const Problem& p) {
  Blocks b{};
  b.n = p.n;
  b.c = p.c;
  b.s = p.s;
  int64_t chunk = kPlanarChunk;
  if (p.layout == Layout::Planar) {
    b.segments = divide_up(p.s, kPlanarBlock);
    b.segment = std::min(round_up(divide_up(p.s, b.segments), 16), p.s);
    b.segments = divide_up(p.s, b.segment);
    b.rows = b.segments > 1 ? 1 : std::max<int64_t>(kPlanarBlock / p.s, 1);
  } else {
    b.segments = 1;
    b.segment = 1;
    b.rows = round_up(std::max(kInterleavedBlock / p.c, kInterleavedRows), kInterleavedRows);
    chunk = std::max<int64_t>(kInterleavedChunk / (b.rows * p.c), 1);
  }
  b.count = divide_up(p.n, b.rows) * b.segments;
  b.per_chunk = std::max(chunk, divide_up(b.count, kMaxChunks));
  b.chunks = divide_up(b.count, b.per_chunk);
  return b;
}

}  // namespace

Plan plan(const Problem& p, int tensors, int threads) {
  Plan plan{};
  plan.blocks = cut(p);
  const int64_t elements = p.n * p.c * p.s;
  const int64_t bytes = elements * size_of(p.dtype);
  plan.threads = elements < kSerial ? 1 : threads;
  plan.bypass_cache = bytes >= kBypassBytes;
  const int64_t max_tile = std::min(kMaxTile[static_cast<int>(p.layout)], p.c);
  const int64_t balanced = divide_up(p.c, 4 * plan.threads);
  if (p.layout == Layout::Planar) {
    // Several planes together where one is short, so that memory is passed over in runs of some kilobytes.
    plan.tile = std::clamp<int64_t>(std::min(kStage / p.s, balanced), 1, max_tile);
    plan.split = plan.threads > 1 && plan.tiles() < 4 * plan.threads;
  } else {
    // A thread of its own for each group of channels where their values stay in its cache.
    const int64_t cached = kCachedBytes / (p.n * size_of(p.dtype) * tensors) / 16 * 16;
    plan.split = cached < std::min<int64_t>(64, p.c);
    plan.tile = plan.split ? max_tile : std::clamp<int64_t>(std::min(cached, round_up(balanced, 16)), 1, max_tile);
  }
  return plan;
}

}  // namespace bn::cpu
