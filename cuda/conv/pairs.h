// The (input row, output row) pairs of a kernel map, tap by tap, as the gradient of the weights needs them. Of a map that is
// its own reverse, the pairs of tap taps - 1 - k are those of tap k with their rows exchanged, and are not listed.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/types.h"

namespace jaxsparse::cuda {

struct Pair {
  int32_t in_row, out_row;
};

struct PairsArgs {
  const int32_t* table;   // [taps, out_rows]
  const uint32_t* masks;  // [out_rows, mask_words]: the taps for which the table has an entry
  Segments out_rows;
  int32_t taps, mask_words;
  int32_t listed;      // taps whose pairs are written: all or, of a map that is its own reverse, the first (taps + 1) / 2
  Pair* pairs;         // [listed, out_rows]: the first tap_pairs[k] of tap k are written, in the order of output rows
  int32_t* tap_pairs;  // [taps]
  void* workspace;     // pairs_workspace(listed, out_rows)
};

cudaError_t list_pairs(const PairsArgs& args, cudaStream_t stream);

constexpr int kPairShares = 64;  // shares of the output rows; the pairs of each are counted

constexpr int64_t pairs_workspace(int64_t listed, int64_t out_rows) {
  const int64_t counts_bytes = 4 * kTapsOfWord * div_up(listed, kTapsOfWord);  // of all taps listed
  return padded(counts_bytes * kPairShares) + padded(counts_bytes * div_up(out_rows, 32));
}

}  // namespace jaxsparse::cuda
