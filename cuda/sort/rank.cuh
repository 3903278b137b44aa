// Stable ranks of small numbers (digits or keys) within a tile of one block: the core of a counting sort.
#pragma once

#include "cuda/common/device.cuh"

namespace jaxsparse::cuda {

// Lives in shared memory. Each warp adds its part of the tile, 32 numbers at a time, which counts each number per warp; then
// sum_up replaces a warp's counts by the sums over the warps before it. A tile has fewer than 2^16 numbers.
template <int kWarps, int kNumbers>
struct Ranks {
  static constexpr int kPairs = (kNumbers + 1) / 2;  // two 16-bit counts are summed as one word
  union {
    uint16_t before[kWarps][2 * kPairs];
    uint32_t pairs[kWarps][kPairs];
  };

  // Clears the warp's counts.
  __device__ void clear() {
    for (int i = threadIdx.x % kWarp; i < kPairs; i += kWarp) pairs[threadIdx.x / kWarp][i] = 0;
    __syncwarp();
  }

  // Each lane adds a number of kBits bits if it exists; returns how often the warp had added the same number before.
  template <int kBits>
  __device__ int32_t add(int number, bool exists) {
    uint16_t* const own = before[threadIdx.x / kWarp];
    unsigned peers = __ballot_sync(kAllLanes, exists);  // lanes with the same number; __match_any_sync is far slower
    if (!exists) peers = ~peers;
#pragma unroll
    for (int bit = 0; bit < kBits; ++bit) {
      const bool is_set = number >> bit & 1;
      const unsigned set = __ballot_sync(kAllLanes, is_set);
      peers &= is_set ? set : ~set;
    }
    const int below = __popc(peers & ((1u << threadIdx.x % kWarp) - 1));
    const int earlier = exists ? own[number] : 0;
    __syncwarp();
    if (below == 0 && exists) own[number] = static_cast<uint16_t>(earlier + __popc(peers));
    __syncwarp();
    return earlier + below;
  }

  // Sums over the first `warps` warps, and advances next[number] by the previous tile's count. *in_tile keeps the tile's
  // counts of the thread's two numbers until the next call. Needs barriers of the block before and after.
  __device__ void sum_up(int warps, int32_t* next, uint32_t* in_tile) {
    const int t = threadIdx.x;
    if (t >= kPairs) return;
    uint32_t sum = 0;
#pragma unroll 8
    for (int w = 0; w < warps; ++w) {
      const uint32_t count = pairs[w][t];
      pairs[w][t] = sum;
      sum += count;
    }
    next[2 * t] += static_cast<int32_t>(*in_tile & 0xffff);
    if (2 * t + 1 < kNumbers) next[2 * t + 1] += static_cast<int32_t>(*in_tile >> 16);
    *in_tile = sum;
  }
};

}  // namespace jaxsparse::cuda
