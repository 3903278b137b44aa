// The pairs of a kernel map, tap by tap: what the gradient of the weights goes through.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/types.h"

namespace jaxsparse::cuda {

struct Pair {
  int32_t in_row, out_row;
};

struct PairsArgs {
  const int32_t* table;  // [taps, out_rows]
  Segments out_rows;
  int32_t in_rows, taps;
  Pair* pairs;         // [taps, out_rows]: the first tap_pairs[k] of each tap, in the order of output rows
  int32_t* tap_pairs;  // [taps]
  void* workspace;     // pairs_workspace(...)
};

cudaError_t list_pairs(const PairsArgs& args, cudaStream_t stream);

constexpr int kTilePairRows = 1024;  // output rows that a block looks at

constexpr int64_t pairs_workspace(int64_t taps, int64_t out_rows) {
  return padded(4 * taps * (div_up(out_rows, kTilePairRows) + 1));
}

}  // namespace jaxsparse::cuda
