#include "scheduler.h"

#include "cuda/gpu/too_large.h"
#include "text.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <random>
#include <string_view>

namespace bn::simt {

Residents* residents = nullptr;

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxCluster = 16;
constexpr int64_t kPatience = 1 << 24;  // about a second

Settings settings;
std::vector<Launch> launched;
std::mt19937_64 random_bits;
std::vector<std::unique_ptr<Fiber>> fibers;  // kept for all launches, so that their stacks are in memory

int64_t random_below(int64_t n) {
  return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n));
}

bool is_same(Site a, Site b) {
  return a.line() == b.line() && a.column() == b.column() && std::string_view(a.file_name()) == b.file_name();
}

}  // namespace

Residents::Residents(const Launch& launch, int64_t first_block, int64_t count, const std::function<void()>& body)
    : launch_(launch), body_(body), patience_(kPatience) {
  const LaunchShape& shape = launch.shape;
  const auto cluster = static_cast<size_t>(shape.cluster);
  const auto threads = static_cast<size_t>(shape.threads);
  const auto blocks = static_cast<size_t>(count);
  threads_.resize(blocks * threads);
  blocks_.reserve(blocks);
  groups_.resize(1 + blocks / cluster + blocks);
  groups_[0].threads = threads_;
  for (size_t b = 0; b < blocks; ++b) {
    Group& of_cluster = groups_[1 + b / cluster];
    Group& of_block = groups_[1 + blocks / cluster + b];
    of_cluster.threads = std::span(threads_).subspan(b / cluster * cluster * threads, cluster * threads);
    of_block.threads = std::span(threads_).subspan(b * threads, threads);
    blocks_.push_back({.index = first_block + static_cast<int64_t>(b),
                       .threads = shape.threads,
                       .cluster = {blocks_.data() + b / cluster * cluster, cluster},
                       .groups = {&of_block, &of_cluster, &groups_[0]},
                       .memory = SharedMemory(shape.shared_bytes),
                       .running = shape.threads});
  }
  if (settings.seed != 0) {
    lagging_ = &blocks_[static_cast<size_t>(random_below(count))];
  }
  while (fibers.size() < threads_.size()) {
    fibers.push_back(std::make_unique<Fiber>());
  }
  for (size_t i = 0; i < threads_.size(); ++i) {
    Thread& thread = threads_[i];
    thread.block = &blocks_[i / threads];
    thread.number = static_cast<int>(i);
    thread.index = static_cast<int>(i % threads);
    thread.fiber = fibers[i].get();
    thread.fiber->start(thread_main);
    queue_of(thread).push_back(&thread);
  }
}

void Residents::run() {
  residents = this;
  listen_to_sanitizer();
  while (error_.empty() && (running_ = next()) != nullptr) {
    running_->fiber->resume();
  }
  residents = nullptr;
  if (error_.empty() && returned_ < threads_.size()) {
    error_ = "kernel " + launch_.kernel + ": deadlock: " + text_of(blocks_);
  }
  if (!error_.empty()) {
    throw std::runtime_error(error_);
  }
}

Thread* Residents::next() {
  if (ready_.empty()) {
    wake_counting();
  }
  std::deque<Thread*>& queue = ready_.empty() ? late_ : ready_;
  if (queue.empty()) {
    return nullptr;
  }
  if (--patience_ < 0) {
    error_ = "kernel " + launch_.kernel + ": no thread gets anywhere: " + text_of(blocks_);
    return nullptr;
  }
  if (settings.seed != 0) {
    std::swap(queue.front(), queue[static_cast<size_t>(random_below(static_cast<int64_t>(queue.size())))]);
  }
  Thread* thread = queue.front();
  queue.pop_front();
  return thread;
}

void Residents::thread_main() {
  residents->body_();
  residents->finish();
}

