// A stable radix sort inside a cooperative kernel, of as many keys as a device value says, by as many bits.
//
// Least significant digit first, up to 9 bits a pass: 36 bits, a scan's, are four. In a pass each block counts the digits
// of its share; a warp a digit turns the blocks' counts into where each block's keys begin, or each block does for itself
// where they are few; each block scatters its share tile by tile. A digit in which all keys agree costs the count alone.
// No block ever waits for its neighbour, only all for all, so there is nothing to get out of order.
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
  int32_t* counts;  // [kDigits, kMostBlocks], of each block; then of the blocks before it
  int32_t* totals;  // [kDigits]
};

inline SortBuffers take_sort_buffers(Workspace& workspace, int64_t n) {
  SortBuffers b;
  b.keys = workspace.take<uint64_t>(n);
  b.values = workspace.take<uint32_t>(n);
  b.other_keys = workspace.take<uint64_t>(n);
  b.other_values = workspace.take<uint32_t>(n);
  b.counts = workspace.take<int32_t>(int64_t{kMostBlocks} * kDigits);
  b.totals = workspace.take<int32_t>(kDigits);
  return b;
}

struct SortShared {
  int32_t counts[kGridThreads / kWarp][kDigits];  // of each warp in a tile
  int32_t next[kDigits];                          // where this block's next key of each digit goes
};

template <typename T>
__device__ void swap(T*& a, T*& b) {
  T* const held = a;
  a = b;
  b = held;
}

constexpr int kFewBlocks = 32;  // with more, a barrier costs less than reading all counts in all blocks
constexpr int kSortPerThread = 3;
constexpr int kSortTile = kSortPerThread * kGridThreads;

// How many blocks share n keys: one a tile, as far as they go.
__device__ inline int32_t sort_blocks(int32_t n) {
  const int32_t tiles = static_cast<int32_t>(div_up(n, kSortTile)), most = static_cast<int32_t>(gridDim.x);
  return tiles < 1 ? 1 : tiles < most ? tiles : most;
}

// Scatters the keys and values at [tile.begin, tile.end), at most kSortTile, to shared.next[digit] and on in the other
// buffers. Where `number` is set the values are those positions.
template <typename Digit>
__device__ void scatter_tile(const SortBuffers& b, bool number, Range tile, int digit_bits, SortShared& shared,
                             Digit digit_of) {
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
    const bool exists = at < tile.end;
    const int digit = exists ? digit_of(keys[i]) : 0;
    unsigned peers = __ballot_sync(kAllLanes, exists);  // lanes with this lane's digit; __match_any_sync is far slower
    if (!exists) peers = ~peers;
    for (int bit = 0; bit < digit_bits; ++bit) {
      const bool is_set = digit >> bit & 1;
      const unsigned set = __ballot_sync(kAllLanes, is_set);
      peers &= is_set ? set : ~set;
    }
    const unsigned below = peers & ((1u << lane) - 1);
    const int32_t before = exists ? own[digit] : 0;
    __syncwarp();
    if (below == 0 && exists) own[digit] = before + __popc(peers);
    __syncwarp();
    ranks[i] = before + __popc(below);
  }
  __syncthreads();
  int32_t next = shared.next[threadIdx.x];  // a digit a thread
#pragma unroll
  for (int w = 0; w < kGridThreads / kWarp; ++w) {
    const int32_t count = shared.counts[w][threadIdx.x];
    shared.counts[w][threadIdx.x] = next;
    next += count;
  }
  shared.next[threadIdx.x] = next;
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

// Replaces, for each digit, the blocks' counts by the sums over the blocks before them; totals are the sums over all.
__device__ inline void count_before(const SortBuffers& b, int32_t blocks) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t digit = global_thread() / kWarp; digit < kDigits; digit += all_threads() / kWarp) {
    int32_t* const counts = b.counts + digit * kMostBlocks;
    int32_t sum = 0;
    for (int32_t first = 0; first < blocks; first += kWarp) {
      const int32_t own = first + lane < blocks ? counts[first + lane] : 0;
      int32_t upto = own;
      for (int step = 1; step < kWarp; step *= 2) {
        const int32_t below = __shfl_up_sync(kAllLanes, upto, step);
        if (lane >= step) upto += below;
      }
      if (first + lane < blocks) counts[first + lane] = sum + upto - own;
      sum += __shfl_sync(kAllLanes, upto, kWarp - 1);
    }
    if (lane == 0) b.totals[digit] = sum;
  }
}

// Sorts b.keys, n of them, by the low `bits` bits of code(key). Values need not be set: they become the keys' first
// positions. All blocks call it, after a barrier of the grid; it ends with one.
template <typename Code>
__device__ void radix_sort(Grid grid, SortBuffers& b, int32_t n, int bits, SortShared& shared, Code code) {
  static_assert(kGridThreads == kDigits, "a digit a thread");
  const int32_t blocks = sort_blocks(n);
  const Range own = share(n, kSortTile, blocks);
  const int passes = bits > 0 ? (bits + kMostDigitBits - 1) / kMostDigitBits : 1;
  const int digit_bits = (bits + passes - 1) / passes;
  bool moved = false;
  for (int pass = 0; pass < passes; ++pass) {
    const auto digit_of = [&](uint64_t key) {
      return static_cast<int>(code(key) >> (pass * digit_bits) & ((1u << digit_bits) - 1));
    };
    int32_t* histogram = shared.next;
    histogram[threadIdx.x] = 0;
    __syncthreads();
    for (int32_t i = own.begin + threadIdx.x; i < own.end; i += kGridThreads) {
      atomicAdd(&histogram[digit_of(b.keys[i])], 1);
    }
    __syncthreads();
    const int32_t block = static_cast<int32_t>(blockIdx.x);
    int32_t before = 0, all = 0;  // keys of the thread's digit in the blocks before this one, and in all
    if (blocks <= kFewBlocks) {
      // Two sets of counts in turn: a slow block may still read those of a pass that moved nothing.
      int32_t* const counts = b.counts + threadIdx.x * kMostBlocks + pass % 2 * kFewBlocks;
      if (block < blocks) counts[block] = histogram[threadIdx.x];
      grid.sync();
#pragma unroll 8
      for (int32_t other = 0; other < blocks; ++other) {
        const int32_t count = counts[other];
        if (other < block) before += count;
        all += count;
      }
    } else {
      int32_t* const own_count = b.counts + threadIdx.x * kMostBlocks + block;
      if (block < blocks) *own_count = histogram[threadIdx.x];
      grid.sync();
      count_before(b, blocks);
      grid.sync();
      if (block < blocks) before = *own_count;
      all = b.totals[threadIdx.x];
    }
    // Where all keys agree the order stays; only the last chance to number the values is not left out.
    const bool all_agree = __syncthreads_count(all == n) > 0;
    const bool can_skip = all_agree && (moved || pass + 1 < passes);
    int32_t total;
    const int32_t start = block_exclusive_scan<kGridThreads>(all, &total);
    shared.next[threadIdx.x] = start + before;
    __syncthreads();
    if (can_skip) continue;  // a count is written next by the thread that has read it
    for (int32_t begin = own.begin; begin < own.end; begin += kSortTile) {
      scatter_tile(b, !moved, {begin, min(begin + kSortTile, own.end)}, digit_bits, shared, digit_of);
    }
    grid.sync();
    swap(b.keys, b.other_keys);
    swap(b.values, b.other_values);
    moved = true;
  }
}

}  // namespace jaxsparse::cuda
