// Look-up of the input sites under the window of an output, by blocks of 64 sites.
#pragma once

#include "cuda/coords/blocks.cuh"
#include "cuda/coords/window.h"

namespace jaxsparse::cuda {

// The parts of a geometry that do not depend on the output.
template <int D>
struct WindowShape {
  int32_t stride[D];
  uint32_t dilation[D];  // unsigned: taps past the last one may overflow
  int64_t shift[D];      // the first tap of output 0, counted from the lower end of the coordinate range
  int32_t reach[D];      // distance from the first tap to the last

  explicit WindowShape(const Geometry& g) {
    for (int d = 0; d < D; ++d) {
      stride[d] = static_cast<int32_t>(g.stride[d]);
      dilation[d] = static_cast<uint32_t>(g.dilation[d]);
      shift[d] = (int64_t{1} << (axis_bits(D) - 1)) - g.padding[d];
      reach[d] = static_cast<int32_t>(g.dilation[d] * (g.kernel[d] - 1));
    }
  }
};

// The window of one output.
template <int D>
struct Window {
  uint64_t first_key;  // key of the first block under it
  uint32_t exists[D];  // per axis, a bit per block: set if it is under the window and within the coordinate range
  int32_t offset[D];   // position of the first tap in the first block

  __device__ Window(const WindowShape<D>& shape, const Site<D>& out) {
    constexpr BlockNumbers<D> numbers;
    const bool has_batch = out.batch >= 0 && out.batch <= max_batch(D);
    first_key = static_cast<uint64_t>(out.batch) << numbers.batch_shift;
#pragma unroll
    for (int d = 0; d < D; ++d) {
      const int bits = block_axis_bits(D, d);
      const int64_t first = static_cast<int64_t>(shape.stride[d]) * out.coord[d] + shape.shift[d], block = first >> bits;
      offset[d] = static_cast<int32_t>(first) & ((1 << bits) - 1);
      first_key += static_cast<uint64_t>(block) << numbers.shift[d];
      const int32_t limit = 1 << numbers.bits[d];  // blocks 0 .. limit - 1 have a key
      const int32_t nearest = block < -31 ? -31 : block > limit ? limit : static_cast<int32_t>(block);
      const int32_t blocks = has_batch ? min(((offset[d] + shape.reach[d]) >> bits) + 1, limit - nearest) : 0;
      exists[d] = ((1u << blocks) - 1) & ~0u << max(-nearest, 0);
    }
  }
};

// A site under a window has a place: 64 times its block's number there, plus its number in the block counted from the last
// site. A place is the sum of one share per axis; this is the share of coordinate `at`, counted from the first block under
// the window. `step`: what the next block on this axis adds.
template <int D>
__device__ int32_t place_share(int axis, uint32_t at, uint32_t step) {
  return (at >> block_axis_bits(D, axis)) * step + bits_in_block<D>(axis, static_cast<int32_t>(~at));
}

// Half of a block under a window: which of its 32 sites exist, and the row of the first one, less 1. The second half is
// stored first.
struct alignas(8) HalfBlock {
  uint32_t mask;  // its lowest bit is for the first site
  int32_t row_before;
};

// Stores the sites of block number `block` under the window of the lane's output; a lane's halves are kWarp apart.
__device__ inline void put_block(HalfBlock* under, int32_t block, uint64_t sites, int32_t first_row) {
  const uint32_t low = static_cast<uint32_t>(sites), high = static_cast<uint32_t>(sites >> 32);
  under[2 * block * kWarp] = {high, first_row - 1 + __popc(low)};
  under[(2 * block + 1) * kWarp] = {low, first_row - 1};
}

// The row of the site at a place, -1 if there is none.
__device__ inline int32_t row_at(const HalfBlock* under, int32_t place, int32_t in_rows) {
  const HalfBlock half = under[place & ~31];  // 32 places, kWarp halves
  const uint32_t up_to = half.mask << (place & 31);  // the site's bit is the highest, those of earlier sites lie below
  const int32_t row = half.row_before + __popc(up_to);
  return static_cast<int32_t>(up_to) < 0 && row < in_rows ? row : -1;  // a block's last sites may not have fit the array
}

// The same as WindowShape, for block_kernel: the blocks that a window of any size may lie over.
template <int D>
struct BlocksUnder {
  int32_t across[D], number;  // the most blocks on each axis, and in all
  int32_t step[D];            // see place_share()
  struct {
    uint64_t step;  // its key less that of the first block
    uint8_t at[D];  // its number on each axis
  } block[kMostUnderWindow] = {};

  explicit BlocksUnder(const Geometry& g) {
    constexpr BlockNumbers<D> numbers;
    number = blocks_under_window<D>(g, across);
    for (int d = D - 1, each = 1 << kBlockBits; d >= 0; each *= across[d--]) step[d] = each;
    for (int32_t u = 0; u < number; ++u) {
      block[u].step = 0;
      for (int d = D - 1, rest = u; d >= 0; rest /= across[d--]) {
        block[u].at[d] = static_cast<uint8_t>(rest % across[d]);
        block[u].step += static_cast<uint64_t>(block[u].at[d]) << numbers.shift[d];
      }
    }
  }
};

}  // namespace jaxsparse::cuda
