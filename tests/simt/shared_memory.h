#pragma once

#include "model.h"

namespace bn::simt {

// An access by the thread of this index among the residents, when this many barriers had been passed.
struct Trace {
  int thread = -1;
  uint32_t time = 0;
  Site site;

  explicit operator bool() const { return thread >= 0; }
};

// A block's shared memory and who was last at each byte.
struct SharedMemory {
  explicit SharedMemory(int64_t size) : bytes(static_cast<size_t>(size)), traces(static_cast<size_t>(size)) {}

  // Of readers two suffice: whoever writes is not both.
  struct Traces {
    Trace write;
    Trace reads[2];
  };

  std::vector<unsigned char> bytes;
  std::vector<Traces> traces;
  Trace last_by_peer;  // a thread of another block of the cluster
};

enum class Access { Read, Write };

struct Block;

// Of the shared memory of a block: element `index`, of `size` bytes, of the array that begins at `offset`.
void* access(Block* block, int64_t offset, int64_t index, int64_t size, Access kind, Site site);
Block* own_block(int64_t offset, Site site);
Block* block_of_cluster(int rank, Site site);

}  // namespace bn::simt
