#pragma once

#include "model.h"

namespace bn::simt {

// An access: the number of the thread among the residents, and the number of barriers passed by then.
struct Trace {
  int thread = -1;
  uint32_t time = 0;
  Site site;

  explicit operator bool() const { return thread >= 0; }
};

// A block's shared memory, and the last accesses to each byte.
struct SharedMemory {
  explicit SharedMemory(int64_t size) : bytes(static_cast<size_t>(size)), traces(static_cast<size_t>(size)) {}

  // Two readers are enough: a thread that writes is at most one of them.
  struct Traces {
    Trace write;
    Trace reads[2];
  };

  std::vector<unsigned char> bytes;
  std::vector<Traces> traces;
  Trace last_by_peer;  // by a thread of another block of the cluster
};

enum class Access { Read, Write };

struct Block;

// The address, in a block's shared memory, of element `index`, of `size` bytes, of the array that begins at `offset`.
// Fails if the access is wrong.
void* access(Block* block, int64_t offset, int64_t index, int64_t size, Access kind, Site site);
Block* own_block(int64_t offset, Site site);
Block* block_of_cluster(int rank, Site site);

}  // namespace bn::simt
