#include "cpu/plan.h"

#include "cpu/kernels.h"

namespace bn::cpu {
namespace {

// Values that are summed in the accumulation type: few enough that a float keeps its digits, enough that
// ending a block costs little.
constexpr int64_t kPlanarBlock = 1024;
constexpr int64_t kInterleavedBlock = 4096;
constexpr int64_t kInterleavedRows = 32;

// Values of a plane that one pass without sums takes at a time.
constexpr int64_t kMappedBlock = 16384;

// Chunks are what threads share: enough of them to balance, not so many that merging them is felt.
constexpr int64_t kPlanarChunk = 16;
constexpr int64_t kInterleavedChunk = 32768;
constexpr int64_t kInterleavedChunkRows = 64;
constexpr int64_t kMaxChunks = 64;

// Short planes are taken together, so that memory is passed over in runs of some kilobytes.
constexpr int64_t kPlanarRun = 2048;

// Interleaved tiles are no narrower than this, for rows of some lines each.
constexpr int64_t kNarrowest = 64;

// Tasks of unequal cost even out over this many for each thread.
constexpr int64_t kTasksPerThread = 4;

// Below this many elements another thread costs more than it brings.
constexpr int64_t kSerial = 32768;

// Outputs of this size and more go past the cache: a core's own cache is smaller, so that a consumer would
// hardly find them there, and not reading lines before writing them saves a third of the traffic.
constexpr int64_t kBypassBytes = 4 << 20;
constexpr int64_t kLine = 64;
constexpr int64_t kAheadBytes = 1 << 10;

constexpr int64_t round_up(int64_t a, int64_t b) {
  return divide_up(a, b) * b;
}

Blocks cut(const Problem& p, bool reduces) {
  Blocks b{};
  b.n = p.n;
  b.c = p.c;
  b.s = p.s;
  if (p.layout == Layout::Planar) {
    const int64_t block = reduces ? kPlanarBlock : kMappedBlock;
    b.segment = std::min(round_up(divide_up(p.s, divide_up(p.s, block)), 16), p.s);
    b.segments = divide_up(p.s, b.segment);
    b.rows = reduces && b.segments == 1 ? std::max<int64_t>(kPlanarBlock / p.s, 1) : 1;
    b.per_chunk = reduces ? kPlanarChunk : 1;
  } else {
    b.segment = 1;
    b.segments = 1;
    b.rows = round_up(std::max(kInterleavedBlock / p.c, kInterleavedRows), kInterleavedRows);
    b.per_chunk = divide_up(std::max(kInterleavedChunk / p.c, kInterleavedChunkRows), b.rows);
  }
  b.count = divide_up(p.n, b.rows) * b.segments;
  if (reduces) {
    b.per_chunk = std::max(b.per_chunk, divide_up(b.count, kMaxChunks));
  }
  b.chunks = divide_up(b.count, b.per_chunk);
  return b;
}

}  // namespace

Plan plan(const Problem& p, bool reduces, int threads) {
  Plan plan{};
  plan.blocks = cut(p, reduces);
  const int64_t elements = p.n * p.c * p.s;
  plan.threads = elements < kSerial ? 1 : threads;
  // Lines that two rows share would be written in part, which is slower past the cache than through it.
  const int64_t row = (p.layout == Layout::Planar ? p.s : p.c) * size_of(p.dtype);
  plan.bypass_cache = elements * size_of(p.dtype) >= kBypassBytes && row % kLine == 0;

  const int64_t enough = kTasksPerThread * plan.threads;
  const int64_t max_tile = std::min(kMaxTile[static_cast<int>(p.layout)], p.c);
  const int64_t balanced = divide_up(p.c, enough);
  if (p.layout == Layout::Planar && !reduces) {
    plan.tile = std::clamp<int64_t>(kMappedBlock / plan.blocks.segment, 1, max_tile);
    plan.split = true;
  } else if (p.layout == Layout::Planar) {
    plan.tile = std::clamp<int64_t>(std::min(kPlanarRun / p.s, balanced), 1, max_tile);
    plan.split = plan.threads > 1 && plan.tiles() < enough;
  } else {
    plan.tile = plan.blocks.chunks >= enough ? max_tile : std::min(round_up(balanced, kNarrowest), max_tile);
    plan.split = true;
  }
  // Into the next tile (measured, 32 x 64 x 56 x 56 float forward: 22 cycles a vector, 31 without), or, where
  // a pass goes through memory in order, a little further than the hardware looks.
  plan.ahead = plan.split ? kAheadBytes / size_of(p.dtype) : plan.tile * p.s;
  return plan;
}

}  // namespace bn::cpu
