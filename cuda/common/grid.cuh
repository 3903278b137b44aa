// Cooperative kernels: one launch whose blocks go through several phases together and wait for each other in between.
//
// For many short phases in which the number and size of later ones depends on what earlier ones found, such as the passes
// of a sort: a barrier of the grid costs 1 to 2 microseconds, no more than one more kernel, and a phase that turns out not
// to be needed costs nothing. The launch holds at most as many blocks as fit the device at once, whatever the capacity.
#pragma once

#include <cooperative_groups.h>

#include "cuda/common/device.cuh"

namespace jaxsparse::cuda {

using Grid = cooperative_groups::grid_group;

constexpr int kGridThreads = 512;
constexpr int kMostBlocks = kGridThreads;  // so that one thread can look at each block's result

// How many of so many blocks of kThreads threads, at least one, the device holds at once.
template <int kThreads = kGridThreads, typename... Params>
cudaError_t blocks_at_once(void (*kernel)(Params...), int64_t blocks, int* at_once) {
  int device = 0, processors = 0, per_processor = 0;
  JAXSPARSE_TRY(cudaGetDevice(&device));
  JAXSPARSE_TRY(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  JAXSPARSE_TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kThreads, 0));
  int64_t most = int64_t{processors} * per_processor;
  if (most > kMostBlocks) most = kMostBlocks;
  if (blocks > most) blocks = most;
  *at_once = static_cast<int>(blocks > 0 ? blocks : 1);
  return cudaSuccess;
}

// Launches kThreads threads in each of `blocks` blocks, or of as many as the device holds at once.
template <int kThreads = kGridThreads, typename... Params, typename... Args>
cudaError_t launch_grid(void (*kernel)(Params...), int64_t blocks, cudaStream_t stream, Args... args) {
  int at_once = 0;
  JAXSPARSE_TRY(blocks_at_once<kThreads>(kernel, blocks, &at_once));
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(at_once));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

// A barrier of the grid during which each thread does what the others need not see before the next one. Reads of what they
// wrote before this one must wait.
template <typename Meanwhile>
__device__ void sync_while(const Grid& grid, Meanwhile meanwhile) {
  Grid::arrival_token arrived = grid.barrier_arrive();
  meanwhile();
  grid.barrier_wait(static_cast<Grid::arrival_token&&>(arrived));
}

struct Range {
  int32_t begin, end;
};

// How many of 0 .. n - 1, n < 2^31, a block has: a multiple of `unit`, so that `blocks` blocks have all.
__device__ inline uint32_t share_size(uint32_t n, uint32_t unit, uint32_t blocks) {
  return ((n + unit - 1) / unit + blocks - 1) / blocks * unit;  // 32 bits divide much faster than 64
}

// This block's share of them: consecutive, spread over the first `blocks` blocks.
__device__ inline Range share(uint32_t n, uint32_t unit, uint32_t blocks) {
  const uint32_t each = share_size(n, unit, blocks);
  const uint64_t begin = uint64_t{each} * blockIdx.x, end = begin + each;
  return {static_cast<int32_t>(begin < n ? begin : n), static_cast<int32_t>(end < n ? end : n)};
}

template <int kThreads = kGridThreads, typename V>
__device__ V block_sum(V value) {
  V total;
  block_exclusive_scan<kThreads>(value, &total);
  return total;
}

template <int kThreads = kGridThreads>
__device__ uint64_t block_or(uint64_t value) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ uint64_t words[kWarps];
  for (int step = 1; step < kWarp; step *= 2) value |= __shfl_xor_sync(kAllLanes, value, step);
  __syncthreads();  // an earlier result may still be read
  if (threadIdx.x % kWarp == 0) words[threadIdx.x / kWarp] = value;
  __syncthreads();
  uint64_t all = 0;
  for (int w = 0; w < kWarps; ++w) all |= words[w];
  return all;
}

// From one value a block, written before the last barrier of the grid: the sum over the blocks before this one, and
// over all.
struct BlockSums {
  int32_t before, all;
};
template <int kThreads = kGridThreads>
__device__ BlockSums sum_blocks(const int32_t* of_block) {
  const unsigned t = threadIdx.x;
  const uint64_t value = t < gridDim.x ? of_block[t] : 0;
  const uint64_t sums = block_sum<kThreads>(t < blockIdx.x ? value << 32 | value : value);  // both: neither has 32 bits
  return {static_cast<int32_t>(sums >> 32), static_cast<int32_t>(sums)};
}

template <int kThreads = kGridThreads>
__device__ uint64_t or_blocks(const uint64_t* of_block) {
  return block_or<kThreads>(threadIdx.x < gridDim.x ? of_block[threadIdx.x] : 0);
}

}  // namespace jaxsparse::cuda
