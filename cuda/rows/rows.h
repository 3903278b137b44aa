// Sums over groups of rows: an index is inverted into lists of positions, and the rows at these positions are summed.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/types.h"
#include "cuda/sort/workspace.h"

namespace jaxsparse::cuda {

// Bytes of workspace for n positions.
constexpr int64_t invert_index_workspace(int64_t n) { return sort_workspace(n); }

struct InvertIndexArgs {
  const int32_t* index;  // [positions]
  int32_t positions, values;
  int32_t* order;    // [positions]
  int32_t* offsets;  // [values + 1]
  void* workspace;   // invert_index_workspace(positions)
};

// order = the positions p with 0 <= index[p] < values, sorted stably by index[p], then -1. Those of value v are
// order[offsets[v]] .. order[offsets[v + 1] - 1].
cudaError_t invert_index(const InvertIndexArgs& args, cudaStream_t stream);

struct SegmentSumArgs {
  Dtype dtype;
  const void* x;           // [positions, channels]
  const int32_t* order;    // [positions]
  const int32_t* offsets;  // [values + 1]
  int32_t values, channels;
  void* y;  // [values, channels]
};

// y[v] = sum of x[order[j]] over offsets[v] <= j < offsets[v + 1]. The order of summation depends only on their number.
cudaError_t segment_sum(const SegmentSumArgs& args, cudaStream_t stream);

}  // namespace jaxsparse::cuda
