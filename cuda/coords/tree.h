// Sizes and workspace of the tree of blocks (tree.cuh), as plain C++ for host code.
#pragma once

#include "cuda/common/types.h"
#include "cuda/coords/key.h"

namespace jaxsparse::cuda {

// Bits of the top level's node numbers, the number of its nodes, code bits per further level, and the most levels above the
// leaves, for codes of 64 bits.
constexpr int kTopBits = 16;
constexpr int64_t kTopNodes = int64_t{1} << kTopBits;
constexpr int kTreeDigitBits = 6;
constexpr int kMostLevels = (64 - kTopBits + kTreeDigitBits - 1) / kTreeDigitBits;

// Bytes for the nodes of `entries` entries and the counts of up to kMostBlocks thread blocks.
constexpr int64_t tree_workspace(int64_t entries) {
  return 12 * kTopNodes + 3 * padded(8 * entries) + 3 * padded(4 * entries) + (kMostLevels + 1) * padded(4 * 512);
}

}  // namespace jaxsparse::cuda
