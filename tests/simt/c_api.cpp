// The model's settings and its record of launches, for ctypes.

#include "model.h"

extern "C" void simt_configure(uint64_t seed, int preempt, int64_t resident_blocks, int64_t shared_bytes) {
  bn::simt::configure({seed, preempt, resident_blocks, shared_bytes});
}

// A line for each launch: kernel, blocks, threads, bytes of shared memory, blocks of a cluster, whether cooperative.
extern "C" const char* simt_launches() {
  static std::string text;
  text.clear();
  for (const auto& [kernel, shape] : bn::simt::launches()) {
    text += kernel;
    for (const int64_t value : {shape.blocks, int64_t{shape.threads}, shape.shared_bytes, int64_t{shape.cluster},
                                int64_t{shape.cooperative}}) {
      text += " " + std::to_string(value);
    }
    text += "\n";
  }
  return text.c_str();
}
