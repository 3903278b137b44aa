// What the tree of blocks needs besides its entries, known without a device.
#pragma once

#include "cuda/common/types.h"
#include "cuda/coords/key.h"

namespace jaxsparse::cuda {

// How many nodes the tree's top level may have, how many children a node, and how many levels above the leaves there may
// be for codes of 64 bits.
constexpr int kTopBits = 16;
constexpr int64_t kTopNodes = int64_t{1} << kTopBits;
constexpr int kTreeDigitBits = 6;
constexpr int kMostLevels = (64 - kTopBits + kTreeDigitBits - 1) / kTreeDigitBits;

// Bytes of the nodes for so many entries, and of the counts of up to kMostBlocks blocks.
constexpr int64_t tree_workspace(int64_t entries) {
  return 12 * kTopNodes + 3 * padded(8 * entries) + 3 * padded(4 * entries) + (kMostLevels + 1) * padded(4 * 512);
}

}  // namespace jaxsparse::cuda
