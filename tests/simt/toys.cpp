// Small kernels to test the model with. Each is right, or wrong in the one way that it is named after.

#include "cuda/gpu/gpu.h"

#include <string_view>

namespace bn::gpu {
namespace {

struct Args {
  const int* in;
  int* out;
  int n;
  unsigned* counter;
  unsigned long long* sum;
};

// The sum over a block's threads, by exchanges and one array in shared memory.
BN_DEVICE int block_sum(int value) {
  const auto partial = shared_array<int>(0);
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += shuffle_xor(kAllLanes, value, distance);
  }
  sync_block();
  if (thread() % kWarp == 0) {
    partial.write(thread() / kWarp, value);
  }
  sync_block();
  int sum = 0;
  for (int warp = 0; warp < threads() / kWarp; ++warp) {
    sum += partial.read(warp);
  }
  return sum;
}

template <bool kWrong>
BN_KERNEL(1024)
missing_barrier(Args a) {
  const auto s = shared_array<int>(0);
  s.write(thread(), a.in[thread()]);
  if (!kWrong) {
    sync_block();
  }
  a.out[thread()] = s.read(threads() - 1 - thread());
}

template <bool kWrong>
BN_KERNEL(1024)
missing_second_barrier(Args a) {
  const auto s = shared_array<int>(0);
  for (int round = 0; round < 2; ++round) {
    s.write(thread(), a.in[thread()] + round);
    sync_block();
    a.out[thread()] = s.read(threads() - 1 - thread()) - round;
    if (!kWrong) {
      sync_block();
    }
  }
}

template <bool kWrong>
BN_KERNEL(1024)
exchange_as_barrier(Args a) {
  const auto s = shared_array<int>(0);
  s.write(thread(), a.in[thread()]);
  shuffle_xor(kAllLanes, 0, 1);
  if (!kWrong) {
    sync_block();
  }
  a.out[thread()] = s.read(threads() - 1 - thread());
}

template <bool kWrong>
BN_KERNEL(1024)
barrier_in_branch(Args a) {
  const auto s = shared_array<int>(0);
  s.write(thread(), a.in[thread()]);
  if (!kWrong || thread() < 7) {
    sync_block();
  }
  a.out[thread()] = s.read(kWrong ? thread() : threads() - 1 - thread());
}

template <bool kWrong>
BN_KERNEL(1024)
barrier_in_both_branches(Args a) {
  if (kWrong && thread() % 2 == 1) {
    sync_block();
  } else {
    sync_block();
  }
  a.out[thread()] = a.in[threads() - 1 - thread()];
}

template <bool kWrong>
BN_KERNEL(1024)
early_return(Args a) {
  if (kWrong && thread() == 5) {
    return;
  }
  const auto s = shared_array<int>(0);
  s.write(thread(), a.in[thread()]);
  sync_block();
  a.out[thread()] = s.read(threads() - 1 - thread());
}

template <bool kWrong>
BN_KERNEL(1024)
shared_off_by_one(Args a) {
  const auto s = shared_array<int>(0);
  s.write(thread() + kWrong, a.in[thread()]);
  sync_block();
  a.out[thread()] = s.read(threads() - 1 - thread());
}

template <bool kWrong>
BN_KERNEL(1024)
shared_unwritten(Args a) {
  const auto s = shared_array<int>(0);
  if (!kWrong || thread() != 3) {
    s.write(thread(), a.in[thread()]);
  }
  sync_block();
  a.out[thread()] = s.read(threads() - 1 - thread());
}

template <bool kWrong>
BN_KERNEL(1024)
misaligned_array(Args a) {
  const auto s = shared_array<int>(kWrong ? 4 : 0);
  s.write(thread(), a.in[thread()]);
  sync_block();
  a.out[thread()] = s.read(threads() - 1 - thread());
}

template <bool kWrong>
BN_KERNEL(1024)
unguarded_tail(Args a) {
  const int i = block() * threads() + thread();
  if (kWrong || i < a.n) {
    a.out[a.n - 1 - i] = a.in[i];
  }
}

template <bool kWrong>
BN_KERNEL(1024)
global_off_by_one(Args a) {
  a.out[thread()] = a.in[threads() - 1 - thread() + kWrong];
}

template <bool kWrong>
BN_KERNEL(1024)
global_misaligned(Args a) {
  struct alignas(16) Four {
    int values[4];
  };
  if (thread() < threads() / 4) {
    const Four four = *reinterpret_cast<const Four*>(a.in + 4 * thread() + kWrong);
    for (int i = 0; i < 4; ++i) {
      a.out[threads() - 1 - 4 * thread() - i] = four.values[i];
    }
  }
}

template <bool kWrong>
BN_KERNEL(1024)
lanes_that_never_come(Args a) {
  int value = a.in[thread()];
  if (thread() % kWarp < 16) {
    value = shuffle_xor(kWrong ? kAllLanes : 0xffff, value, 15);
  } else if (!kWrong) {
    value = shuffle_xor(0xffff0000, value, 15);
  }
  a.out[thread() / 16 * 16 + 15 - thread() % 16] = value;
  sync_block();
  a.out[thread()] = a.in[threads() - 1 - thread()];
}

template <bool kWrong>
BN_KERNEL(1024)
lanes_without_caller(Args a) {
  ballot(kWrong ? 0xffff : kAllLanes, true);
  a.out[thread()] = a.in[threads() - 1 - thread()];
}

template <bool kWrong>
BN_KERNEL(1024)
lanes_that_differ(Args a) {
  shuffle_xor(kWrong && thread() % 2 == 1 ? 0x0fffffff : kAllLanes, 0, 1);
  a.out[thread()] = a.in[threads() - 1 - thread()];
}

template <bool kWrong>
BN_KERNEL(1024)
votes(Args a) {
  const unsigned odd = ballot(kAllLanes, thread() % 2 == 1);
  const unsigned few = !kWrong && thread() % kWarp < 8 ? ballot(0xff, thread() % 4 == 0) : 0x11;
  if (kWrong && thread() == 9) {
    ballot(kAllLanes, true);
  }
  a.out[thread()] = a.in[odd == 0xaaaaaaaa && few == 0x11 ? threads() - 1 - thread() : 0];
}

template <bool kWrong>
BN_KERNEL(1024)
lane_not_named(Args a) {
  if (thread() < 4) {
    shuffle_xor(0xf, 0, kWrong ? 4 : 3);
  }
  a.out[thread()] = a.in[threads() - 1 - thread()];
}

// Each of two blocks takes one value from the other's shared memory. If every thread took one, some would come too late
// in any order.
BN_DEVICE void take_from_peer(const Args& a, const Shared<int>& s) {
  const int i = block() * threads() + thread();
  a.out[i] = thread() == 0 ? s.of_block(1 - block()).read(threads() - 1) : a.in[a.n - 1 - i];
}

BN_DEVICE Shared<int> give_to_peer(const Args& a) {
  const auto s = shared_array<int>(0);
  s.write(thread(), a.in[block() * threads() + thread()]);
  return s;
}

template <bool kWrong>
BN_KERNEL(1024)
peer_before_barrier(Args a) {
  const auto s = give_to_peer(a);
  if (!kWrong) {
    sync_cluster();
  }
  take_from_peer(a, s);
  sync_cluster();
}

template <bool kWrong>
BN_KERNEL(1024)
peer_after_return(Args a) {
  const auto s = give_to_peer(a);
  sync_cluster();
  take_from_peer(a, s);
  if (!kWrong) {
    sync_cluster();
  }
}

template <bool kWrong>
BN_KERNEL(1024)
peer_after_arrival(Args a) {
  const auto s = give_to_peer(a);
  sync_cluster();
  if (kWrong) {
    arrive_cluster();
  }
  take_from_peer(a, s);
  if (!kWrong) {
    sync_block();
    arrive_cluster();
  }
  wait_cluster();
}

template <bool kWrong>
BN_KERNEL(1024)
peer_not_awaited(Args a) {
  const auto s = give_to_peer(a);
  sync_cluster();
  take_from_peer(a, s);
  arrive_cluster();
  if (!kWrong) {
    wait_cluster();
  }
}

template <bool kWrong>
BN_KERNEL(1024)
wait_without_arrival(Args a) {
  const auto s = give_to_peer(a);
  sync_cluster();
  take_from_peer(a, s);
  if (!kWrong || block() == 1) {
    arrive_cluster();
  }
  wait_cluster();
}

template <bool kWrong>
BN_KERNEL(1024)
barrier_within_barrier(Args a) {
  const auto s = give_to_peer(a);
  sync_cluster();
  take_from_peer(a, s);
  arrive_cluster();
  if (kWrong) {
    sync_cluster();
  }
  wait_cluster();
}

template <bool kWrong>
BN_KERNEL(1024)
peer_written_again(Args a) {
  const auto s = give_to_peer(a);
  sync_cluster();
  take_from_peer(a, s);
  if (kWrong) {
    sync_block();
  } else {
    sync_cluster();
  }
  s.write(thread(), 0);
  sync_cluster();
}

template <bool kWrong>
BN_KERNEL(1024)
peer_outside_cluster(Args a) {
  const auto s = give_to_peer(a);
  const int i = block() * threads() + thread();
  sync_cluster();
  a.out[a.n - 1 - i] = s.of_block(kWrong ? 2 : block()).read(thread());
  sync_cluster();
}

template <bool kWrong>
BN_KERNEL(1024)
grid_barrier(Args a) {
  const int i = block() * threads() + thread();
  a.out[i] = a.in[i];
  if (!kWrong || block() != 1) {
    sync_grid();
  }
  const int other = load_written(a.out + a.n - 1 - i);
  sync_grid();
  a.out[i] = other;
}

// Pairs the first block with the last one, and so on.
template <bool kWrong>
BN_KERNEL(1024)
barrier_of_pairs(Args a) {
  const int i = block() * threads() + thread();
  const int last = a.n / threads() - 1;
  unsigned* counter = a.counter + (block() < last - block() ? block() : last - block());
  a.out[i] = a.in[i];
  sync_blocks(counter, 2);
  const int other = load_written(a.out + a.n - 1 - i);
  sync_blocks(counter, kWrong ? 5 : 4);
  a.out[i] = other;
}

template <bool kWrong>
BN_KERNEL(1024)
spin(Args a) {
  if (thread() == 0) {
    atomic_add(a.sum, 1);
  }
  while (load_written(a.sum) < (kWrong ? 2U : 1U)) {
  }
  a.out[thread()] = a.in[threads() - 1 - thread()];
}

BN_KERNEL(1024) sums(Args a) {
  const int sum = block_sum(a.in[block() * threads() + thread()]);
  if (thread() == 0) {
    const auto before = atomic_add(a.sum, static_cast<unsigned long long>(sum));
    a.out[block()] = static_cast<int>(before) + sum;
  }
}

BN_KERNEL(1024) order(Args a) {
  shared_array<int>(0).write(thread(), 0);
  a.out[(*a.counter)++] = block() * threads() + thread();
}

BN_KERNEL(1024) barriers(Args a) {
  for (int i = 0; i < a.n; ++i) {
    sync_block();
  }
}

BN_KERNEL(1024) shared_traffic(Args a) {
  const auto s = shared_array<float>(0);
  for (int i = thread(); i < a.n; i += threads()) {
    s.write(i, 1);
  }
  sync_block();
  for (int i = thread(); i < a.n; i += threads()) {
    a.out[0] += static_cast<int>(s.read(i));
  }
}

struct Toy {
  std::string_view name;
  void (*right)(Args);
  void (*wrong)(Args);
};

#define TOY(name) {#name, name<false>, name<true>}
constexpr Toy kToys[] = {TOY(missing_barrier),
                         TOY(missing_second_barrier),
                         TOY(exchange_as_barrier),
                         TOY(barrier_in_branch),
                         TOY(barrier_in_both_branches),
                         TOY(early_return),
                         TOY(shared_off_by_one),
                         TOY(shared_unwritten),
                         TOY(misaligned_array),
                         TOY(unguarded_tail),
                         TOY(global_off_by_one),
                         TOY(global_misaligned),
                         TOY(lanes_that_never_come),
                         TOY(votes),
                         TOY(lanes_without_caller),
                         TOY(lanes_that_differ),
                         TOY(lane_not_named),
                         TOY(peer_before_barrier),
                         TOY(peer_after_return),
                         TOY(peer_after_arrival),
                         TOY(peer_not_awaited),
                         TOY(wait_without_arrival),
                         TOY(barrier_within_barrier),
                         TOY(peer_written_again),
                         TOY(peer_outside_cluster),
                         TOY(grid_barrier),
                         TOY(barrier_of_pairs),
                         TOY(spin),
                         {"sums", sums, sums},
                         {"order", order, order},
                         {"barriers", barriers, barriers},
                         {"shared_traffic", shared_traffic, shared_traffic}};

}  // namespace

extern "C" const char* run_toy(const char* name,
                               bool wrong,
                               int64_t blocks,
                               int threads,
                               int64_t shared_bytes,
                               int cluster,
                               bool cooperative,
                               const int* in,
                               int* out,
                               int n) {
  return simt::error_of([&] {
    std::vector<unsigned> counters(static_cast<size_t>(blocks));
    unsigned long long sum = 0;
    for (const Toy& toy : kToys) {
      if (toy.name == name) {
        launch(name, wrong ? toy.wrong : toy.right, {blocks, threads, shared_bytes, cluster, cooperative}, nullptr,
               Args{in, out, n, counters.data(), &sum});
        return;
      }
    }
    throw std::runtime_error(std::string("no kernel ") + name);
  });
}

}  // namespace bn::gpu
