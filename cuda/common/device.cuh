// Small things that every kernel file uses: launching, real rows, a scan over a block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/types.h"

#define JAXSPARSE_TRY(call)                                                    \
  do {                                                                        \
    if (const cudaError_t error = (call); error != cudaSuccess) return error; \
  } while (0)

namespace jaxsparse::cuda {

// Launches blocks of `threads`, at least one block; returns this launch's own status, not an error that an earlier
// launch left behind.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, int threads, cudaStream_t stream, Args... args) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks > 0 ? blocks : 1));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

__device__ inline bool row_is_real(const Segments& segments, int32_t row) {
  if (row >= segments.rows) return false;
  if (segments.number == 1) return row < segments.counts[0];
  const int32_t segment_rows = segments.rows / segments.number;
  return row % segment_rows < segments.counts[row / segment_rows];
}

__device__ inline int64_t global_thread() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

// Sum of `value` over the threads before this one; *total is the sum over the block. All threads of the block call it.
template <int kThreads, typename V>
__device__ V block_exclusive_scan(V value, V* total) {
  __shared__ V sums[kThreads];
  const int t = threadIdx.x;
  __syncthreads();  // a caller's earlier scan may still be read
  sums[t] = value;
  for (int step = 1; step < kThreads; step *= 2) {
    __syncthreads();
    const V before = t >= step ? sums[t - step] : V(0);
    __syncthreads();
    sums[t] += before;
  }
  __syncthreads();
  *total = sums[kThreads - 1];
  return sums[t] - value;
}

}  // namespace jaxsparse::cuda
