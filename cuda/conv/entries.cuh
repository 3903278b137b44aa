// Helpers for walking over a kernel map by its masks: a lane per row, only taps that some row of the tile has, and all loads
// from the table in flight.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/common/grid.cuh"

namespace jaxsparse::cuda {

// All rows from here on are padding.
__device__ inline int32_t end_of_real_rows(const Segments& rows) {
  return rows.number == 1 ? real_rows(rows.counts, rows.rows) : rows.rows;
}

// Whether the block begins when others have ended, if so many begin at once. Only then is it worth asking first whether its
// rows are padding: a block of the first waits 0.2 us for the number of real rows, 1 % of a network's time; for later ones
// it lies in L1.
__device__ inline bool begins_late(unsigned at_once) { return blockIdx.x >= at_once; }

// Rows 0 .. n - 1 are divided into kShares shares of whole tiles of 64. Returns the rows of shares first .. end - 1.
template <int kShares>
__device__ Range rows_of_shares(int32_t n, int first, int end) {
  const uint64_t each = share_size(n, 64, kShares), rows = static_cast<uint64_t>(n);
  const uint64_t from = first * each, to = end * each;
  return {static_cast<int32_t>(from < rows ? from : rows), static_cast<int32_t>(to < rows ? to : rows)};
}

// The taps of a slice: every `slices`-th one, starting at number `slice`; `slices` is a power of two.
__device__ inline uint32_t taps_of_slice(uint32_t taps, int slices, int slice) {
  uint32_t each = 1;
  for (int step = kWarp / 2; step >= slices; step /= 2) each |= each << step;
  return taps & each << slice;
}

// Calls f(i, tap), i = 0, 1, ..., for each of at most kMost taps, which are the same in all lanes.
template <int kMost, typename F>
__device__ void for_taps(uint32_t taps, F f) {
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    if (taps != 0) f(i, __ffs(static_cast<int>(taps)) - 1);
    taps &= taps - 1;
  }
}

// For kernels with a block per tile of 64 rows: up to this many tiles, eight warps per tile are faster; beyond, four.
constexpr int kFewTiles = 384;

}  // namespace jaxsparse::cuda
