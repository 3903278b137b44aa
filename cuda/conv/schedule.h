// The schedule of a convolution: the order of its output rows, and the kernel map laid out in tiles in that order.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/types.h"
#include "cuda/conv/tiles.h"

namespace jaxsparse::cuda {

struct ScheduleArgs {
  const int32_t* table;   // [taps, rows]
  const uint32_t* masks;  // [rows, mask_words]
  Segments rows;
  int32_t taps, mask_words;
  // Groups of taps, as masks. A row's sort key has one bit per group, set if the row has any tap of it; the first group is
  // the highest bit. With no groups rows keep their order.
  int32_t groups;
  uint32_t group[kMostGroups][kMostGroupWords];  // 0 from `groups` on
  int32_t* order;        // [rows]: real rows first
  uint32_t* tile_masks;  // [tiles, mask_words]: taps that any row of a tile has
  int32_t* tile_table;   // [tiles, taps, 64 places], written for the taps in tile_masks only; -1 if the row lacks the tap
  void* workspace;       // schedule_workspace(rows)
};

// The place in tile_table of a tile's row, and the row at a place. A thread of the product copies pieces of rows r, r + 16,
// r + 32 and r + 48, and reads their entries in one access.
__host__ __device__ constexpr int place_of_row(int row) { return row % 16 * 4 + row / 16; }
__host__ __device__ constexpr int row_at_place(int place) { return place % 4 * 16 + place / 4; }

// Sorts rows with like masks together and lays the table out in tiles of 64 rows.
cudaError_t schedule(const ScheduleArgs& args, cudaStream_t stream);

constexpr int kScheduleChunks = 16;                      // chunks of rows; the keys of each are counted
constexpr int kScheduleKeys = (1 << kMostGroups) + 1;  // one more for padding rows

constexpr int64_t schedule_workspace(int64_t rows) {
  return padded(4 * kScheduleChunks * kScheduleKeys) + padded(2 * rows);
}

}  // namespace jaxsparse::cuda
