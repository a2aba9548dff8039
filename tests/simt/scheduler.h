#pragma once

#include "fiber.h"
#include "shared_memory.h"

#include <deque>
#include <span>

namespace bn::simt {

constexpr int kWarp = 32;

enum class Scope { Block, Cluster, Grid };

using Values = const void* const*;  // one per lane of a warp

struct Thread;

// The threads that one barrier waits for.
struct Group {
  std::span<Thread> threads;
  size_t arrived = 0;
  uint32_t last_barrier = 0;
  size_t parting = 0;         // threads that have arrived to part
  uint32_t last_parting = 0;  // when all had arrived
};

struct Block {
  int64_t index;
  int threads;
  std::span<Block> cluster;
  Group* groups[3];  // by Scope
  SharedMemory memory;
  int running;                // threads that have not returned
  Thread* waiter = nullptr;   // the first one at a barrier
  bool arrived_last = false;  // the answer of last_to_arrive

  Group& group(Scope scope) const { return *groups[static_cast<int>(scope)]; }
};

struct Thread {
  int index;   // in its block
  int number;  // among all residents
  Block* block;
  Fiber* fiber;
  bool returned = false;
  bool parting = false;          // has arrived to part, and not waited yet
  bool waits_to_part = false;    // does so now
  uint32_t arrived_to_part = 0;  // when it did

  // The thread waits for this.
  const char* call = nullptr;
  Site site;
  unsigned lanes = 0;  // of an exchange
  const void* value = nullptr;
  const std::function<void(Values)>* take = nullptr;
  const unsigned* counter = nullptr;  // of sync_blocks
  unsigned arrivals = 0;
};

// The blocks that exist at the same time, and the order in which their threads run.
class Residents {
 public:
  Residents(const Launch& launch, int64_t first_block, int64_t count, const std::function<void()>& body);
  void run();

  // The running thread calls the functions below, on its own stack.
  Thread& running() const { return *running_; }
  uint32_t time() const { return time_; }
  bool is_ordered(const Trace& earlier) const;  // whether a barrier is between it and now
  std::string name(const Trace& trace) const;

  void yield();
  void maybe_yield();
  void arrive(Scope scope, const char* call, Site site);
  // The halves of a barrier of the cluster, behind which no thread reads the shared memory of other blocks.
  void arrive_to_part(const char* call, Site site);
  void wait_to_part(const char* call, Site site);
  void wait_for(const unsigned* counter, unsigned arrivals, const char* call, Site site);
  // Waits for all of `lanes`; then `take` gets the address of each lane's value, null for a lane that is not named.
  void exchange(
      unsigned lanes, const void* value, const std::function<void(Values)>& take, const char* call, Site site);

  std::string where() const;
  void report(const std::string& what);  // ends the launch when the thread stops
  [[noreturn]] void fail(const std::string& what);
  [[noreturn]] void fail(const std::string& what, Site site);

 private:
  static void thread_main();
  void finish();
  [[noreturn]] void fail_diverged(const Thread& from);
  std::deque<Thread*>& queue_of(const Thread& thread) { return thread.block == lagging_ ? late_ : ready_; }
  void wake(Thread& thread);
  void wake_counting();
  Thread* next();

  const Launch& launch_;
  const std::function<void()>& body_;
  std::vector<Block> blocks_;
  std::vector<Group> groups_;
  std::vector<Thread> threads_;
  std::deque<Thread*> ready_;
  std::deque<Thread*> late_;  // ready threads of the block that lags behind: they go on when no other can
  const Block* lagging_ = nullptr;
  std::vector<Thread*> counting_;  // threads that wait for a counter
  Thread* running_ = nullptr;
  size_t returned_ = 0;
  uint32_t time_ = 0;  // barriers passed
  int64_t patience_;   // switches left before a launch without progress is ended
  std::string error_;
};

extern Residents* residents;  // null between launches

void listen_to_sanitizer();

}  // namespace bn::simt
