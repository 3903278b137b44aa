// A stable radix sort inside a cooperative kernel, of as many keys as a device value says, by as many bits.
//
// Least significant digit first, 8 bits a pass. In a pass each block counts the digits of its share; after a barrier of
// the grid it sums the counts of the blocks before it, so it knows where each of its digits begins, and scatters its
// share tile by tile. A digit in which all keys agree costs the count alone. No block ever waits for a neighbour, so
// there is nothing to get out of order.
//
// Why not CUB: its sort wants the number of keys and of bits from the host, so it follows the capacity and sorts 64
// bits where a scan has about 36 that differ.
#pragma once

#include "cuda/common/grid.cuh"
#include "cuda/sort/workspace.h"

namespace jaxsparse::cuda {

struct SortBuffers {
  uint64_t* keys;
  uint32_t* values;
  uint64_t* other_keys;  // where a pass writes; then they change places
  uint32_t* other_values;
  int32_t* counts;  // [blocks, kDigits]
};

inline SortBuffers take_sort_buffers(Workspace& workspace, int64_t n) {
  SortBuffers b;
  b.keys = workspace.take<uint64_t>(n);
  b.values = workspace.take<uint32_t>(n);
  b.other_keys = workspace.take<uint64_t>(n);
  b.other_values = workspace.take<uint32_t>(n);
  b.counts = workspace.take<int32_t>(int64_t{kMostBlocks} * kDigits);
  return b;
}

struct SortShared {
  int32_t counts[kGridThreads / kWarp][kDigits];  // of each warp in a tile
  int32_t next[kDigits];                          // where this block's next key of each digit goes
  int32_t sums[2][kDigits];
};

template <typename T>
__device__ void swap(T*& a, T*& b) {
  T* const held = a;
  a = b;
  b = held;
}

constexpr int kSortTile = 2048;
constexpr int kSortPerThread = kSortTile / kGridThreads;

// How many blocks share n keys. A block that takes part costs every other block a row of counts to read in each pass.
__device__ inline int32_t sort_blocks(int32_t n) {
  const int32_t blocks = static_cast<int32_t>(div_up(n, 2 * kSortTile)), most = static_cast<int32_t>(gridDim.x);
  return blocks < 1 ? 1 : blocks < most ? blocks : most;
}

// Scatters the keys and values at [tile.begin, tile.end), at most kSortTile, to shared.next[digit] and on in the other
// buffers. Where `number` is set the values are those positions.
template <typename Digit>
__device__ void scatter_tile(const SortBuffers& b, bool number, Range tile, SortShared& shared, Digit digit_of) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t* own = shared.counts[warp];
  for (int d = lane; d < kDigits; d += kWarp) own[d] = 0;
  __syncwarp();
  uint64_t keys[kSortPerThread];
  uint32_t values[kSortPerThread];
  int32_t ranks[kSortPerThread];  // among the warp's keys of the same digit
#pragma unroll
  for (int i = 0; i < kSortPerThread; ++i) {
    const int32_t at = tile.begin + (warp * kSortPerThread + i) * kWarp + lane;
    const bool exists = at < tile.end;
    keys[i] = exists ? b.keys[at] : 0;
    values[i] = number ? static_cast<uint32_t>(at) : exists ? b.values[at] : 0;
  }
#pragma unroll
  for (int i = 0; i < kSortPerThread; ++i) {
    const int32_t at = tile.begin + (warp * kSortPerThread + i) * kWarp + lane;
    const int digit = at < tile.end ? digit_of(keys[i]) : kDigits;  // past the end: a digit of its own
    const unsigned peers = __match_any_sync(kAllLanes, digit);
    const unsigned below = peers & ((1u << lane) - 1);
    const int32_t before = digit < kDigits ? own[digit] : 0;
    __syncwarp();
    if (below == 0 && digit < kDigits) own[digit] = before + __popc(peers);
    __syncwarp();
    ranks[i] = before + __popc(below);
  }
  __syncthreads();
  if (threadIdx.x < kDigits) {
    int32_t at = shared.next[threadIdx.x];
    for (int w = 0; w < kGridThreads / kWarp; ++w) {
      const int32_t count = shared.counts[w][threadIdx.x];
      shared.counts[w][threadIdx.x] = at;
      at += count;
    }
    shared.next[threadIdx.x] = at;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSortPerThread; ++i) {
    if (tile.begin + (warp * kSortPerThread + i) * kWarp + lane >= tile.end) continue;
    const int32_t to = own[digit_of(keys[i])] + ranks[i];
    b.other_keys[to] = keys[i];
    b.other_values[to] = values[i];
  }
  __syncthreads();
}

// Sorts b.keys, n of them, by the low `bits` bits of code(key). Values need not be set: they become the keys' first
// positions. All blocks call it, after a barrier of the grid; it ends with one.
template <typename Code>
__device__ void radix_sort(Grid grid, SortBuffers& b, int32_t n, int bits, SortShared& shared, Code code) {
  const int32_t blocks = sort_blocks(n);
  const Range own = share(n, kSortTile, blocks);
  bool moved = false;
  for (int bit = 0; bit < bits || !moved; bit += kDigitBits) {
    const bool only_number = bit >= bits;  // no digit differed: a pass that keeps the order numbers the values
    const auto digit_of = [&](uint64_t key) {
      return only_number ? 0 : static_cast<int>(code(key) >> bit & (kDigits - 1));
    };

    int32_t* histogram = shared.sums[0];
    if (threadIdx.x < kDigits) histogram[threadIdx.x] = 0;
    __syncthreads();
    for (int32_t i = own.begin + threadIdx.x; i < own.end; i += kGridThreads) {
      atomicAdd(&histogram[digit_of(b.keys[i])], 1);
    }
    __syncthreads();
    if (threadIdx.x < kDigits) b.counts[blockIdx.x * kDigits + threadIdx.x] = histogram[threadIdx.x];
    grid.sync();

    // Two threads a digit, each for half of the blocks: keys of the digit in blocks before this one, and in all.
    static_assert(kGridThreads == 2 * kDigits);
    const int digit = threadIdx.x % kDigits, half = threadIdx.x / kDigits;
    int32_t before = 0, all = 0;
#pragma unroll 8
    for (int32_t block = half; block < blocks; block += 2) {
      const int32_t count = b.counts[block * kDigits + digit];
      if (block < static_cast<int32_t>(blockIdx.x)) before += count;
      all += count;
    }
    shared.sums[half][digit] = all;
    shared.counts[half][digit] = before;
    __syncthreads();
    const int32_t of_digit = half == 0 ? shared.sums[0][digit] + shared.sums[1][digit] : 0;
    const bool all_agree = __syncthreads_count(of_digit == n) > 0;
    int32_t total;
    const int32_t start = block_exclusive_scan<kGridThreads>(of_digit, &total);
    if (half == 0) shared.next[digit] = start + shared.counts[0][digit] + shared.counts[1][digit];
    __syncthreads();
    if (all_agree && !only_number) {
      grid.sync();  // the counts are read: they may be written again
      continue;
    }
    for (int32_t begin = own.begin; begin < own.end; begin += kSortTile) {
      scatter_tile(b, !moved, {begin, min(begin + kSortTile, own.end)}, shared, digit_of);
    }
    grid.sync();
    swap(b.keys, b.other_keys);
    swap(b.values, b.other_values);
    moved = true;
  }
}

}  // namespace jaxsparse::cuda
