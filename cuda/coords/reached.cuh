// The coarse sites whose windows hold a given fine site ("reached" by it), by blocks of 64.
#pragma once

#include <algorithm>

#include "cuda/coords/blocks.cuh"
#include "cuda/coords/coarse_sites.h"

namespace jaxsparse::cuda {

template <int D>
struct CoarseAxes {
  CoarseAxis axis[D];
  int64_t stride[D], reach[D];  // reach: the largest distance of stride * coarse from fine
  int32_t windows;              // the most windows that can hold one fine site
  // At most two windows on each axis, found without divisions or 64-bit numbers, as with kernel 3, stride 2. Then:
  bool are_simple;
  struct {
    int32_t padding, in_stride, shift, kernel;  // in_stride: the stride less 1
    int32_t lowest;                             // the lowest coordinate within the bounds
    uint32_t coords;                            // the number of coordinates within the bounds
  } simple[D];

  explicit CoarseAxes(const CoarseSitesArgs& a)
      : windows(static_cast<int32_t>(windows_per_site(a.geometry))), are_simple(true) {
    const Geometry& g = a.geometry;
    for (int d = 0; d < D; ++d) {
      axis[d] = CoarseAxis(g, d);
      stride[d] = g.stride[d];
      const int64_t below = g.dilation[d] * (g.kernel[d] - 1) - g.padding[d], above = g.padding[d];
      reach[d] = std::max(std::max(below, above), int64_t{0});
      constexpr int64_t most = int64_t{1} << 29;
      are_simple = are_simple && axis[d].most() <= 2 && axis[d].is_simple() && g.stride[d] <= most;
      are_simple = are_simple && g.padding[d] <= most && -g.padding[d] <= most;
      if (!are_simple) continue;
      simple[d] = {static_cast<int32_t>(g.padding[d]), static_cast<int32_t>(g.stride[d] - 1), axis[d].shift(),
                   static_cast<int32_t>(g.kernel[d]), a.bounded ? 0 : INT32_MIN,
                   a.bounded ? static_cast<uint32_t>(std::clamp<int64_t>(a.bounds[d], 0, INT32_MAX)) : UINT32_MAX};
    }
  }
};

// Masks of the sites of a block with the lowest coordinate on an axis. Shifted by bits_in_block(coord): those with another.
template <int D>
struct LowestSites {
  uint64_t on[D];

  constexpr LowestSites() : on() {
    for (int d = 0; d < D; ++d) {
      for (int bit = 0; bit < 64; ++bit) {
        bool lowest = true;
        for (int b = 0; b < block_axis_bits(D, d); ++b) lowest = lowest && (bit >> (b * D + D - 1 - d) & 1) == 0;
        if (lowest) on[d] |= uint64_t{1} << bit;
      }
    }
  }
};

// A coarse coordinate on one axis.
struct OnAxis {
  bool exists, has_key;
  uint32_t number;  // its block's number
  int32_t bits;     // its bits of the site's number in the block
};

template <int D>
__device__ OnAxis on_axis(const CoarseSitesArgs& a, int d, bool exists, int64_t coord) {
  exists = exists && (!a.bounded || (coord >= 0 && coord < a.bounds[d]));
  const uint32_t at = static_cast<uint32_t>(coord) + (uint32_t{1} << (axis_bits(D) - 1));
  return {exists, exists && axis_fits(coord, D), at >> block_axis_bits(D, d), bits_in_block<D>(d, static_cast<int32_t>(at))};
}

// The coarse sites that a fine one reaches, by blocks, for simple axes.
template <int D>
struct Reached {
  uint64_t batch;
  uint64_t sites[D][2];  // per axis, a mask in the first block, and one in the second block if there is one
  uint32_t number[D][2];
  int32_t seconds;  // a bit per axis, set if there is a second block
  int32_t outside;  // the number of reached coarse sites without a key

  __device__ Reached(const CoarseAxes<D>& axes, const Site<D>& site)
      : batch(static_cast<uint64_t>(site.batch) << BlockNumbers<D>().batch_shift), seconds(0) {
    constexpr LowestSites<D> lowest;
    constexpr uint32_t all_coords = uint32_t{1} << axis_bits(D);
    int32_t all = 1, with_key = 1;
#pragma unroll
    for (int d = 0; d < D; ++d) {
      const auto& axis = axes.simple[d];
      const int32_t padded = site.coord[d] + axis.padding, tap = padded & axis.in_stride, coarse = padded >> axis.shift;
      bool has_key[2];
      int exist = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t coord = static_cast<uint32_t>(coarse) - i, at = coord + all_coords / 2;
        const bool exists = tap + (i == 0 ? 0 : axis.in_stride + 1) < axis.kernel && coord - axis.lowest < axis.coords;
        has_key[i] = exists && at < all_coords;
        exist += exists;
        sites[d][i] = has_key[i] ? lowest.on[d] << bits_in_block<D>(d, static_cast<int32_t>(at)) : 0;
        number[d][i] = at >> block_axis_bits(D, d);
      }
      if (has_key[0] && number[d][0] == number[d][1]) {
        sites[d][0] |= sites[d][1];
      } else if (has_key[1]) {
        seconds |= 1 << d;
      }
      all *= exist;
      with_key *= has_key[0] + has_key[1];
    }
    outside = all - with_key;
  }

  // The mask of reached sites in one block: the second one on axes whose bit in `which` is set, the first one on others.
  __device__ uint64_t in_block(int32_t which, uint64_t* block) const {
    constexpr BlockNumbers<D> numbers;
    uint64_t reached = ~uint64_t{0};
    *block = batch;
#pragma unroll
    for (int d = 0; d < D; ++d) {
      const bool second = (which >> d & 1) != 0;
      *block |= static_cast<uint64_t>(second ? number[d][1] : number[d][0]) << numbers.shift[d];
      reached &= second ? sites[d][1] : sites[d][0];
    }
    return reached;
  }
};

// The coarse site of a window that may hold a fine site, as mask and block. Windows are numbered with the last axis fastest.
template <int D>
__device__ uint64_t reached_by(const CoarseSitesArgs& a, const CoarseAxes<D>& axes, const Site<D>& site, int32_t window,
                               uint64_t* block, int32_t* outside) {
  constexpr BlockNumbers<D> numbers;
  int32_t bit = 0;
  bool exists = true, has_key = true;
  *block = static_cast<uint64_t>(site.batch) << numbers.batch_shift;
  for (int d = D - 1; d >= 0; --d) {
    const int32_t most = static_cast<int32_t>(axes.axis[d].most());
    int64_t coord = 0;
    const bool is_one = axes.axis[d].coarse(site.coord[d], window % most, &coord);
    const OnAxis on = on_axis<D>(a, d, is_one, coord);
    exists = exists && on.exists;
    has_key = has_key && on.has_key;
    *block |= static_cast<uint64_t>(on.number) << numbers.shift[d];
    bit |= on.bits;
    window /= most;
  }
  *outside += exists && !has_key;
  return has_key ? uint64_t{1} << bit : 0;
}

}  // namespace jaxsparse::cuda
