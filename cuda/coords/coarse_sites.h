// Coarse sites: the output sites of a strided convolution, which are those whose window holds a fine site.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/coords/key.h"
#include "cuda/coords/tree.h"

namespace jaxsparse::cuda {

// The most coarse sites whose windows can hold one and the same fine site.
inline int64_t windows_per_site(const Geometry& geometry) {
  int64_t windows = 1;
  for (int a = 0; a < geometry.dims; ++a) windows *= CoarseAxis(geometry, a).most();
  return windows;
}

// If coarse coordinates are fine ones shifted right, as for kernel 2 with stride 2: by how many bits; otherwise 0. In this
// case sorted fine sites give sorted coarse ones.
inline int coarse_shift(const Geometry& geometry) {
  int shift = 0;
  while (shift < 30 && (int64_t{1} << shift) < geometry.stride[0]) ++shift;
  for (int a = 0; a < geometry.dims; ++a) {
    const int64_t size = int64_t{1} << shift;
    const bool shifts = geometry.kernel[a] == size && geometry.stride[a] == size && geometry.padding[a] == 0 &&
                        geometry.dilation[a] == 1;
    if (!shifts) return 0;
  }
  return shift;
}

// Bytes of workspace for a number of candidates, which is rows times windows_per_site.
constexpr int64_t coarse_sites_workspace(int64_t candidates) {
  return padded(16 * candidates) + padded(8 * candidates) + tree_workspace(candidates) + padded(4 * 5 * 256) + 2 * padded(4);
}

struct CoarseSitesArgs {
  const int32_t* coords;  // [rows, 1 + dims]
  const int32_t* count;   // [1]
  Geometry geometry;
  bool bounded;
  int64_t bounds[kMaxDims];
  bool sorted;  // the real rows of coords are sites, sorted by key
  int32_t rows, capacity;
  int32_t* sites;    // [capacity, 1 + dims]
  int32_t* kept;     // [1]
  int32_t* found;    // [1]
  int32_t* outside;  // [1]
  void* index;       // of blocks of the kept sites, as site_index makes it; may be null
  void* workspace;   // coarse_sites_workspace(rows * windows_per_site(geometry))
};

// Distinct coarse sites whose window holds a real fine site, sorted by key. The first `capacity` are kept. `kept` counts
// those, `found` all, `outside` the (fine site, tap) pairs within bounds whose coarse coordinate has no key.
cudaError_t coarse_sites(const CoarseSitesArgs& args, cudaStream_t stream);
cudaError_t shifted_sites(const CoarseSitesArgs& args, cudaStream_t stream);  // for sorted sites with coarse_shift > 0

}  // namespace jaxsparse::cuda
