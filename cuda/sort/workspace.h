// What the radix sort needs besides its keys, known without a device.
#pragma once

#include "cuda/common/types.h"

namespace jaxsparse::cuda {

constexpr int kDigitBits = 9;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kSortChunks = 16;  // of consecutive blocks' shares
constexpr int kMostPasses = 8;   // of 64 bits
constexpr int64_t kSortCounts = int64_t{kMostPasses} * kSortChunks * kDigits;

// Bytes of two buffers of n keys and n values, and of the digit counts of each pass.
constexpr int64_t sort_workspace(int64_t n) { return 2 * padded(8 * n) + 2 * padded(4 * n) + 4 * kSortCounts; }

}  // namespace jaxsparse::cuda
