#pragma once

// A GPU's execution model on the CPU. Every thread of a grid is a fiber; at barriers, exchanges and atomics another one
// goes on, in an order that a seed decides. What a GPU leaves undefined, or would wait for forever, ends the launch
// with a std::runtime_error that names kernel, block and thread.

#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

namespace bn::simt {

struct Settings {
  uint64_t seed = 0;                 // of the order of blocks and threads, one block lagging behind; 0: by index
  int preempt = 0;                   // another thread goes on before one in so many accesses to shared memory; 0: none
  int64_t resident_blocks = 132;     // that a cooperative launch may have
  int64_t shared_bytes = 227 << 10;  // that a block may have
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
const std::vector<Launch>& launches();  // since configure(), those that failed included

// For C interfaces: runs `f` and returns null, or what it threw.
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

using Site = std::source_location;  // of a call in a kernel's source

}  // namespace bn::simt
