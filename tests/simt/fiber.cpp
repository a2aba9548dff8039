#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#ifdef BN_SIMT_SANITIZE
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define __sanitizer_start_switch_fiber(...)
#define __sanitizer_finish_switch_fiber(...)
#define __asan_unpoison_memory_region(...)
#endif

namespace bn::simt {
namespace {

constexpr size_t kStack = 128 << 10;  // only pages that are touched take memory
constexpr size_t kGuard = 4 << 10;    // below it, so that an overflow faults

Fiber* entered;

}  // namespace

#ifdef BN_SIMT_X86_64

// Saves the registers that a called function must preserve, and goes on where the other stack called this.
extern "C" void bn_simt_switch(void** from, void* to);
asm(R"(
  .type bn_simt_switch, @function
bn_simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size bn_simt_switch, .-bn_simt_switch
)");

static void switch_context(Context& from, Context& to) {
  bn_simt_switch(&from.top, to.top);
}

static void prepare(Context& context, char* stack, size_t bytes, void (*function)()) {
  auto** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // the return address that aligns the stack as a call would
  *--top = reinterpret_cast<void*>(function);
  context.top = top - 6;  // registers, of any value
}

#else

// setcontext() makes a system call for the signal mask. Only the first switch to a stack needs it.
static void switch_context(Context& from, Context& to) {
  from.started = true;
  if (_setjmp(from.next) != 0) {
    return;
  }
  if (to.started) {
    _longjmp(to.next, 1);
  }
  to.started = true;
  setcontext(&to.first);
}

static void prepare(Context& context, char* stack, size_t bytes, void (*function)()) {
  getcontext(&context.first);
  context.first.uc_stack.ss_sp = stack;
  context.first.uc_stack.ss_size = bytes;
  context.first.uc_link = nullptr;
  makecontext(&context.first, function, 0);
  context.started = false;
}

#endif

Fiber::Fiber() {
  void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) {
    throw std::bad_alloc();
  }
  stack_ = static_cast<char*>(memory) + kGuard;
}

Fiber::~Fiber() {
  munmap(stack_ - kGuard, kGuard + kStack);
}

void Fiber::start(void (*function)()) {
  function_ = function;
  if (!returned_) {
    __asan_unpoison_memory_region(stack_, kStack);
  }
  returned_ = false;
  prepare(here_, stack_, kStack, enter);
}

void Fiber::resume() {
  entered = this;
  __sanitizer_start_switch_fiber(&resumer_frames_, stack_, kStack);
  switch_context(resumer_, here_);
  __sanitizer_finish_switch_fiber(resumer_frames_, nullptr, nullptr);
}

void Fiber::suspend() {
  __sanitizer_start_switch_fiber(&here_frames_, resumer_stack_, resumer_bytes_);
  switch_context(here_, resumer_);
  __sanitizer_finish_switch_fiber(here_frames_, &resumer_stack_, &resumer_bytes_);
}

void Fiber::enter() {
  Fiber& self = *entered;
  __sanitizer_finish_switch_fiber(nullptr, &self.resumer_stack_, &self.resumer_bytes_);
  self.function_();
  self.returned_ = true;
  self.suspend();
}

}  // namespace bn::simt
