#pragma once

// Functions of core/ are compiled for the host and, by nvcc, for the device.
#if defined(__CUDACC__)
#define BN_HD __host__ __device__ __forceinline__
#else
#define BN_HD inline
#endif
