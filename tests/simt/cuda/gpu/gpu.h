#pragma once

// The functions of csrc/cuda/gpu/gpu.h, for kernels that run on the CPU.

#include "../../scheduler.h"

#include <cstring>
#include <type_traits>

#define BN_DEVICE inline
#define BN_KERNEL(threads) void

namespace bn::gpu {

using simt::kWarp;
using simt::LaunchShape;
using simt::Site;

constexpr unsigned kAllLanes = 0xffffffff;

BN_DEVICE int thread() {
  return simt::residents->running().index;
}
BN_DEVICE int threads() {
  return simt::residents->running().block->threads;
}
BN_DEVICE int block() {
  return static_cast<int>(simt::residents->running().block->index);
}

BN_DEVICE void sync_block(Site site = Site::current()) {
  simt::residents->arrive(simt::Scope::Block, "sync_block", site);
}
BN_DEVICE void sync_cluster(Site site = Site::current()) {
  simt::residents->arrive(simt::Scope::Cluster, "sync_cluster", site);
}
BN_DEVICE void arrive_cluster(Site site = Site::current()) {
  simt::residents->arrive_to_part("arrive_cluster", site);
}
BN_DEVICE void wait_cluster(Site site = Site::current()) {
  simt::residents->wait_to_part("wait_cluster", site);
}
BN_DEVICE void sync_grid(Site site = Site::current()) {
  simt::residents->arrive(simt::Scope::Grid, "sync_grid", site);
}
BN_DEVICE void sync_blocks(unsigned* counter, unsigned arrivals, Site site = Site::current()) {
  const auto sync = [site] { simt::residents->arrive(simt::Scope::Block, "sync_blocks", site); };
  sync();
  if (thread() == 0) {
    ++*counter;
    simt::residents->wait_for(counter, arrivals, "sync_blocks", site);
  }
  sync();
}

BN_DEVICE bool last_to_arrive(unsigned* counter, unsigned arrivals, Site site = Site::current()) {
  simt::Block& own = *simt::residents->running().block;
  const auto sync = [site] { simt::residents->arrive(simt::Scope::Block, "last_to_arrive", site); };
  sync();
  if (thread() == 0) {
    own.arrived_last = ++*counter == arrivals;
  }
  sync();
  return own.arrived_last;
}

template <class T>
BN_DEVICE T load_written(const T* p) {
  simt::residents->yield();
  return *p;
}

BN_DEVICE unsigned long long atomic_add(unsigned long long* p, unsigned long long value) {
  simt::residents->yield();
  const unsigned long long old = *p;
  *p += value;
  return old;
}

BN_DEVICE void atomic_or(unsigned* p, unsigned bits) {
  simt::residents->yield();
  *p |= bits;
}

template <class T>
BN_DEVICE T shuffle_xor(unsigned lanes, T value, int lane_mask, Site site = Site::current()) {
  static_assert(std::is_trivially_copyable_v<T>);
  const int from = thread() % kWarp ^ lane_mask;
  if (from < 0 || from >= kWarp || (lanes >> from & 1) == 0) {
    simt::residents->fail("shuffle_xor from lane " + std::to_string(from) + ", which `lanes` does not name", site);
  }
  T taken = value;
  simt::residents->exchange(
      lanes, &value, [&taken, from](simt::Values values) { std::memcpy(&taken, values[from], sizeof(T)); },
      "shuffle_xor", site);
  return taken;
}

BN_DEVICE unsigned ballot(unsigned lanes, bool vote, Site site = Site::current()) {
  unsigned votes = 0;
  const auto count = [&votes](simt::Values values) {
    for (int lane = 0; lane < kWarp; ++lane) {
      votes |= values[lane] != nullptr && *static_cast<const bool*>(values[lane]) ? 1U << lane : 0;
    }
  };
  simt::residents->exchange(lanes, &vote, count, "ballot", site);
  return votes;
}

template <class T>
class Shared {
 public:
  Shared(simt::Block* block, int64_t offset) : block_(block), offset_(offset) {}

  T read(int i, Site site = Site::current()) const {
    T value;
    std::memcpy(&value, at(i, simt::Access::Read, site), sizeof(T));
    return value;
  }
  void write(int i, const T& value, Site site = Site::current()) const {
    std::memcpy(at(i, simt::Access::Write, site), &value, sizeof(T));
  }

  Shared of_block(int rank, Site site = Site::current()) const {
    return Shared(simt::block_of_cluster(rank, site), offset_);
  }

 private:
  static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= 16);

  void* at(int i, simt::Access kind, Site site) const {
    return simt::access(block_, offset_, i, sizeof(T), kind, site);
  }

  simt::Block* block_;
  int64_t offset_;
};

template <class T>
BN_DEVICE Shared<T> shared_array(int64_t offset, Site site = Site::current()) {
  return Shared<T>(simt::own_block(offset, site), offset);
}

using Stream = void*;

inline void set_to_zero(void* memory, int64_t bytes, Stream) {
  std::memset(memory, 0, static_cast<size_t>(bytes));
}

template <class Args>
void launch(const char* name, void (*kernel)(Args), const LaunchShape& shape, Stream, const Args& args) {
  simt::launch(name, shape, [&] { kernel(args); });
}

}  // namespace bn::gpu
