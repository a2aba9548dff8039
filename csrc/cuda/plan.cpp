#include "cuda/plan.h"

#include "core/text.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace bn::cuda {
namespace {

// The threads of a block that has a multiprocessor alone, and of one of two blocks on it. Not measured.
constexpr int kThreadsAlone = kMaxThreads;
constexpr int kThreadsOfTwo = kMaxThreads / 2;
constexpr int kWarp = 32;

// Bits of a byte.
constexpr int kByte = 8;

// Runs of a row that memory serves without waste.
constexpr int64_t kLine = 64;

// A slab's sums and coefficients take 96 bytes a channel of every block's shared memory. Not measured.
constexpr int64_t kMaxChannels = 256;

// Packs a thread should have: enough loads under way to cover the latency of memory, and enough work to pay for the
// start of a block. Not measured.
constexpr int64_t kPacksPerThread = 8;

// In a wave of blocks a multiprocessor could move so many bytes while it starts, adds up and finishes, and moves none:
// 3.6 microseconds of an H100's by docs/gpu_model.md. In later waves one of two blocks hides a part of it. Not
// measured.
constexpr double kIdleBytes = 80 << 10;
constexpr double kHidden = 0.3;

// The barrier of a grid takes so much longer than that of a cluster. The cache gives a multiprocessor's share of its
// rate, over the rate of memory. A grid has to be faster than blocks or clusters by this factor. By the same page.
constexpr double kGridIdleBytes = 12 << 10;
constexpr double kCacheRate = 1.8;
constexpr double kGridsLoss = 1.2;

constexpr double kNever = std::numeric_limits<double>::infinity();

// The numbers of a mask that one block adds up, unless blocks become many. Not measured.
constexpr int64_t kMaskShare = int64_t{1} << 13;
constexpr int64_t kMaxMaskParts = 256;

// Packs of a row, and of a block, are counted in 31 bits.
constexpr int64_t kMaxPacks = int64_t{1} << 30;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

constexpr int64_t power_of_two(int64_t at_least) {
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(at_least)));
}

// One pass's plan in the making.
class Planner {
 public:
  Planner(const Pass& pass, const Limits& limits)
      : pass_(pass),
        problem_(pass.problem),
        limits_(limits),
        lanes_(static_cast<int>(kPackBytes / size_of(problem_.dtype))),
        grain_(pass.may_write_branches() && problem_.c * problem_.s % kByte == 0 ? kByte : lanes_) {
    plan_.sums = pass.reduces();
    plan_.sets = problem_.sets();
    plan_.tensors_held = plan_.sums ? pass.holds() : 0;
  }

  LaunchPlan make() {
    if (plan_.sums) {
      make_reducing();
    } else {
      make_elementwise();
    }
    if (pass_.counts_masked()) {
      plan_.mask_parts = static_cast<int>(std::min(divide_up(problem_.count_of(0), kMaskShare), kMaxMaskParts));
    }
    plan_.zeroed_branches = pass_.writes().branches && !cut_into_bytes();
    count_bytes();
    return plan_;
  }

 private:
  // The fewest adjacent channels whose rows are lines, and whole grains where that is possible; or 1, where rows are
  // so long that a thread would not stay in one column.
  int64_t fewest_channels() const {
    const int64_t s = problem_.s;
    const bool rows_align = problem_.c * s % grain_ == 0;
    const int64_t step = rows_align ? grain_ / std::gcd(s, int64_t{grain_}) : 1;
    const int64_t lines = divide_up(kLine, s * size_of(problem_.dtype));
    const int64_t channels = std::min(round_up(lines, step), problem_.c);
    return width_of(channels) <= kThreadsOfTwo ? channels : 1;
  }

  // Whether no row of a slab and no block's share ends within a byte of branch bits, and the last byte with the last
  // row.
  bool cut_into_bytes() const {
    return fills_branch_words(problem_.count() * problem_.c) && problem_.c * problem_.s % kByte == 0 &&
           (plan_.channels == problem_.c || plan_.channels * problem_.s % kByte == 0) &&
           (plan_.team_blocks == 1 || plan_.share * lanes_ % kByte == 0);
  }

  int64_t width_of(int64_t channels) const { return divide_up(channels * problem_.s, lanes_); }
  int64_t slabs_of(int64_t channels) const { return plan_.sets * divide_up(problem_.c, channels); }

  void set_channels(int64_t channels) {
    const int64_t width = width_of(channels);
    if (width > kMaxPacks) {
      throw std::length_error("bn_ext: no plan for planes of " + std::to_string(problem_.s) + " values");
    }
    plan_.channels = static_cast<int>(channels);
    plan_.width = static_cast<int>(width);
    plan_.slabs = slabs_of(channels);
  }