void Residents::finish() {
  Block& block = *running_->block;
  const Trace& peer = block.memory.last_by_peer;
  const Group& cluster = block.group(Scope::Cluster);
  if (running_->parting) {
    fail("returns between arrive_cluster and wait_cluster");
  }
  if (--block.running == 0 && peer && peer.time >= std::max(cluster.last_barrier, cluster.last_parting)) {
    fail("returns its block's shared memory, which " + name(peer) + " uses with no cluster barrier between", peer.site);
  }
  running_->returned = true;
  ++returned_;
  patience_ = kPatience;
}

void Residents::yield() {
  queue_of(*running_).push_back(running_);
  running_->fiber->suspend();
}

void Residents::maybe_yield() {
  if (settings.preempt > 0 && random_below(settings.preempt) == 0) {
    yield();
  }
}

void Residents::wake(Thread& thread) {
  thread.call = nullptr;
  thread.lanes = 0;
  thread.counter = nullptr;
  queue_of(thread).push_back(&thread);
  patience_ = kPatience;
}

void Residents::arrive(Scope scope, const char* call, Site site) {
  Block& block = *running_->block;
  if (scope != Scope::Block && running_->parting) {
    fail(std::string(call) + " between arrive_cluster and wait_cluster", site);
  }
  if (scope == Scope::Grid && !launch_.shape.cooperative) {
    fail("sync_grid in a launch that is not cooperative", site);
  }
  running_->call = call;
  running_->site = site;
  if (block.waiter == nullptr) {
    block.waiter = running_;
  } else if (!is_same(block.waiter->site, site)) {
    fail_diverged(*block.waiter);
  }
  Group& group = block.group(scope);
  if (++group.arrived == group.threads.size()) {
    group.arrived = 0;
    ++time_;
    for (Thread& thread : group.threads) {
      thread.block->waiter = nullptr;
      for (int inner = 0; inner <= static_cast<int>(scope); ++inner) {
        thread.block->groups[inner]->last_barrier = time_;
      }
      wake(thread);
    }
  }
  running_->fiber->suspend();
}

void Residents::arrive_to_part(const char* call, Site site) {
  Group& group = running_->block->group(Scope::Cluster);
  if (running_->parting) {
    fail(std::string(call) + " twice", site);
  }
  running_->parting = true;
  running_->arrived_to_part = ++time_;
  if (++group.parting == group.threads.size()) {
    group.parting = 0;
    group.last_parting = time_;
    for (Thread& thread : group.threads) {
      if (thread.waits_to_part) {
        wake(thread);
      }
    }
  }
  yield();
}

void Residents::wait_to_part(const char* call, Site site) {
  if (!running_->parting) {
    fail(std::string(call) + " without arrive_cluster", site);
  }
  if (running_->block->group(Scope::Cluster).last_parting < running_->arrived_to_part) {
    running_->call = call;
    running_->site = site;
    running_->waits_to_part = true;
    running_->fiber->suspend();
    running_->waits_to_part = false;
  }
  running_->parting = false;
}

void Residents::wait_for(const unsigned* counter, unsigned arrivals, const char* call, Site site) {
  wake_counting();
  while (*counter < arrivals) {
    running_->call = call;
    running_->site = site;
    running_->counter = counter;
    running_->arrivals = arrivals;
    counting_.push_back(running_);
    running_->fiber->suspend();
  }
}

void Residents::wake_counting() {
  std::erase_if(counting_, [this](Thread* thread) {
    const bool all_arrived = *thread->counter >= thread->arrivals;
    if (all_arrived) {
      wake(*thread);
    }
    return all_arrived;
  });
}

