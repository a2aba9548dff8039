#include "cuda/plan.h"

#include <algorithm>
#include <array>
#include <bit>
#include <numeric>
#include <sstream>
#include <stdexcept>

namespace bn::cuda {
namespace {

constexpr int kThreadsAlone = kMaxThreads;
constexpr int kThreadsOfTwo = kMaxThreads / 2;
constexpr int kWarp = 32;

// Bits of a byte.
constexpr int kByte = 8;

// Runs of a row that memory serves without waste.
constexpr int64_t kLine = 64;

// A slab's sums and coefficients take 96 bytes a channel of every block's shared memory.
constexpr int64_t kMaxChannels = 256;

// Packs a thread should have: enough loads under way to cover the latency of memory, and enough work to pay for the
// start of a block.
constexpr int64_t kPacksPerThread = 8;

// The system's own share of a block's shared memory.
constexpr int64_t kReserved = 1024;

// Packs of a row, and of a block, are counted in 31 bits.
constexpr int64_t kMaxPacks = int64_t{1} << 30;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

constexpr int64_t power_of_two(int64_t at_least) {
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(at_least)));
}

// One problem's plan in the making.
class Planner {
 public:
  Planner(const Problem& problem, const Work& work, const Limits& limits)
      : problem_(problem),
        work_(work),
        limits_(limits),
        lanes_(static_cast<int>(kPackBytes / size_of(problem.dtype))),
        grain_(work.bits && problem.c * problem.s % kByte == 0 ? kByte : lanes_) {
    plan_.sums = work.summed.tensors > 0;
    plan_.tensors_held = plan_.sums ? work.held : 0;
  }

