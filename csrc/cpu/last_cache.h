#pragma once

#include <cstdint>

namespace bn::cpu {

// The size of the cache between the cores and memory, in bytes: of the first core's, as Linux tells; 32 MiB where it
// does not. Asked once.
int64_t last_cache_bytes();

// Plans go by this size from here on. Returns the size so far.
int64_t set_last_cache_bytes(int64_t bytes);

}  // namespace bn::cpu