  // A team of so many blocks for each slab, and threads for as many packs as a block then has, at the most `threads`,
  // and for every channel, of which one finishes each.
  void set_team(Team team, int64_t blocks, int threads) {
    plan_.team = team;
    plan_.team_blocks = static_cast<int>(blocks);
    plan_.share = round_up(divide_up(packs(), blocks), unit());
    plan_.threads = static_cast<int>(
        std::min<int64_t>(threads, round_up(std::max({plan_.share, unit(), int64_t{plan_.channels}}), kWarp)));
    plan_.active = static_cast<int>(active_of(plan_.threads));
    plan_.teams = plan_.slabs;
    if (plan_.share + plan_.width > 2 * kMaxPacks - kMaxThreads || plan_.slabs > kMaxBlocks / blocks) {
      throw std::length_error("bn_ext: no plan for " + std::to_string(problem_.count()) + " values per channel");
    }
  }

  // The packs of a slab; a slab of the last set may have fewer.
  int64_t packs() const { return problem_.rows_of(0) * plan_.width; }

  // Rows as long as a block is wide, in pieces: nothing ties them together.
  void make_elementwise() {
    const int64_t fewest = fewest_channels();
    int64_t channels = fewest;
    while (channels > 1 && channels + fewest <= std::min(kMaxChannels, problem_.c) &&
           width_of(channels + fewest) <= kThreadsOfTwo) {
      channels += fewest;
    }
    const int64_t even = round_up(divide_up(problem_.c, divide_up(problem_.c, channels)), fewest);
    set_channels(std::min(even, channels));
    plan_.strategy = Strategy::Elementwise;
    set_team(Team::Block, divide_up(packs(), kPacksPerThread * kThreadsOfTwo), kThreadsOfTwo);
  }

  // Blocks or clusters that hold their slabs and keep the device busy: those that take the least time. A grid has the
  // device to itself, and waits for all of it: only where it is clearly faster.
  void make_reducing() {
    choose_channels();
    const int64_t needed = blocks_to_hold(kThreadsOfTwo);
    const int64_t needed_alone = blocks_to_hold(kThreadsAlone);
    const int64_t useful = std::max(packs() / (kPacksPerThread * kThreadsOfTwo), needed);
    double least = kNever;
    for (const auto& [threads, least_blocks] : {std::pair(kThreadsOfTwo, needed), {kThreadsAlone, needed_alone}}) {
      const int64_t most = std::min<int64_t>(limits_.max_cluster, power_of_two(std::max(useful, least_blocks)));
      for (int64_t blocks = power_of_two(least_blocks); blocks <= most; blocks *= 2) {
        const bool busy = blocks >= useful || plan_.slabs * blocks >= limits_.multiprocessors;
        if (const double time = time_of(blocks, threads, at_once(blocks, threads)); busy && time < least) {
          least = time;
          set_team(blocks == 1 ? Team::Block : Team::Cluster, blocks, threads);
        }
      }
    }
    const int64_t alone = limits_.for_grids();
    const Grid grid = needed <= 2 * alone ? grid_of(needed, useful, 2 * alone, kThreadsOfTwo)
                                          : grid_of(needed_alone, needed_alone, alone, kThreadsAlone);
    if (kGridsLoss * time_of(grid) < least || least == kNever) {
      set_grid(grid);
    }
    hold();
  }

  // The teams of so many blocks that are on the device at the same time.
  int64_t at_once(int64_t blocks, int threads) const {
    const bool alone = threads == kThreadsAlone;
    if (blocks == 1) {
      return alone ? limits_.multiprocessors : 2 * limits_.multiprocessors;
    }
    const auto size = static_cast<size_t>(std::bit_width(static_cast<uint64_t>(blocks)) - 2);
    return alone ? limits_.clusters.alone[size] : limits_.clusters.of_two[size];
  }

  // The time of all waves, of at most so many teams of so many blocks, as the bytes that a multiprocessor could move
  // meanwhile. One that has less than its blocks is as fast as if it had all, so that a wave takes no less than one
  // block does there. `meeting` is what teams take besides to add up.
  double time_of(int64_t blocks, int threads, int64_t teams, double meeting = 0) const {
    if (teams == 0) {
      return kNever;
    }
    const double moved = static_cast<double>(divide_up(packs(), blocks) * kPackBytes * (pass_.most_held() + 1));
    const auto wave = [&](int64_t of) {
      return moved * std::max(1.0, static_cast<double>(of * blocks) / limits_.multiprocessors);
    };
    const int64_t waves = divide_up(plan_.slabs, teams);
    const double idle = kIdleBytes + meeting;
    const double hidden = threads == kThreadsAlone || teams == 1 ? 0 : kHidden;
    return static_cast<double>(waves - 1) * (wave(teams) + (1 - hidden) * idle) +
           wave(plan_.slabs - (waves - 1) * teams) + idle;
  }

