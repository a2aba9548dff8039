#pragma once

#include "core/numbers.h"
#include "core/pass.h"

#include <array>
#include <cstdint>
#include <string>
#include <vector>

// How a problem is laid out on a GPU: a value from a pure function.
namespace bn::cuda {

// One access to memory moves these bytes.
constexpr int kPackBytes = 16;

// Registers suffice, 65536 / 512 a thread, for one such block on a multiprocessor, or for two of half the threads. Not
// measured.
constexpr int kMaxThreads = 512;

// The sizes of clusters: powers of two.
constexpr int kMaxCluster = 16;
constexpr int kClusterSizes = 4;  // 2, 4, 8, 16

// How many clusters are on a device at the same time, by size: their blocks have a multiprocessor alone, or one of two
// blocks' places on it. Their blocks have to be near each other, and so clusters may leave multiprocessors without
// work.
struct ClusterCounts {
  std::array<int, kClusterSizes> alone{};
  std::array<int, kClusterSizes> of_two{};

  bool operator==(const ClusterCounts&) const = default;
};

// The system's own share of a block's shared memory, in bytes.
constexpr int64_t kReserved = 1024;

// A device, as far as plans depend on it.
struct Limits {
  std::string name;
  int multiprocessors = 0;
  int64_t shared_per_block = 0;  // bytes, the most a block may ask for
  int64_t shared_per_multiprocessor = 0;
  int max_cluster = 1;  // blocks that can share their memory; 1: no clusters
  ClusterCounts clusters = {};
  int margin = 0;  // multiprocessors that grids leave to other kernels

  int for_grids() const { return margin < multiprocessors ? multiprocessors - margin : 1; }
  bool operator==(const Limits&) const = default;
};

// The counts where the multiprocessors are in groups of these numbers, and a cluster's blocks are in one group (GPC).
ClusterCounts clusters_in(const std::vector<int>& groups, int max_cluster);

// The limits of a GPU that tests and tables name. Throws std::invalid_argument for a name it does not know.
const Limits& named_limits(const std::string& name);

// Who shares the sums of a channel.
enum class Team {
  Block,    // nobody: a block has whole channels
  Cluster,  // the blocks of a cluster, through their shared memory
  Grid      // some of the blocks of a cooperative launch, through global memory
};

enum class Strategy {
  Elementwise,  // one pass: nothing is reduced, or nothing applied
  Small,        // one wave of blocks, each with whole channels
  Resident,     // two passes, the second one on chip
  Streaming     // two passes, the second one partly or wholly from memory, in reverse for the sake of the cache
};

// Where a block keeps what in its shared memory, in bytes; every part begins at a multiple of 16.
struct SharedLayout {
  int64_t partial;       // a double for each thread and lane
  int64_t totals;        // two for each channel: the block's sums
  int64_t sums;          // two for each channel: the team's
  int64_t references;    // up to three for each channel
  int64_t coefficients;  // up to five for each channel
  int64_t tile;          // packs that are held
};

BN_HD constexpr SharedLayout shared_layout(int channels, int threads, int lanes_summed, bool sums) {
  SharedLayout at{};
  if (!sums) {
    at.tile = round_up(int64_t{8} * 5 * channels, 16);
    return at;
  }
  at.totals = at.partial + round_up(int64_t{8} * threads * lanes_summed, 16);
  at.sums = at.totals + int64_t{8} * 2 * channels;
  at.references = at.sums + int64_t{8} * 2 * channels;
  at.coefficients = at.references + round_up(int64_t{8} * 3 * channels, 16);
  at.tile = at.coefficients + round_up(int64_t{8} * 5 * channels, 16);
  return at;
}

// Where the sums of a mask lie in memory, in bytes; every part begins at a multiple of 16.
struct MaskLayout {
  static constexpr int64_t kCounted = 8 * 3;
  static constexpr int64_t kSamples = 8 * 3;
  static constexpr int64_t kSums = 8 * 6;

  int64_t counted;   // of each set, then of all
  int64_t samples;   // of each set
  int64_t arrivals;  // of each set, then of all
  int64_t sums;      // of each part of each set
  int64_t bytes;     // of all that
};

// A slab is a run of adjacent channels of a statistic set: in memory, rows of up to channels * s contiguous values, one
// for each image or position. Rows are cut into packs of 16 bytes, numbered row by row; each block of the slab's team
// has a run of `share` packs, and of those each of `active` threads every active-th.
struct LaunchPlan {
  Strategy strategy{};
  Team team{};
  bool sums = true;  // over each channel
  int channels = 1;  // of a slab
  int width = 1;     // packs of a row
  int threads = 0;
  int active = 0;
  int64_t sets = 1;
  int64_t slabs = 0;  // of all sets
  int64_t teams = 0;
  int team_blocks = 1;
  int64_t share = 0;
  int held = 0;                  // packs that each thread keeps on chip ...
  int tensors_held = 0;          // ... of each of the first tensors
  int mask_parts = 0;            // blocks that add up the mask of a set; 0: its sums are not needed
  bool zeroed_branches = false;  // bits are added to those of others in a byte: the branch bits have to be zero before
  int64_t shared_bytes = 0;
  int64_t workspace_bytes = 0;
  int64_t bytes_moved = 0;    // to and from memory, were there no cache, branch bits included
  int64_t bytes_on_chip = 0;  // kept between the passes by all blocks that are there at the same time

  bool operator==(const LaunchPlan&) const = default;
  int64_t blocks() const { return teams * team_blocks; }
  // A thread stays in one column of packs, each lane of which sums a channel of its own.
  bool per_lane() const { return channels > 1; }
  // The workspace begins with a count for each team.
  int64_t arrivals_bytes() const { return round_up(int64_t{4} * teams, 16); }
  // The workspace goes on with a count for each run of channels, of the sets that are finished, if there are several.
  int64_t finished_bytes() const { return sets == 1 ? 0 : round_up(int64_t{4} * (slabs / sets), 16); }
  // The workspace ends with the sums of the mask.
  MaskLayout mask_layout() const {
    MaskLayout at{};
    at.samples = round_up(MaskLayout::kCounted * (sets + 1), 16);
    at.arrivals = at.samples + round_up(MaskLayout::kSamples * sets, 16);
    at.sums = at.arrivals + round_up(int64_t{4} * (sets + 1), 16);
    at.bytes = at.sums + MaskLayout::kSums * sets * mask_parts;
    return at;
  }
  SharedLayout layout(int lanes) const { return shared_layout(channels, threads, per_lane() ? lanes : 1, sums); }
};

// Throws std::length_error for a problem that is beyond all memories.
LaunchPlan plan(const Pass& pass, const Limits& limits);

const char* name_of(Strategy strategy);
const char* name_of(Team team);

// Every field, as name=value.
std::string to_string(const LaunchPlan& plan);

}  // namespace bn::cuda
