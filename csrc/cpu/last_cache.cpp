#include "cpu/last_cache.h"

#include <atomic>
#include <fstream>
#include <string>

namespace bn::cpu {
namespace {

// Not sysconf: glibc adds up the last caches of all sockets (384 MiB where a core has 32 MiB).
int64_t ask() {
  constexpr int64_t kUnlessKnown = 32 << 20;
  int64_t kib = 0;
  int highest = 0;
  for (int i = 0;; ++i) {
    const std::string cache = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i);
    std::ifstream level_file(cache + "/level"), size_file(cache + "/size");
    int level = 0;
    int64_t size = 0;
    char unit = 0;
    if (!(level_file >> level)) {
      break;
    }
    if (level > highest && size_file >> size >> unit && unit == 'K') {
      highest = level;
      kib = size;
    }
  }
  return kib > 0 ? kib << 10 : kUnlessKnown;
}

std::atomic<int64_t>& known() {
  static std::atomic<int64_t> bytes = ask();
  return bytes;
}

}  // namespace

int64_t last_cache_bytes() {
  return known();
}

int64_t set_last_cache_bytes(int64_t bytes) {
  return known().exchange(bytes);
}

}  // namespace bn::cpu
