// The distinct sites of a list of points, sorted by key, with the points grouped by site.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/coords/key.h"
#include "cuda/sort/workspace.h"

namespace jaxsparse::cuda {

// Bytes of workspace for n points.
constexpr int64_t unique_sites_workspace(int64_t n) { return sort_workspace(n) + padded(16 * 512) + padded(4 * 8 * 512); }

struct UniqueSitesArgs {
  const int32_t* coords;  // [points, 1 + dims]
  const int32_t* count;   // [1]
  int dims;
  int32_t points, capacity;
  int32_t* sites;    // [capacity, 1 + dims]
  int32_t* kept;     // [1]
  int32_t* found;    // [1]
  int32_t* row_of;   // [points]
  int32_t* order;    // [points]
  int32_t* offsets;  // [capacity + 1]
  int32_t* without;  // [kReasons]
  void* workspace;   // unique_sites_workspace(points)
};

// Distinct valid sites sorted by key. The first `capacity` are kept; `kept` counts those, `found` all. row_of[p] is the row
// of point p's site, or -1. The points of row r are order[offsets[r]] .. order[offsets[r + 1] - 1], increasing. without[i]
// counts the points with batch -1 - i.
cudaError_t unique_sites(const UniqueSitesArgs& args, cudaStream_t stream);

}  // namespace jaxsparse::cuda
