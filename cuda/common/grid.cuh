// Cooperative kernels: one launch whose blocks go through several phases, separated by barriers of the grid.
//
// They suit many short phases whose number and size depend on earlier ones, such as the passes of a sort. A barrier of the
// grid costs 1 to 2 microseconds, no more than another kernel, and a phase that is not needed costs nothing. A launch has at
// most as many blocks as are resident on the device at once, whatever the capacity.
#pragma once

#include <cooperative_groups.h>

#include "cuda/common/device.cuh"

namespace jaxsparse::cuda {

using Grid = cooperative_groups::grid_group;

constexpr int kGridThreads = 512;
constexpr int kMostBlocks = kGridThreads;  // so that a block has a thread for each block's result

// *grid: the number of blocks of a cooperative kernel that `blocks` are wanted of.
template <int kThreads = kGridThreads, typename... Params>
cudaError_t grid_size(void (*kernel)(Params...), int64_t blocks, int* grid, int64_t shared_bytes = 0) {
  return blocks_at_once(kernel, {kThreads, shared_bytes}, blocks < kMostBlocks ? blocks : kMostBlocks, grid);
}

// Launches a cooperative kernel with `blocks` blocks of kThreads threads and so much dynamic shared memory, or as many blocks
// as are resident at once.
template <int kThreads = kGridThreads, typename... Params, typename... Args>
cudaError_t launch_grid_with_shared(void (*kernel)(Params...), int64_t blocks, int64_t shared_bytes, cudaStream_t stream,
                                    Args... args) {
  int grid = 0;
  JAXSPARSE_TRY(grid_size<kThreads>(kernel, blocks, &grid, shared_bytes));
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

template <int kThreads = kGridThreads, typename... Params, typename... Args>
cudaError_t launch_grid(void (*kernel)(Params...), int64_t blocks, cudaStream_t stream, Args... args) {
  return launch_grid_with_shared<kThreads>(kernel, blocks, 0, stream, args...);
}

// A barrier of the grid that overlaps with meanwhile(). What meanwhile() writes is visible to others only after the next
// barrier, and it must not read what others wrote before this one.
template <typename Meanwhile>
__device__ void sync_while(const Grid& grid, Meanwhile meanwhile) {
  Grid::arrival_token arrived = grid.barrier_arrive();
  meanwhile();
  grid.barrier_wait(static_cast<Grid::arrival_token&&>(arrived));
}

struct Range {
  int32_t begin, end;
};

// The size of a block's share of 0 .. n - 1, n < 2^31: a multiple of `unit`, such that `blocks` shares cover all.
__device__ inline uint32_t share_size(uint32_t n, uint32_t unit, uint32_t blocks) {
  return ((n + unit - 1) / unit + blocks - 1) / blocks * unit;  // 32-bit division is much faster than 64-bit
}

// This block's share of 0 .. n - 1. Shares are consecutive; the first `blocks` blocks cover all.
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
  value = or_of_warp(value);
  __syncthreads();  // threads may still read an earlier result
  if (threadIdx.x % kWarp == 0) words[threadIdx.x / kWarp] = value;
  __syncthreads();
  uint64_t all = 0;
  for (int w = 0; w < kWarps; ++w) all |= words[w];
  return all;
}

// of_block[i] is a value of block i, written before the last barrier of the grid. Returns the sum over the blocks before
// this one, and over all.
struct BlockSums {
  int32_t before, all;
};
template <int kThreads = kGridThreads>
__device__ BlockSums sum_blocks(const int32_t* of_block) {
  const unsigned t = threadIdx.x;
  const uint64_t value = t < gridDim.x ? of_block[t] : 0;
  const uint64_t sums = block_sum<kThreads>(t < blockIdx.x ? value << 32 | value : value);  // both below 2^32: in one
  return {static_cast<int32_t>(sums >> 32), static_cast<int32_t>(sums)};
}

template <int kThreads = kGridThreads>
__device__ uint64_t or_blocks(const uint64_t* of_block) {
  return block_or<kThreads>(threadIdx.x < gridDim.x ? of_block[threadIdx.x] : 0);
}

}  // namespace jaxsparse::cuda
