#pragma once

#include "core/host_device.h"
#include "core/numbers.h"
#include "core/pass.h"

#include <algorithm>
#include <cstdint>
#include <string>

// How the CPU kernels cut a problem into work: values from pure functions.
namespace bn::cpu {

// A patch: images or positions [n0, n1), and of each the values [s0, s1), of every channel.
struct Extent {
  int64_t n0, n1, s0, s1;

  BN_HD constexpr int64_t count() const { return (n1 - n0) * (s1 - s0); }
  // The first quarter of its images or positions.
  BN_HD constexpr Extent quarter() const { return {n0, n0 + (n1 - n0 + 3) / 4, s0, s1}; }
};

// Patches are what is summed in the accumulation type before double precision takes over; chunks are runs
// of patches whose results are merged in order. Both follow from the problem alone, never from the number
// of threads, and so do the bits of every result. Each statistic set is cut by itself: its images or positions are
// numbered from 0.
struct Patches {
  int64_t n, c, s;
  int64_t rows;       // images or positions of a patch
  int64_t segment;    // of each image, the values of a patch
  int64_t segments;   // patches an image is cut into
  int64_t count;      // patches in all
  int64_t per_chunk;  // patches of a chunk
  int64_t chunks;
  bool joined;  // vectors run along all planes of an image's tile

  BN_HD constexpr Extent extent(int64_t patch) const {
    const int64_t n0 = patch / segments * rows;
    const int64_t s0 = patch % segments * segment;
    return {n0, std::min(n0 + rows, n), s0, std::min(s0 + segment, s)};
  }

  // Values per channel in a chunk.
  BN_HD constexpr int64_t values(int64_t chunk) const {
    int64_t sum = 0;
    for (int64_t b = chunk * per_chunk; b < std::min((chunk + 1) * per_chunk, count); ++b) {
      sum += extent(b).count();
    }
    return sum;
  }

  bool operator==(const Patches&) const = default;

  BN_HD constexpr int64_t offset(int64_t n_, int64_t c_, int64_t s_) const { return (n_ * c + c_) * s + s_; }
};

struct Plan {
  Patches patches;  // of each statistic set but the last
  Patches last;     // of the last set, which may be smaller
  int64_t sets;
  int64_t tile;       // adjacent channels that are handled together
  int threads;        // that take part
  bool split;         // all threads share every tile, with a barrier between the passes; else each has tiles of its own
  bool bypass_cache;  // of the output, which is not read again soon
  bool whole_bytes;   // where a vector covers whole bytes of branch bits, every run of vectors does: no byte is shared
  int64_t ahead;      // elements from one that is written to the one whose input is fetched meanwhile; or 0

  bool operator==(const Plan&) const = default;

  const Patches& patches_of(int64_t set) const { return set + 1 < sets ? patches : last; }
  BN_HD constexpr int64_t tiles() const { return divide_up(patches.c, tile); }
};

// Planar and reducing: a thread takes whole tiles, so that the second pass finds in its cache what the first one
// read; few large channels are split. Interleaved: always split by position, because walking a channel down memory
// costs more than reading it twice in order (measured, 1568 x 2048 float: 42 against 33 cycles a vector). Without
// a reduction there is one pass, through memory in order. Of many statistic sets a thread takes whole ones.
Plan plan(const Pass& pass, int threads, int64_t last_cache_bytes);

// Every field, as name=value.
std::string to_string(const Plan& plan);

// Whether an output is too large for its reader to find it in the last cache.
bool bypasses_cache(int64_t output_bytes, int64_t last_cache_bytes);

}  // namespace bn::cpu
