#pragma once

#include <ucontext.h>
#include <csetjmp>
#include <cstddef>

#if defined(__x86_64__) && !defined(BN_SIMT_PORTABLE)
#define BN_SIMT_X86_64
#endif

namespace bn::simt {

// Where a stack that is not running goes on.
struct Context {
#ifdef BN_SIMT_X86_64
  void* top = nullptr;
#else
  ucontext_t first;
  jmp_buf next;
  bool started = false;
#endif
};

// A function on a stack of its own. One runs at a time, between resume() and suspend().
class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next resume() call `function`. The resume() in which it returns is the last. A function that is still
  // running is dropped.
  void start(void (*function)());
  void resume();
  void suspend();

 private:
  static void enter();

  char* stack_;
  void (*function_)() = nullptr;
  bool returned_ = true;
  Context here_;
  Context resumer_;
  // AddressSanitizer's records of both stacks.
  void* here_frames_ = nullptr;
  void* resumer_frames_ = nullptr;
  const void* resumer_stack_ = nullptr;
  size_t resumer_bytes_ = 0;
};

}  // namespace bn::simt