void Residents::exchange(
    unsigned lanes, const void* value, const std::function<void(Values)>& take, const char* call, Site site) {
  const int lane = running_->index % kWarp;
  Thread* const warp = running_ - lane;
  const int width = std::min(kWarp, running_->block->threads - warp->index);
  if ((lanes >> lane & 1) == 0 || (width < kWarp && lanes >> width != 0)) {
    fail(std::string(call) + " whose `lanes` do not name the caller, or name one that its block lacks", site);
  }
  running_->call = call;
  running_->site = site;
  running_->lanes = lanes;
  running_->value = value;
  running_->take = &take;
  bool complete = true;
  const void* values[kWarp] = {};
  for (int i = 0; i < width; ++i) {
    const Thread& other = warp[i];
    if ((lanes >> i & 1) == 0) {
      continue;
    }
    if ((other.lanes >> lane & 1) && (other.lanes != lanes || !is_same(other.site, site))) {
      fail_diverged(other);
    }
    complete &= other.lanes == lanes;
    values[i] = other.value;
  }
  if (complete) {
    for (int i = 0; i < width; ++i) {
      if (values[i] != nullptr) {
        (*warp[i].take)(values);
      }
    }
    for (int i = 0; i < width; ++i) {
      if (values[i] != nullptr) {
        wake(warp[i]);
      }
    }
  }
  running_->fiber->suspend();
}

bool Residents::is_ordered(const Trace& earlier) const {
  const Thread& other = threads_[static_cast<size_t>(earlier.thread)];
  Block& mine = *running_->block;
  const Scope scope = other.block == &mine ? Scope::Block : Scope::Cluster;
  return &other == running_ || earlier.time < mine.group(scope).last_barrier;
}

std::string Residents::name(const Trace& trace) const {
  const Thread& thread = threads_[static_cast<size_t>(trace.thread)];
  return "thread " + std::to_string(thread.index) + " of block " + std::to_string(thread.block->index) +
         text_of(trace.site);
}

std::string Residents::where() const {
  return "kernel " + launch_.kernel + ": block " + std::to_string(running_->block->index) + ": thread " +
         std::to_string(running_->index) + ": ";
}

void Residents::report(const std::string& what) {
  if (error_.empty()) {
    error_ = where() + what;
  }
}

void Residents::fail(const std::string& what) {
  report(what);
  running_->fiber->suspend();
  std::abort();
}

void Residents::fail(const std::string& what, Site site) {
  fail(what + text_of(site));
}

void Residents::fail_diverged(const Thread& from) {
  fail("diverges from thread " + std::to_string(from.index) + ", which is " + text_of(from) + ": is " +
       text_of(*running_));
}

void configure(const Settings& to) {
  settings = to;
  random_bits.seed(to.seed);
  launched.clear();
  listen_to_sanitizer();
}

const std::vector<Launch>& launches() {
  return launched;
}

void launch(const char* kernel, const LaunchShape& shape, const std::function<void()>& thread) {
  const auto require = [&](bool met, const std::string& what) {
    if (!met) {
      throw std::runtime_error(std::string("kernel ") + kernel + ": cannot be launched: " + what);
    }
  };
  launched.push_back({kernel, shape});
  const Launch launch = launched.back();
  require(shape.threads >= 1 && shape.threads <= kMaxThreads, std::to_string(shape.threads) + " threads in a block");
  require(shape.cluster >= 1 && shape.cluster <= kMaxCluster, "a cluster of " + std::to_string(shape.cluster));
  require(shape.blocks >= 1 && shape.blocks <= INT32_MAX && shape.blocks % shape.cluster == 0,
          std::to_string(shape.blocks) + " blocks in clusters of " + std::to_string(shape.cluster));
  require(shape.shared_bytes >= 0 && shape.shared_bytes <= settings.shared_bytes,
          std::to_string(shape.shared_bytes) + " bytes of shared memory, of " + std::to_string(settings.shared_bytes));
  if (shape.cooperative && shape.blocks > settings.resident_blocks) {
    throw gpu::TooLarge(std::string("kernel ") + kernel + ": cannot be launched: " + std::to_string(shape.blocks) +
                        " blocks at the same time, of " + std::to_string(settings.resident_blocks));
  }
  const int64_t together = shape.cooperative ? shape.blocks : shape.cluster;
  std::vector<int64_t> first_blocks;
  for (int64_t b = 0; b < shape.blocks; b += together) {
    first_blocks.push_back(b);
  }
  if (settings.seed != 0) {
    std::shuffle(first_blocks.begin(), first_blocks.end(), random_bits);
  }
  for (const int64_t first : first_blocks) {
    Residents(launch, first, together, thread).run();
  }
}

}  // namespace bn::simt
