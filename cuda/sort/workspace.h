// What the radix sort needs besides its keys, known without a device.
#pragma once

#include "cuda/common/types.h"

namespace jaxsparse::cuda {

constexpr int kMostDigitBits = 9;
constexpr int kDigits = 1 << kMostDigitBits;

// Bytes of two buffers of n keys and n values, and of the digit counts of up to kMostBlocks blocks.
constexpr int64_t sort_workspace(int64_t n) {
  return 2 * padded(8 * n) + 2 * padded(4 * n) + padded(int64_t{4} * 513 * kDigits);
}

}  // namespace jaxsparse::cuda
