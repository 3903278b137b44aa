// Sizes and workspace of the radix sort, as plain C++ for host code.
#pragma once

#include "cuda/common/types.h"

namespace jaxsparse::cuda {

constexpr int kDigitBits = 9;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kSortChunks = 16;  // a chunk is the shares of consecutive blocks
constexpr int kMostPasses = 8;   // for 64 bits
constexpr int64_t kSortCounts = int64_t{kMostPasses} * kSortChunks * kDigits;

constexpr int kLargeShare = 4096;  // keys per block from which a share counts as large

// The number of digit counts for large shares of n keys, with room for one further share.
constexpr int64_t share_counts(int64_t n) { return (n / kLargeShare + 1) * kDigits; }

// Bytes for two buffers of n keys and n values, and for the digit counts of all passes and of large shares.
constexpr int64_t sort_workspace(int64_t n) {
  return 2 * padded(8 * n) + 2 * padded(4 * n) + 4 * kSortCounts + padded(4 * share_counts(n));
}

}  // namespace jaxsparse::cuda
