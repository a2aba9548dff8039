#pragma once

// Functions of core/ are compiled for the host and, by nvcc, for the device. They are inlined always: a copy
// of one that was compiled for AVX-512 must not be what another unit calls.
#if defined(__CUDACC__)
#define BN_HD __host__ __device__ __forceinline__
#else
#define BN_HD [[gnu::always_inline]] inline
#endif