  // Teams of a cooperative launch.
  struct Grid {
    int64_t teams;
    int64_t blocks;  // of each
    int threads;
    bool holds;  // whole slabs
  };

  // Every block of a team reads the sums of all others, from a cache that is shared by all multiprocessors.
  double time_of(const Grid& grid) const {
    const double read = 16.0 * plan_.channels * grid.blocks * grid.blocks * grid.teams;
    const double meeting = kGridIdleBytes + read / (kCacheRate * limits_.multiprocessors);
    return grid.holds ? time_of(grid.blocks, grid.threads, grid.teams, meeting) : kNever;
  }

  // Wider rows while a tile still fits into a block and there are blocks for every multiprocessor.
  void choose_channels() {
    const int64_t fewest = fewest_channels();
    int64_t channels = fewest;
    const auto suits = [&](int64_t c) {
      return c <= std::min(kMaxChannels, problem_.c) && width_of(c) <= kThreadsOfTwo &&
             slabs_of(c) >= 2 * limits_.multiprocessors && tile_bytes(c) <= room(c, kThreadsOfTwo);
    };
    while (channels > 1 && suits(2 * channels)) {
      channels *= 2;
    }
    set_channels(channels);
  }

  // Teams of at least `needed` blocks and not more than are `useful`: as many as are resident at the same time, each
  // with as many slabs as the others.
  Grid grid_of(int64_t needed, int64_t useful, int64_t resident, int threads) const {
    const int64_t rounds = divide_up(plan_.slabs, std::max<int64_t>(resident / needed, 1));
    const int64_t teams = divide_up(plan_.slabs, rounds);
    const int64_t blocks = std::min(resident / teams, useful);
    return {teams, blocks, threads, blocks >= needed};
  }

  void set_grid(const Grid& grid) {
    if (grid.blocks == 1) {
      set_team(Team::Block, 1, grid.threads);
      return;
    }
    set_team(Team::Grid, grid.blocks, grid.threads);
    plan_.teams = grid.teams;
  }

  int64_t tile_bytes(int64_t channels) const {
    return problem_.rows_of(0) * width_of(channels) * kPackBytes * pass_.most_held();
  }

  // Shared memory that is left for a tile in a block that is alone, or one of two.
  int64_t room(int64_t channels, int threads) const {
    const int64_t block = threads == kThreadsAlone
                              ? limits_.shared_per_block
                              : std::min(limits_.shared_per_multiprocessor / 2 - kReserved, limits_.shared_per_block);
    return block - shared_layout(static_cast<int>(channels), threads, channels > 1 ? lanes_ : 1, true).tile;
  }

  // Each thread holds whole packs, so a block holds what its threads can share evenly.
  int64_t packs_held(int threads) const {
    return room(plan_.channels, threads) / (kPackBytes * threads * pass_.most_held()) * active_of(threads);
  }
  int64_t blocks_to_hold(int threads) const { return divide_up(packs(), std::max<int64_t>(packs_held(threads), 1)); }
  // Where a thread stays in its column, blocks begin with a row and take steps of whole rows.
  int64_t unit() const { return plan_.per_lane() ? plan_.width : grain_ / lanes_; }
  int64_t active_of(int64_t threads) const { return threads / unit() * unit(); }

  void hold() {
    const int64_t most = divide_up(plan_.share, plan_.active);
    const int64_t bytes = kPackBytes * plan_.threads * std::max(plan_.tensors_held, 1);
    const int64_t held = plan_.tensors_held == 0 ? 0 : std::min(most, room(plan_.channels, plan_.threads) / bytes);
    plan_.held = static_cast<int>(std::max<int64_t>(held, 0));
    if (!pass_.applies()) {
      plan_.strategy = Strategy::Elementwise;
    } else if (held < most) {
      plan_.strategy = Strategy::Streaming;
    } else {
      const bool small = plan_.team == Team::Block && plan_.slabs <= limits_.multiprocessors;
      plan_.strategy = small ? Strategy::Small : Strategy::Resident;
    }
  }

