// The pairs of a kernel map, tap by tap: what the gradient of the weights goes through.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/types.h"

namespace jaxsparse::cuda {

struct Pair {
  int32_t in_row, out_row;
};

struct PairsArgs {
  const int32_t* table;   // [taps, out_rows]
  const uint32_t* masks;  // [out_rows, mask_words]: where the table has an entry
  Segments out_rows;
  int32_t taps, mask_words;
  Pair* pairs;         // [taps, out_rows]: the first tap_pairs[k] of each tap, in the order of output rows
  int32_t* tap_pairs;  // [taps]
  void* workspace;     // pairs_workspace(taps)
};

cudaError_t list_pairs(const PairsArgs& args, cudaStream_t stream);

constexpr int kPairShares = 128;  // of the output rows, whose pairs are counted

constexpr int64_t pairs_workspace(int64_t taps) { return padded(4 * taps * kPairShares); }

}  // namespace jaxsparse::cuda
