#include "cuda/limits.h"

#include "cuda/gpu/gpu.h"

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

// The largest cluster of blocks that have all the shared memory there is. Some GPUs have no room for clusters of 16.
// Code for an older architecture, which the driver translates, has no clusters.
int max_cluster(const Limits& limits) {
  cudaFuncAttributes code;
  gpu::check(cudaFuncGetAttributes(&code, largest_block), "limits");
  if (code.ptxVersion < 90) {
    return 1;
  }
  gpu::allow_all_shared_memory(reinterpret_cast<const void*>(largest_block), "limits");
  gpu::check(cudaFuncSetAttribute(largest_block, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "limits");
  for (unsigned size = 16; size > 1; size /= 2) {
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {size, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(size);
    config.blockDim = dim3(kMaxThreads);
    config.dynamicSmemBytes = limits.shared_per_block;
    config.attrs = &cluster;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, largest_block, &config) == cudaSuccess && clusters > 0) {
      return static_cast<int>(size);
    }
    static_cast<void>(cudaGetLastError());  // clears the error: there is no such cluster
  }
  return 1;
}

Limits ask(int device) {
  cudaDeviceProp properties;
  gpu::check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  Limits limits{properties.name, attribute(cudaDevAttrMultiProcessorCount, device),
                attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device), 1};
  limits.max_cluster = attribute(cudaDevAttrClusterLaunch, device) != 0 ? max_cluster(limits) : 1;
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
