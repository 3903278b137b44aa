// How kernels go through a kernel map by its masks: a lane a row, only taps that some row of the tile has, all reads
// of the table in flight.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/common/grid.cuh"

namespace jaxsparse::cuda {

// Rows from 0 to here may be real.
__device__ inline int32_t end_of_real_rows(const Segments& rows) {
  return rows.number == 1 ? real_rows(rows.counts, rows.rows) : rows.rows;
}

// The rows below n of shares first .. end - 1 of kShares, in tiles of 64.
template <int kShares>
__device__ Range rows_of_shares(int32_t n, int first, int end) {
  const uint64_t each = share_size(n, 64, kShares), rows = static_cast<uint64_t>(n);
  const uint64_t from = first * each, to = end * each;
  return {static_cast<int32_t>(from < rows ? from : rows), static_cast<int32_t>(to < rows ? to : rows)};
}

// Each `slices`-th tap, a power of two, from the slice's first on.
__device__ inline uint32_t taps_of_slice(uint32_t taps, int slices, int slice) {
  uint32_t each = 1;
  for (int step = kWarp / 2; step >= slices; step /= 2) each |= each << step;
  return taps & each << slice;
}

// Calls f(i, tap) for each of at most kMost taps, i = 0, 1, ...; all lanes have the same.
template <int kMost, typename F>
__device__ void for_taps(uint32_t taps, F f) {
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    if (taps != 0) f(i, __ffs(static_cast<int>(taps)) - 1);
    taps &= taps - 1;
  }
}

// Where tiles of 64 rows have a block each, so few leave room for eight warps a tile; else four are quicker.
constexpr int kFewTiles = 384;

}  // namespace jaxsparse::cuda
