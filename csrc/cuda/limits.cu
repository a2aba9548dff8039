#include "cuda/limits.h"

#include "cuda/gpu/gpu.h"

#include <algorithm>
#include <map>
#include <mutex>

namespace bn::cuda {
namespace {

BN_KERNEL(kMaxThreads) largest_block() {}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  gpu::check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Asks how many clusters of blocks are on the GPU at the same time, of each size: of blocks that have all the shared
// memory there is, or half of it. Some GPUs have no room for clusters of 16. Code for an older architecture, which the
// driver translates, has no clusters.
void ask_clusters(Limits& limits) {
  cudaFuncAttributes code;
  gpu::check(cudaFuncGetAttributes(&code, largest_block), "limits");
  if (code.ptxVersion < 90) {
    return;
  }
  gpu::allow_all_shared_memory(reinterpret_cast<const void*>(largest_block), "limits");
  gpu::check(cudaFuncSetAttribute(largest_block, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "limits");
  const auto ask = [](unsigned size, int threads, int64_t shared_bytes) {
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {size, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(size);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.attrs = &cluster;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, largest_block, &config) != cudaSuccess) {
      static_cast<void>(cudaGetLastError());  // clears the error: there is no such cluster
      return 0;
    }
    return clusters;
  };
  const int64_t half = std::min(limits.shared_per_multiprocessor / 2 - kReserved, limits.shared_per_block);
  for (unsigned i = 0, size = 2; i < kClusterSizes; ++i, size *= 2) {
    limits.clusters.alone[i] = ask(size, kMaxThreads, limits.shared_per_block);
    limits.clusters.of_two[i] = ask(size, kMaxThreads / 2, half);
    if (limits.clusters.alone[i] == 0 || limits.clusters.of_two[i] == 0) {
      return;
    }
    limits.max_cluster = static_cast<int>(size);
  }
}

Limits ask(int device) {
  cudaDeviceProp properties;
  gpu::check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  Limits limits{properties.name, attribute(cudaDevAttrMultiProcessorCount, device),
                attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)};
  if (attribute(cudaDevAttrClusterLaunch, device) != 0) {
    ask_clusters(limits);
  }
  return limits;
}

}  // namespace

const Limits& current_limits() {
  static std::mutex mutex;
  static std::map<int, Limits> known;
  int device = 0;
  gpu::check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known.emplace(device, ask(device)).first->second;
}

}  // namespace bn::cuda
