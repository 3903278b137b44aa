// What the tree of sites needs besides its entries, known without a device.
#pragma once

#include "cuda/common/types.h"
#include "cuda/coords/key.h"

namespace jaxsparse::cuda {

// How many nodes the tree's top level may have, and how many levels there may be for keys of 64 bits.
constexpr int kTopBits = 16;
constexpr int64_t kTopNodes = int64_t{1} << kTopBits;
constexpr int kMostLevels = (64 - kTopBits + kBlockBits - 1) / kBlockBits;

// Bytes of the nodes for so many entries, and of the counts of up to kMostBlocks blocks.
constexpr int64_t tree_workspace(int64_t entries) {
  return 16 * kTopNodes + 2 * padded(8 * entries) + 4 * padded(4 * entries) + kMostLevels * padded(4 * 512);
}

}  // namespace jaxsparse::cuda
