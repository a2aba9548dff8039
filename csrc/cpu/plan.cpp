#include "cpu/plan.h"

#include "core/text.h"
#include "cpu/kernels/kernels.h"

#include <numeric>

namespace bn::cpu {
namespace {

// Values that are summed around one shift: enough that ending a patch costs little (measured, 1568 x 2048 float
// forward: 1.19 times faster with 128 rows than with 32; the other two are not measured).
constexpr int64_t kPlanarPatch = 1024;
constexpr int64_t kInterleavedPatch = 16384;
constexpr int64_t kInterleavedRows = 128;

// The values of a plane, or rows of joined planes, that one pass without sums takes at a time. Not measured.
constexpr int64_t kMappedPatch = 16384;
constexpr int64_t kMappedRows = 16;

// Chunks are what threads share: enough of them to balance, not so many that merging them is felt. Not measured.
constexpr int64_t kPlanarChunk = 16;
constexpr int64_t kInterleavedChunk = 32768;
constexpr int64_t kMaxChunks = 64;

// Interleaved tiles are no narrower than this, for rows of some lines each. Not measured.
constexpr int64_t kNarrowest = 64;

// Tasks of unequal cost even out over this many for each thread. Not measured.
constexpr int64_t kTasksPerThread = 4;

// Below this many elements another thread costs more than it brings. Not measured.
constexpr int64_t kSerial = 32768;

constexpr int64_t kLine = 64;
constexpr int64_t kPage = 4096;

// Short planes are joined, unless they are whole vectors and so few that sums and coefficients for each of their values
// cost more than they spare (measured, a call with 2 x 32 x 8 x 8 floats: forward 1.2, backward 1.07 times faster).
constexpr bool joins(const Problem& p) {
  constexpr int64_t kJoinBelow = 256;
  constexpr int64_t kVector = 16;
  return p.layout == Layout::Planar && p.s < kJoinBelow && (p.n >= kRowsAtOnce || p.s % kVector != 0);
}

// The patches of a set of `n` images or positions.
Patches cut(Problem p, int64_t n, bool reduces) {
  p.n = n;
  Patches b{};
  b.n = p.n;
  b.c = p.c;
  b.s = p.s;
  if (p.layout == Layout::Planar) {
    const int64_t patch = reduces ? kPlanarPatch : kMappedPatch;
    b.segment = std::min(round_up(divide_up(p.s, divide_up(p.s, patch)), 16), p.s);
    b.segments = divide_up(p.s, b.segment);
    b.joined = joins(p);
    if (b.joined) {
      b.rows = reduces ? kRowsAtOnce * std::max<int64_t>(kPlanarPatch / p.s / kRowsAtOnce, 1) : kMappedRows;
    } else {
      b.rows = reduces && p.n < kRowsAtOnce ? std::max<int64_t>(kPlanarPatch / p.s, 1) : 1;
    }
    b.per_chunk = reduces ? kPlanarChunk : 1;
  } else {
    b.segment = 1;
    b.segments = 1;
    b.rows = round_up(std::max(kInterleavedPatch / p.c, kInterleavedRows), kInterleavedRows);
    b.per_chunk = std::max<int64_t>(kInterleavedChunk / p.c / b.rows, 1);
  }
  b.count = divide_up(p.n, b.rows) * b.segments;
  if (reduces) {
    b.per_chunk = std::max(b.per_chunk, divide_up(b.count, kMaxChunks));
  }
  b.chunks = divide_up(b.count, b.per_chunk);
  return b;
}

bool cut_into_bytes(const Problem& p, const Patches& patches, int64_t tile) {
  constexpr int64_t kByte = 8;
  const bool planar = p.layout == Layout::Planar;
  const int64_t row = planar && !patches.joined ? p.s : p.c * p.s;
  const int64_t part = planar ? patches.joined ? tile * p.s : patches.segment : tile;
  return fills_branch_words(p.count() * p.c) && row % kByte == 0 && part % kByte == 0;
}

}  // namespace

// Past the cache a line is not read before it is written, which saves a third of the traffic, but the layer that reads
// the output reads it from memory. Measured with a last cache of 32 MiB, two threads, floats, in multiples of the speed
// with a limit of 4 MiB, contiguous and channels last: inference of 8 x 64 x 56 x 56 (6 MiB) 2.1 and 1.7, with a read
// of the output behind it 2.2 and 1.8; training forward 1.1 and 1.4, with the read 1.8 and 1.9; of 32 x 2048 x 7 x 7
// (12 MiB) 0.9 and 1.0, with the read 1.0 and 1.2. Forward and backward with no reader in between, where outputs in the
// cache are in the way: 0.82 to 0.94.
bool bypasses_cache(int64_t output_bytes, int64_t last_cache_bytes) {
  return output_bytes >= last_cache_bytes / 8 * 5;
}

Plan plan(const Pass& pass, int threads, int64_t last_cache_bytes) {
  const Problem& p = pass.problem;
  const bool reduces = pass.reduces();
  Plan plan{};
  plan.sets = p.sets();
  plan.patches = cut(p, p.rows_of(0), reduces);
  plan.last = cut(p, p.rows_of(plan.sets - 1), reduces);
  const int64_t elements = p.n * p.c * p.s;
  plan.threads = elements < kSerial ? 1 : threads;

  const int64_t enough = plan.threads == 1 ? 1 : kTasksPerThread * plan.threads;
  const int64_t max_tile = std::min(kMaxTile[static_cast<int>(p.layout)], p.c);
  const int64_t balanced = divide_up(p.c * plan.sets, enough);
  if (p.layout == Layout::Planar && !reduces) {
    plan.tile =
        std::clamp<int64_t>((plan.patches.joined ? kPlanarRun : kMappedPatch) / plan.patches.segment, 1, max_tile);
    plan.split = true;
  } else if (p.layout == Layout::Planar) {
    plan.tile = std::clamp<int64_t>(std::min(kPlanarRun / p.s, balanced), 1, max_tile);
    plan.split = plan.threads > 1 && plan.tiles() * plan.sets < enough;
  } else {
    plan.tile =
        plan.patches.chunks * plan.sets >= enough ? max_tile : std::min(round_up(balanced, kNarrowest), max_tile);
    plan.split = !reduces || p.one_set() || plan.tiles() * plan.sets < enough;
  }
  int64_t row = (p.layout == Layout::Planar ? p.s : p.c) * size_of(p.dtype);
  if (plan.patches.joined) {  // rows of whole lines, where some number of planes makes them
    const int64_t whole = kLine / std::gcd(kLine, row);
    plan.tile = plan.tile < whole ? plan.tile : plan.tile / whole * whole;
    row *= plan.tile;
  }
  // Rows begin with a whole vector of any instruction set: parts of vectors are slower past the cache than through it.
  // The halves of a line, which 16 values of 2 bytes are, meet on their way.
  const int64_t vector = std::min(kLine, 16 * size_of(p.dtype));
  plan.bypass_cache = bypasses_cache(elements * size_of(p.dtype), last_cache_bytes) && row % vector == 0;
  plan.whole_bytes = cut_into_bytes(p, plan.patches, plan.tile) && cut_into_bytes(p, plan.last, plan.tile);
  // Into the next tile (measured, 32 x 64 x 56 x 56 float forward: 22 cycles a vector, 31 without), or the next row of
  // joined planes (32 x 1024 x 14 x 14 float inference: 1.5 times faster than with none). Where a pass goes through
  // memory in order, the hardware looks ahead by itself, but not behind the end of a page (32 x 1024 x 14 x 14 float,
  // channels last, add and ReLU: forward 1.23, backward 1.14 times faster). With 2-byte values it is the more to do
  // for a line (measured with AVX-512: 0.95).
  if (!plan.split && p.layout == Layout::Planar) {
    plan.ahead = plan.tile * p.s;
  } else if (plan.patches.joined) {
    plan.ahead = p.c * p.s;
  } else if (p.layout == Layout::Interleaved && size_of(p.dtype) > 2) {
    plan.ahead = kPage / size_of(p.dtype);
  }
  return plan;
}

std::string to_string(const Plan& plan) {
  // All fields are named: a new one is an error here.
  const auto& [patches, last, sets, tile, threads, split, bypass_cache, whole_bytes, ahead] = plan;
  const auto& [n, c, s, rows, segment, segments, count, per_chunk, chunks, joined] = patches;
  return fields({{"n", n},
                 {"c", c},
                 {"s", s},
                 {"rows", rows},
                 {"segment", segment},
                 {"segments", segments},
                 {"count", count},
                 {"per_chunk", per_chunk},
                 {"chunks", chunks},
                 {"joined", joined},
                 {"sets", sets},
                 {"last_n", last.n},
                 {"last_joined", last.joined},
                 {"tile", tile},
                 {"threads", threads},
                 {"split", split},
                 {"bypass_cache", bypass_cache},
                 {"whole_bytes", whole_bytes},
                 {"ahead", ahead}});
}

}  // namespace bn::cpu
