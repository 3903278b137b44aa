// Distinct sites, sorted by key: of given points, or of the coarse grid that a strided kernel reaches.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/sort.h"
#include "cuda/coords/key.h"

namespace jaxsparse::cuda {

constexpr int kTileKeys = 2048;  // sorted keys a block looks at

// Bytes of workspace for n candidate keys: two key buffers, a count for each tile, what the sort takes.
constexpr int64_t distinct_workspace(int64_t n) {
  return 2 * padded(8 * n) + padded(4 * (div_up(n, kTileKeys) + 1)) + sort_temp_bound(n);
}

struct UniqueSitesArgs {
  const int32_t* coords;  // [points, 1 + dims]
  const int32_t* count;   // [1]
  int dims;
  int32_t points, capacity;
  int32_t* sites;   // [capacity, 1 + dims]
  int32_t* found;   // [1]
  int32_t* row_of;  // [points]
  void* workspace;  // distinct_workspace(points)
};

// Distinct valid sites sorted by key, the first `capacity` kept; `found` counts them all; row_of[p] is the row of point
// p's site, -1 where it has none.
cudaError_t unique_sites(const UniqueSitesArgs& args, cudaStream_t stream);

struct CoarseSitesArgs {
  const int32_t* coords;  // [rows, 1 + dims]
  const int32_t* count;   // [1]
  Geometry geometry;
  bool bounded;
  int64_t bounds[kMaxDims];
  int32_t rows, capacity;
  int32_t* sites;    // [capacity, 1 + dims]
  int32_t* found;    // [1]
  int32_t* outside;  // [1]
  void* workspace;   // distinct_workspace(rows * windows_per_site(geometry))
};

// How many coarse sites can have one fine site in their window, at most.
inline int64_t windows_per_site(const Geometry& geometry) {
  int64_t windows = 1;
  for (int a = 0; a < geometry.dims; ++a) {
    windows *= CoarseAxis{geometry.kernel[a], geometry.stride[a], geometry.padding[a], geometry.dilation[a]}
                   .coarse_per_axis();
  }
  return windows;
}

// Distinct coarse sites whose window holds a real fine site, sorted by key, the first `capacity` kept; `found` counts
// them all, `outside` the (fine site, tap) pairs within bounds whose coarse coordinate has no key.
cudaError_t coarse_sites(const CoarseSitesArgs& args, cudaStream_t stream);

}  // namespace jaxsparse::cuda
