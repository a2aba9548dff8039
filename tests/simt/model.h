#pragma once

// A GPU's execution model on the CPU. Every thread of a grid is a fiber. At barriers, exchanges and atomics another
// thread goes on; a seed decides the order. Undefined behavior and endless waits end the launch with a
// std::runtime_error that names kernel, block and thread. README.md says what is modeled and what is not.

#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

namespace bn::simt {

struct Settings {
  uint64_t seed = 0;                 // of the random order of threads, in which one block lags behind; 0: by index
  int preempt = 0;                   // another thread goes on before one in `preempt` shared accesses; 0: before none
  int64_t resident_blocks = 132;     // the most blocks of a cooperative launch
  int64_t shared_bytes = 227 << 10;  // the most shared memory of a block
};

struct LaunchShape {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  int cluster;
  bool cooperative;
};

struct Launch {
  std::string kernel;
  LaunchShape shape;
};

void configure(const Settings& settings);
const std::vector<Launch>& launches();  // since configure(), failed launches included

// For C interfaces: runs `f` and returns null, or the message of what `f` threw.
template <class F>
const char* error_of(const F& f) {
  static std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    message = e.what();
    return message.c_str();
  }
}

void launch(const char* kernel, const LaunchShape& shape, const std::function<void()>& thread);

using Site = std::source_location;  // where a call is in a kernel's source

}  // namespace bn::simt
