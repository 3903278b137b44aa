// How kernel maps are built, on CPU and GPU, and the blocks of 64 sites under the window of an output.
#pragma once

#include "cuda/coords/key.h"

namespace jaxsparse {

// All builders give the same map.
enum class MapBuilder {
  kHash = 0,    // an index of sites, one search per tap; sites may have any order
  kBlocks = 1,  // an index of blocks, one search per block under a window; needs sorted sites, and at most
                // kMostUnderWindow blocks under a window
};

// On one axis: a window lies over `blocks` blocks, and its first tap is `offset` sites after the start of the first.
struct WindowAxis {
  int64_t first_block;  // counted from the lower end of the coordinate range
  int32_t offset, blocks;

  // The lowest coordinate of the i-th block under the window; it may be out of range.
  template <int D>
  JAXSPARSE_HD int64_t first_site(int axis, int32_t i) const {
    return ((first_block + i) << block_axis_bits(D, axis)) - (int64_t{1} << (axis_bits(D) - 1));
  }
};

template <int D>
JAXSPARSE_HD WindowAxis window_axis(const Geometry& g, int axis, int32_t coarse) {
  const int bits = block_axis_bits(D, axis);
  const int64_t first = g.fine(axis, coarse, 0) + (int64_t{1} << (axis_bits(D) - 1));
  const int64_t offset = first & ((int64_t{1} << bits) - 1);
  const int64_t last = offset + g.dilation[axis] * (g.kernel[axis] - 1);
  return {first >> bits, static_cast<int32_t>(offset), static_cast<int32_t>((last >> bits) + 1)};
}

constexpr int kMostUnderWindow = 27;  // blocks: 3 on each of three axes, for kernels up to 9^3

// Returns the most blocks that a window can lie over (kMostUnderWindow + 1 if more); `across` gets the most on each axis.
template <int D>
JAXSPARSE_HD int blocks_under_window(const Geometry& g, int32_t (&across)[D]) {
  int64_t blocks = 1;
  for (int a = 0; a < D; ++a) {
    const int bits = block_axis_bits(D, a);
    const int64_t reach = g.dilation[a] * (g.kernel[a] - 1);
    const bool aligned = g.stride[a] % (int64_t{1} << bits) == 0 && g.padding[a] % (int64_t{1} << bits) == 0;
    const int64_t worst = aligned ? 0 : (int64_t{1} << bits) - 1;  // largest offset of a window's first tap
    const int64_t most = ((worst + reach) >> bits) + 1;
    across[a] = static_cast<int32_t>(most <= kMostUnderWindow ? most : kMostUnderWindow + 1);
    blocks *= across[a];
    if (blocks > kMostUnderWindow) return kMostUnderWindow + 1;
  }
  return static_cast<int>(blocks);
}

// Whether the builder "blocks" can be used for a geometry.
inline bool blocks_can_serve(const Geometry& g) {
  int32_t one[1], two[2], three[3], four[4];
  switch (g.dims) {
    case 1: return blocks_under_window<1>(g, one) <= kMostUnderWindow;
    case 2: return blocks_under_window<2>(g, two) <= kMostUnderWindow;
    case 3: return blocks_under_window<3>(g, three) <= kMostUnderWindow;
    default: return blocks_under_window<4>(g, four) <= kMostUnderWindow;
  }
}

}  // namespace jaxsparse
