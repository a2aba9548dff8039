#pragma once

// The execution model: all that kernels and launch code know of a GPU. This is CUDA's implementation. The tests
// replace it by tests/simt/cuda/gpu/gpu.h, which runs a grid on the CPU.

#include "cuda/gpu/too_large.h"

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#define BN_DEVICE __device__ __forceinline__
#define BN_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)

namespace bn::gpu {

// The indices of a thread. Grids and blocks have one dimension.
BN_DEVICE int thread() {
  return static_cast<int>(threadIdx.x);
}
BN_DEVICE int threads() {
  return static_cast<int>(blockDim.x);
}
BN_DEVICE int block() {
  return static_cast<int>(blockIdx.x);
}

// Barriers for all threads of a block, of a cluster of blocks, of a cooperative grid. A barrier orders all accesses to
// shared and global memory before it with all accesses after it.
BN_DEVICE void sync_block() {
  __syncthreads();
}
BN_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#else
  __trap();  // no plan has clusters on these GPUs
#endif
}

// A barrier of a cluster in two halves, for a block that has read the shared memory of others for the last time: it may
// end after the second half. It orders no access to memory, and so waits for no store. What was read has to be in use:
// an arrival does not wait for loads either.
BN_DEVICE void arrive_cluster() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive_relaxed();
#else
  __trap();
#endif
}
BN_DEVICE void wait_cluster() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_wait();
#else
  __trap();
#endif
}

BN_DEVICE void sync_grid() {
  cooperative_groups::this_grid().sync();
}

// A barrier for the blocks of a cooperative grid that share `counter`. All of them go on when the counter, which began
// at zero, reaches `arrivals`.
BN_DEVICE void sync_blocks(unsigned* counter, unsigned arrivals) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1);
    while (*static_cast<volatile unsigned*>(counter) < arrivals) {
    }
    __threadfence();
  }
  __syncthreads();
}

// Counts the blocks of a grid that come here, in a counter that began at zero. True for all threads of the last of
// `arrivals` blocks, which can then load what the others wrote before.
BN_DEVICE bool last_to_arrive(unsigned* counter, unsigned arrivals) {
  __threadfence();
  __syncthreads();
  const bool last = __syncthreads_or(threadIdx.x == 0 && atomicAdd(counter, 1) == arrivals - 1) != 0;
  if (last) {
    __threadfence();
  }
  return last;
}

// Loads what another block of this grid wrote before a barrier, or before it arrived. The cache of this multiprocessor
// may be out of date.
template <class T>
BN_DEVICE T load_written(const T* p) {
  return __ldcg(p);
}

BN_DEVICE unsigned long long atomic_add(unsigned long long* p, unsigned long long value) {
  return atomicAdd(p, value);
}

BN_DEVICE void atomic_or(unsigned* p, unsigned bits) {
  atomicOr(p, bits);
}

// Exchanges between the threads of a warp. `lanes` names the threads that take part; all of them have to.
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

template <class T>
BN_DEVICE T shuffle_xor(unsigned lanes, T value, int lane_mask) {
  return __shfl_xor_sync(lanes, value, lane_mask);
}

// An array in the dynamic shared memory of a block.
template <class T>
class Shared {
 public:
  BN_DEVICE explicit Shared(T* data) : data_(data) {}

  BN_DEVICE T read(int i) const { return data_[i]; }
  BN_DEVICE void write(int i, const T& value) const { data_[i] = value; }

  // The same array in another block of the cluster.
  BN_DEVICE Shared of_block(int rank) const {
#if __CUDA_ARCH__ >= 900
    return Shared(static_cast<T*>(__cluster_map_shared_rank(data_, rank)));
#else
    __trap();
    return *this;
#endif
  }

 private:
  T* data_;
};

// The array of this block that begins at byte `offset`, a multiple of 16, of its shared memory.
template <class T>
BN_DEVICE Shared<T> shared_array(int64_t offset) {
  extern __shared__ __align__(16) unsigned char memory[];
  return Shared<T>(reinterpret_cast<T*>(memory + offset));
}

using Stream = CUstream_st*;

struct LaunchShape {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  int cluster;       // blocks of a cluster, or 1
  bool cooperative;  // all blocks run at the same time
};

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // clears it: the next call that asks shall not report it again
    throw std::runtime_error(std::string("bn_ext: ") + what + ": " + cudaGetErrorString(error));
  }
}

inline void set_to_zero(void* memory, int64_t bytes, Stream stream) {
  check(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), stream), "cudaMemsetAsync");
}

// Allows a kernel all the shared memory there is. Every launch sets the same, so threads of the host cannot conflict.
inline void allow_all_shared_memory(const void* kernel, const char* name) {
  int device = 0;
  int bytes = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        name);
}

// Launches kernel(args). Throws TooLarge for a cooperative launch that the GPU, or the process's part of it, has no
// room for.
template <class Args>
void launch(const char* name, void (*kernel)(Args), const LaunchShape& shape, Stream stream, const Args& args) {
  constexpr int64_t kUnasked = 48 << 10;  // more shared memory needs a permission
  constexpr int kPortableCluster = 8;     // a larger cluster needs a permission
  const auto* const symbol = reinterpret_cast<const void*>(kernel);
  if (shape.shared_bytes > kUnasked) {
    allow_all_shared_memory(symbol, name);
  }
  if (shape.cluster > kPortableCluster) {
    check(cudaFuncSetAttribute(symbol, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name);
  }
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = shape.cooperative;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = shape.cluster > 1 ? 2 : 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
  if (error == cudaErrorCooperativeLaunchTooLarge) {
    static_cast<void>(cudaGetLastError());
    throw TooLarge(std::string("bn_ext: ") + name + ": " + cudaGetErrorString(error));
  }
  check(error, name);
}

}  // namespace bn::gpu
