#include "shared_memory.h"

#include "scheduler.h"

namespace bn::simt {
namespace {

// Records an access to a byte. Returns what is wrong with it, or an empty string.
std::string note(SharedMemory::Traces& traces, const Trace& now, Access kind) {
  const auto unordered = [](const Trace& trace) { return trace && !residents->is_ordered(trace); };
  const auto race = [](const Trace& trace, const char* verb) {
    return ", which " + residents->name(trace) + verb + " with no barrier between";
  };
  if (unordered(traces.write)) {
    return race(traces.write, " wrote");
  }
  if (kind == Access::Read) {
    for (Trace& read : traces.reads) {
      if (!unordered(read)) {
        read = now;
        break;
      }
    }
    return traces.write ? "" : ", which nothing wrote";
  }
  for (const Trace& read : traces.reads) {
    if (unordered(read)) {
      return race(read, " read");
    }
  }
  traces.write = now;
  return "";
}

}  // namespace

void* access(Block* block, int64_t offset, int64_t index, int64_t size, Access kind, Site site) {
  Residents& all = *residents;
  all.maybe_yield();
  const Block& mine = *all.running().block;
  SharedMemory& memory = block->memory;
  const int64_t begin = offset + index * size;
  const auto element = [&] {
    return std::string(kind == Access::Read ? "reads" : "writes") + " element " + std::to_string(index) + " of " +
           std::to_string(size) + " bytes, at byte " + std::to_string(begin) + " of " +
           std::to_string(memory.bytes.size()) + " in " +
           (block == &mine ? std::string() : "block " + std::to_string(block->index) + "'s ") + "shared memory";
  };
  if (index < 0 || begin + size > static_cast<int64_t>(memory.bytes.size())) {
    all.fail(element() + ": out of bounds", site);
  }
  const Trace now{all.running().number, all.time(), site};
  if (block != &mine) {
    if (mine.group(Scope::Cluster).last_barrier == 0) {
      all.fail(element() + " before a cluster barrier: that block may not have begun", site);
    }
    if (all.running().parting) {
      all.fail(element() + " after arrive_cluster: that block may have returned", site);
    }
    if (block->running == 0) {
      all.fail(element() + ": that block has returned", site);
    }
    memory.last_by_peer = now;
  }
  for (int64_t i = begin; i < begin + size; ++i) {
    if (const std::string wrong = note(memory.traces[static_cast<size_t>(i)], now, kind); !wrong.empty()) {
      all.fail(element() + wrong, site);
    }
  }
  return &memory.bytes[static_cast<size_t>(begin)];
}

Block* own_block(int64_t offset, Site site) {
  Block* block = residents->running().block;
  if (offset < 0 || offset > static_cast<int64_t>(block->memory.bytes.size()) || offset % 16 != 0) {
    residents->fail("a shared array at byte " + std::to_string(offset) + " of " +
                        std::to_string(block->memory.bytes.size()) + ": out of bounds or not a multiple of 16",
                    site);
  }
  return block;
}

Block* block_of_cluster(int rank, Site site) {
  const std::span<Block> cluster = residents->running().block->cluster;
  if (rank < 0 || rank >= static_cast<int>(cluster.size())) {
    residents->fail("block " + std::to_string(rank) + " of a cluster of " + std::to_string(cluster.size()), site);
  }
  return &cluster[static_cast<size_t>(rank)];
}

}  // namespace bn::simt