  LaunchPlan make() {
    if (work_.summed.tensors == 0) {
      make_elementwise();
    } else {
      make_reducing();
    }
    plan_.zeroed_mask = work_.besides.mask && !cut_into_bytes();
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

  // Whether no row of a slab and no block's share ends within a byte of a mask, and the mask itself with the last row.
  bool cut_into_bytes() const {
    return fills_mask(problem_.count() * problem_.c) && problem_.c * problem_.s % kByte == 0 &&
           (plan_.slabs == 1 || plan_.channels * problem_.s % kByte == 0) &&
           (plan_.team_blocks == 1 || plan_.share * lanes_ % kByte == 0);
  }

  int64_t width_of(int64_t channels) const { return divide_up(channels * problem_.s, lanes_); }
  int64_t slabs_of(int64_t channels) const { return divide_up(problem_.c, channels); }

  void set_channels(int64_t channels) {
    const int64_t width = width_of(channels);
    if (width > kMaxPacks) {
      throw std::length_error("bn_ext: no plan for planes of " + std::to_string(problem_.s) + " values");
    }
    plan_.channels = static_cast<int>(channels);
    plan_.width = static_cast<int>(width);
    plan_.slabs = slabs_of(channels);
  }

  // A team of so many blocks for each slab, and threads for as many packs as a block then has, at the most `threads`.
  void set_team(Team team, int64_t blocks, int threads) {
    plan_.team = team;
    plan_.team_blocks = static_cast<int>(blocks);
    plan_.share = round_up(divide_up(packs(), blocks), unit());
    plan_.threads = static_cast<int>(std::min<int64_t>(threads, round_up(std::max(plan_.share, unit()), kWarp)));
    plan_.active = static_cast<int>(active_of(plan_.threads));
    plan_.teams = plan_.slabs;
    if (plan_.share + plan_.width > 2 * kMaxPacks - kMaxThreads || plan_.slabs > kMaxBlocks / blocks) {
      throw std::length_error("bn_ext: no plan for " + std::to_string(problem_.count()) + " values per channel");
    }
  }

  int64_t packs() const { return problem_.n * plan_.width; }

  // Rows as long as a block is wide, in pieces: nothing ties them together.
  void make_elementwise() {
    const int64_t fewest = fewest_channels();
    int64_t channels = fewest;
    while (channels > 1 && channels + fewest <= std::min(kMaxChannels, problem_.c) &&
           width_of(channels + fewest) <= kThreadsOfTwo) {
      channels += fewest;
    }
    const int64_t even = round_up(divide_up(problem_.c, slabs_of(channels)), fewest);
    set_channels(std::min(even, channels));
    plan_.strategy = Strategy::Elementwise;
    set_team(Team::Block, divide_up(packs(), kPacksPerThread * kThreadsOfTwo), kThreadsOfTwo);
  }

  void make_reducing() {
    choose_channels();
    const int64_t cluster = limits_.max_cluster;
    const int64_t pairs = 2 * limits_.multiprocessors;
    const int64_t needed = blocks_to_hold(kThreadsOfTwo);
    const int64_t needed_alone = blocks_to_hold(kThreadsAlone);
    const int64_t useful = std::max(packs() / (kPacksPerThread * kThreadsOfTwo), needed);
    const int64_t wanted = std::max(needed, std::min(divide_up(pairs, plan_.slabs), useful));
    const int64_t size = power_of_two(std::min(wanted, cluster));
    const int64_t size_alone =
        power_of_two(std::min(std::max(needed_alone, divide_up(pairs / 2, plan_.slabs)), cluster));
    const auto busy = [&](int64_t blocks) { return blocks >= useful || plan_.slabs * blocks >= pairs / 2; };
    if (wanted == 1) {
      set_team(Team::Block, 1, kThreadsOfTwo);
    } else if (cluster > 1 && needed <= size && busy(size)) {
      set_team(Team::Cluster, size, kThreadsOfTwo);
    } else if (cluster > 1 && needed_alone <= size_alone && busy(size_alone)) {
      set_team(Team::Cluster, size_alone, kThreadsAlone);
    } else if (needed <= pairs) {
      share_grid(needed, useful, pairs, kThreadsOfTwo);
    } else {
      share_grid(needed_alone, needed_alone, limits_.multiprocessors, kThreadsAlone);
    }
    hold();
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

  // Teams of a cooperative launch, of at least `needed` blocks and not more than are `useful`: as many as are there at
  // the same time, each with as many slabs as the others.
  void share_grid(int64_t needed, int64_t useful, int64_t resident, int threads) {
    const int64_t rounds = divide_up(plan_.slabs, std::max<int64_t>(resident / needed, 1));
    const int64_t teams = divide_up(plan_.slabs, rounds);
    const int64_t blocks = std::min(resident / teams, useful);
    if (blocks == 1) {
      set_team(Team::Block, 1, threads);
      return;
    }
    set_team(Team::Grid, blocks, threads);
    plan_.teams = teams;
  }

  int64_t tile_bytes(int64_t channels) const { return problem_.n * width_of(channels) * kPackBytes * work_.tensors; }

  // Shared memory that is left for a tile in a block that is alone, or one of two.
  int64_t room(int64_t channels, int threads) const {
    const int64_t block = threads == kThreadsAlone
                              ? limits_.shared_per_block
                              : std::min(limits_.shared_per_multiprocessor / 2 - kReserved, limits_.shared_per_block);
    return block - shared_layout(static_cast<int>(channels), threads, channels > 1 ? lanes_ : 1, true).tile;
  }

  // Each thread holds whole packs, so a block holds what its threads can share evenly.
  int64_t packs_held(int threads) const {
    return room(plan_.channels, threads) / (kPackBytes * threads * work_.tensors) * active_of(threads);
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
    if (work_.besides.tensors == 0) {
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
    if (plan_.team == Team::Grid) {
      plan_.workspace_bytes = plan_.arrivals_bytes() + int64_t{8} * 4 * plan_.blocks() * plan_.channels;
    }
    const int64_t values = problem_.count() * problem_.c;
    const int64_t tensor = values * size_of(problem_.dtype);
    const double held = static_cast<double>(plan_.held * plan_.active) / static_cast<double>(plan_.share);
    const auto held_of = [&](int64_t bytes) {
      return static_cast<int64_t>(static_cast<double>(bytes) * std::min(held, 1.0));
    };
    const int64_t mask = divide_up(values, kByte);
    const auto bytes = [&](const Traffic& t) { return t.tensors * tensor + (t.mask ? mask : 0); };
    const int64_t spared = work_.applied.tensors * held_of(tensor) + (work_.applied.mask ? held_of(mask) : 0);
    plan_.bytes_moved = bytes(work_.summed) + bytes(work_.applied) - spared + bytes(work_.besides);
    const int64_t kept = plan_.tensors_held * held_of(tensor);
    const int64_t at_once = std::min<int64_t>(limits_.shared_per_multiprocessor / (plan_.shared_bytes + kReserved),
                                              kThreadsAlone / plan_.threads);
    const int64_t blocks = std::min(plan_.blocks(), at_once * limits_.multiprocessors);
    plan_.bytes_on_chip = std::min(kept, blocks * plan_.held * plan_.active * kPackBytes * plan_.tensors_held);
  }

  const Problem& problem_;
  const Work& work_;
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
  // CUDA C++ Programming Guide, technical specifications per compute capability.
  static const std::array<Limits, 6> known = {{
      {"t4", 40, 64_KiB, 64_KiB, 1},
      {"a100", 108, 163_KiB, 164_KiB, 1},
      {"rtx4090", 128, 99_KiB, 100_KiB, 1},
      {"h100", 132, 227_KiB, 228_KiB, 16},
      {"b200", 148, 227_KiB, 228_KiB, 16},
      {"rtx5090", 170, 99_KiB, 100_KiB, 8},
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

LaunchPlan plan(const Problem& problem, const Work& work, const Limits& limits) {
  return Planner(problem, work, limits).make();
}

const char* name_of(Strategy strategy) {
  constexpr const char* kNames[] = {"elementwise", "small", "resident", "streaming"};
  return kNames[static_cast<int>(strategy)];
}

const char* name_of(Team team) {
  constexpr const char* kNames[] = {"block", "cluster", "grid"};
  return kNames[static_cast<int>(team)];
}

std::string to_string(const LaunchPlan& p) {
  std::ostringstream out;
  out << name_of(p.strategy) << ": " << p.slabs << " slabs of " << p.channels << " channels, " << p.teams
      << " teams of " << p.team_blocks << " blocks (" << name_of(p.team) << ") of " << p.threads << " threads, "
      << p.held << " of " << divide_up(p.share, p.active) << " packs held, " << p.shared_bytes << " bytes shared, "
      << p.bytes_moved << " bytes moved, " << p.bytes_on_chip << " on chip";
  return out.str();
}

}  // namespace bn::cuda
