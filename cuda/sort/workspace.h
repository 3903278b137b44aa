// What the radix sort needs besides its keys, known without a device.
#pragma once

#include "cuda/common/types.h"

namespace jaxsparse::cuda {

constexpr int kDigitBits = 9;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kSortChunks = 16;  // of consecutive blocks' shares
constexpr int kMostPasses = 8;   // of 64 bits
constexpr int64_t kSortCounts = int64_t{kMostPasses} * kSortChunks * kDigits;

constexpr int kLargeShare = 4096;  // keys of a block

// How many counts of digits large shares of n keys have, and the one after them.
constexpr int64_t share_counts(int64_t n) { return (n / kLargeShare + 1) * kDigits; }

// Bytes of two buffers of n keys and n values, and of the digit counts of each pass and of large shares.
constexpr int64_t sort_workspace(int64_t n) {
  return 2 * padded(8 * n) + 2 * padded(4 * n) + 4 * kSortCounts + padded(4 * share_counts(n));
}

}  // namespace jaxsparse::cuda
