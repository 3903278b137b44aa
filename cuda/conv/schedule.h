// In which order a convolution computes its output rows, and the kernel map laid out in that order.
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
  // Rows are sorted by which of these groups of taps they have any of, as masks, the first the highest bit; with no
  // groups they keep their order.
  int32_t groups;
  uint32_t group[kMostGroups][kMostGroupWords];  // 0 from there on
  int32_t* order;        // [rows]: real rows first
  uint32_t* tile_masks;  // [tiles, mask_words]: taps that any row of a tile has
  int32_t* tile_table;   // [tiles, taps, 64], written for those taps: -1 where the row lacks it
  void* workspace;       // schedule_workspace(rows)
};

// Sorts rows with like masks together and lays the table out in tiles of 64 rows.
cudaError_t schedule(const ScheduleArgs& args, cudaStream_t stream);

constexpr int kScheduleChunks = 16;                      // of rows, whose keys are counted
constexpr int kScheduleKeys = (1 << kMostGroups) + 1;  // and that of rows that are not real

constexpr int64_t schedule_workspace(int64_t rows) {
  return padded(4 * kScheduleChunks * kScheduleKeys) + padded(2 * rows);
}

}  // namespace jaxsparse::cuda