  void count_bytes() {
    plan_.shared_bytes = plan_.layout(lanes_).tile + kPackBytes * plan_.threads * plan_.held * plan_.tensors_held;
    if (plan_.team == Team::Grid || plan_.sets > 1) {
      plan_.workspace_bytes = plan_.arrivals_bytes() + plan_.finished_bytes();
    }
    if (plan_.team == Team::Grid) {
      plan_.workspace_bytes += int64_t{8} * 4 * plan_.blocks() * plan_.channels;
    }
    if (plan_.mask_parts > 0) {
      plan_.workspace_bytes += plan_.mask_layout().bytes;
    }
    const int64_t values = problem_.count() * problem_.c;
    const int64_t tensor = values * size_of(problem_.dtype);
    const double held = static_cast<double>(plan_.held * plan_.active) / static_cast<double>(plan_.share);
    const auto held_of = [&](int64_t bytes) {
      return static_cast<int64_t>(static_cast<double>(bytes) * std::min(held, 1.0));
    };
    const int64_t branches = divide_up(values, kByte);
    const auto bytes = [&](const Traffic& t) { return t.tensors * tensor + (t.branches ? branches : 0); };
    const Traffic held_on_chip = pass_.spared_by_holding();
    const int64_t spared = held_on_chip.tensors * held_of(tensor) + (held_on_chip.branches ? held_of(branches) : 0);
    plan_.bytes_moved = bytes(pass_.reduce_reads()) + bytes(pass_.apply_reads()) - spared + bytes(pass_.writes());
    const int64_t kept = plan_.tensors_held * held_of(tensor);
    const int64_t at_once = std::min<int64_t>(limits_.shared_per_multiprocessor / (plan_.shared_bytes + kReserved),
                                              kThreadsAlone / plan_.threads);
    const int64_t blocks = std::min(plan_.blocks(), at_once * limits_.multiprocessors);
    plan_.bytes_on_chip = std::min(kept, blocks * plan_.held * plan_.active * kPackBytes * plan_.tensors_held);
  }

  const Pass& pass_;
  const Problem& problem_;
  const Limits& limits_;
  int lanes_;
  int grain_;  // values that slabs are cut into
  LaunchPlan plan_;
};

constexpr int64_t operator""_KiB(unsigned long long n) {
  return static_cast<int64_t>(n) << 10;
}

}  // namespace

const Limits& named_limits(const std::string& name) {
  // CUDA C++ Programming Guide, technical specifications per compute capability. Of an H100's multiprocessors, clusters
  // of 8 blocks that have one alone use 120 (github.com/accel-sim/gpu-app-collection, issue 87), as in these groups. Of
  // later GPUs no groups are known.
  static const std::array<Limits, 6> known = {{
      {"t4", 40, 64_KiB, 64_KiB, 1},
      {"a100", 108, 163_KiB, 164_KiB, 1},
      {"rtx4090", 128, 99_KiB, 100_KiB, 1},
      {"h100", 132, 227_KiB, 228_KiB, 16, clusters_in({18, 18, 18, 16, 16, 16, 16, 14}, 16)},
      {"b200", 148, 227_KiB, 228_KiB, 16, clusters_in({148}, 16)},
      {"rtx5090", 170, 99_KiB, 100_KiB, 8, clusters_in({170}, 8)},
  }};
  for (const Limits& limits : known) {
    if (limits.name == name) {
      return limits;
    }
  }
  std::string names;
  for (const Limits& limits : known) {
    names += (names.empty() ? "" : ", ") + limits.name;
  }
  throw std::invalid_argument("bn_ext: no limits of a GPU named " + name + ", there are " + names);
}

ClusterCounts clusters_in(const std::vector<int>& groups, int max_cluster) {
  ClusterCounts counts;
  for (size_t i = 0, size = 2; size <= static_cast<size_t>(max_cluster); ++i, size *= 2) {
    for (const int multiprocessors : groups) {
      counts.alone[i] += multiprocessors / static_cast<int>(size);
      counts.of_two[i] += 2 * multiprocessors / static_cast<int>(size);
    }
  }
  return counts;
}

LaunchPlan plan(const Pass& pass, const Limits& limits) {
  return Planner(pass, limits).make();
}

const char* name_of(Strategy strategy) {
  constexpr const char* kNames[] = {"elementwise", "small", "resident", "streaming"};
  return kNames[static_cast<int>(strategy)];
}

const char* name_of(Team team) {
  constexpr const char* kNames[] = {"block", "cluster", "grid"};
  return kNames[static_cast<int>(team)];
}

std::string to_string(const LaunchPlan& plan) {
  // All fields are named: a new one is an error here.
  const auto& [strategy, team, sums, channels, width, threads, active, sets, slabs, teams, team_blocks, share, held,
               tensors_held, mask_parts, zeroed_branches, shared_bytes, workspace_bytes, bytes_moved, bytes_on_chip] =
      plan;
  return fields({{"strategy", name_of(strategy)},
                 {"team", name_of(team)},
                 {"sums", sums},
                 {"channels", channels},
                 {"width", width},
                 {"threads", threads},
                 {"active", active},
                 {"sets", sets},
                 {"slabs", slabs},
                 {"teams", teams},
                 {"team_blocks", team_blocks},
                 {"share", share},
                 {"held", held},
                 {"tensors_held", tensors_held},
                 {"mask_parts", mask_parts},
                 {"zeroed_branches", zeroed_branches},
                 {"shared_bytes", shared_bytes},
                 {"workspace_bytes", workspace_bytes},
                 {"bytes_moved", bytes_moved},
                 {"bytes_on_chip", bytes_on_chip}});
}

}  // namespace bn::cuda
