// Site keys, and the relation of coarse and fine coordinates: shared by CPU and GPU code, so that both give the same bits.
//
// A site is int32 [1 + D]: batch, then D coordinates, D = 1..4. Its key has 64 bits: the batch above the Morton code of the
// coordinates. These are offset by half their range, so that order is numeric; the first axis is the most significant in
// each group of bits. Sorting keys sorts sites by (batch, Morton); dropping low bits moves to a coarser grid.
//
//     D   bits an axis   coordinate range     batch
//     1        31        +- 1,073,741,824      0 .. 2^31 - 1
//     2        24        +- 8,388,608         0 .. 65,534
//     3        18        +- 131,072           0 .. 1,022
//     4        14        +- 8,192             0 .. 254
//
// The all-ones key, kNoKey, is never a site.
#pragma once

#include <cstdint>

#include "cuda/common/host_device.h"
#include "cuda/hash/hash.h"

namespace jaxsparse {

using Key = uint64_t;

constexpr int kMaxDims = 4;
constexpr int32_t kPaddingCoord = INT32_MIN;  // every entry of a padding row

JAXSPARSE_HD constexpr int axis_bits(int dims) { return dims == 1 ? 31 : dims == 2 ? 24 : dims == 3 ? 18 : 14; }

JAXSPARSE_HD constexpr int64_t max_batch(int dims) {
  return dims == 1 ? INT32_MAX : (int64_t{1} << (64 - dims * axis_bits(dims))) - 2;
}

// Spreads the bits of v so that D - 1 zero bits follow each.
template <int D>
JAXSPARSE_HD uint64_t spread_bits(uint64_t v) {
  if constexpr (D == 2) {
    v = (v | v << 16) & 0x0000ffff0000ffffull;
    v = (v | v << 8) & 0x00ff00ff00ff00ffull;
    v = (v | v << 4) & 0x0f0f0f0f0f0f0f0full;
    v = (v | v << 2) & 0x3333333333333333ull;
    v = (v | v << 1) & 0x5555555555555555ull;
  } else if constexpr (D == 3) {
    v = (v | v << 32) & 0x001f00000000ffffull;
    v = (v | v << 16) & 0x001f0000ff0000ffull;
    v = (v | v << 8) & 0x100f00f00f00f00full;
    v = (v | v << 4) & 0x10c30c30c30c30c3ull;
    v = (v | v << 2) & 0x1249249249249249ull;
  } else if constexpr (D == 4) {
    v = (v | v << 24) & 0x000000ff000000ffull;
    v = (v | v << 12) & 0x000f000f000f000full;
    v = (v | v << 6) & 0x0303030303030303ull;
    v = (v | v << 3) & 0x1111111111111111ull;
  }
  return v;
}

// The inverse of spread_bits: gathers every D-th bit of v.
template <int D>
JAXSPARSE_HD uint64_t gather_bits(uint64_t v) {
  if constexpr (D == 2) {
    v &= 0x5555555555555555ull;
    v = (v | v >> 1) & 0x3333333333333333ull;
    v = (v | v >> 2) & 0x0f0f0f0f0f0f0f0full;
    v = (v | v >> 4) & 0x00ff00ff00ff00ffull;
    v = (v | v >> 8) & 0x0000ffff0000ffffull;
    v = (v | v >> 16) & 0x00000000ffffffffull;
  } else if constexpr (D == 3) {
    v &= 0x1249249249249249ull;
    v = (v | v >> 2) & 0x10c30c30c30c30c3ull;
    v = (v | v >> 4) & 0x100f00f00f00f00full;
    v = (v | v >> 8) & 0x001f0000ff0000ffull;
    v = (v | v >> 16) & 0x001f00000000ffffull;
    v = (v | v >> 32) & 0x00000000001fffffull;
  } else if constexpr (D == 4) {
    v &= 0x1111111111111111ull;
    v = (v | v >> 3) & 0x0303030303030303ull;
    v = (v | v >> 6) & 0x000f000f000f000full;
    v = (v | v >> 12) & 0x000000ff000000ffull;
    v = (v | v >> 24) & 0x000000000000ffffull;
  } else {
    v &= 0x7fffffffull;
  }
  return v;
}

JAXSPARSE_HD bool axis_fits(int64_t coord, int dims) {
  const int64_t half = int64_t{1} << (axis_bits(dims) - 1);
  return coord >= -half && coord < half;
}

// A key is the OR of a part for the batch and one for each axis. A part that is out of range is all ones, which makes the
// key kNoKey. Coordinates are int64 so that a caller's arithmetic cannot overflow.
template <int D>
JAXSPARSE_HD Key batch_part(int64_t batch) {
  return batch < 0 || batch > max_batch(D) ? kNoKey : static_cast<Key>(batch) << (D * axis_bits(D));
}

template <int D>
JAXSPARSE_HD Key axis_part(int axis, int64_t coord) {
  if (!axis_fits(coord, D)) return kNoKey;
  const uint64_t offset = static_cast<uint64_t>(coord + (int64_t{1} << (axis_bits(D) - 1)));
  return spread_bits<D>(offset) << (D - 1 - axis);
}

template <int D, typename Coord>
JAXSPARSE_HD Key make_key(int64_t batch, const Coord* coord) {
  Key key = batch_part<D>(batch);
  for (int a = 0; a < D; ++a) key |= axis_part<D>(a, coord[a]);
  return key;
}

template <int D>
JAXSPARSE_HD bool has_key(int32_t batch, const int32_t* coord) {
  bool fits = batch >= 0 && batch <= max_batch(D);
  for (int a = 0; a < D; ++a) fits = fits && axis_fits(coord[a], D);
  return fits;
}

// Writes the site of a key, int32 [1 + D].
template <int D>
JAXSPARSE_HD void write_site(Key key, int32_t* site) {
  constexpr int bits = axis_bits(D);
  site[0] = static_cast<int32_t>(key >> (D * bits));
  const Key code = key & ((Key{1} << (D * bits)) - 1);
  for (int a = 0; a < D; ++a) {
    site[1 + a] = static_cast<int32_t>(static_cast<int64_t>(gather_bits<D>(code >> (D - 1 - a))) -
                                       (int64_t{1} << (bits - 1)));
  }
}

template <int D>
JAXSPARSE_HD void write_padding(int32_t* site) {
  for (int a = 0; a < 1 + D; ++a) site[a] = kPaddingCoord;
}

// A row without a key may hold a reason in place of its batch: -1 for the first of kReasons reasons, -2 for the second, ...
constexpr int kReasons = 8;

// A block is the 64 sites whose keys agree in all but the last six bits: 64, 8^2, 4^3 or 2 x 2 x 4 x 4 sites in 1 to 4
// dimensions. Sorted sites of a block are consecutive, in the order of those bits. So a 64-bit mask of a block's sites and
// the row of its first one give the row of each.
constexpr int kBlockBits = 6;
constexpr uint64_t kInBlock = (uint64_t{1} << kBlockBits) - 1;

JAXSPARSE_HD constexpr int block_axis_bits(int dims, int axis) {
  return kBlockBits / dims + (dims - 1 - axis < kBlockBits % dims ? 1 : 0);
}

// A coordinate's bits among the last six of a key.
template <int D>
JAXSPARSE_HD int32_t bits_in_block(int axis, int32_t coord) {
  int32_t bits = 0;
  for (int b = 0; b < block_axis_bits(D, axis); ++b) bits |= (coord >> b & 1) << (b * D + D - 1 - axis);
  return bits;
}

// The kernel's geometry, one entry per axis. One relation serves every op:
//     fine = stride * coarse - padding + dilation * tap,   tap = 0 .. kernel - 1
// Taps are numbered row-major over the axes, the last axis fastest.
struct Geometry {
  int dims;
  int64_t kernel[kMaxDims];
  int64_t stride[kMaxDims];
  int64_t padding[kMaxDims];
  int64_t dilation[kMaxDims];

  JAXSPARSE_HD int64_t volume() const {
    int64_t v = 1;
    for (int a = 0; a < dims; ++a) v *= kernel[a];
    return v;
  }

  // Splits a flat tap number into one tap per axis.
  JAXSPARSE_HD void split_tap(int64_t flat, int64_t* tap) const {
    for (int a = dims - 1; a >= 0; --a) {
      tap[a] = flat % kernel[a];
      flat /= kernel[a];
    }
  }

  JAXSPARSE_HD int64_t fine(int axis, int64_t coarse, int64_t tap) const {
    return stride[axis] * coarse - padding[axis] + dilation[axis] * tap;
  }
};

// For one axis: the coarse coordinates whose windows hold a given fine coordinate.
class CoarseAxis {
 public:
  CoarseAxis() = default;
  JAXSPARSE_HD CoarseAxis(const Geometry& g, int axis)
      : kernel_(g.kernel[axis]), stride_(g.stride[axis]), padding_(g.padding[axis]), dilation_(g.dilation[axis]) {
    period_ = stride_ / gcd(stride_, dilation_);
    most_ = (kernel_ + period_ - 1) / period_;
    shift_ = 0;
    while (int64_t{1} << shift_ < stride_) ++shift_;
    if (int64_t{1} << shift_ != stride_) shift_ = -1;
  }

  // At most this many windows hold one fine coordinate.
  JAXSPARSE_HD int64_t most() const { return most_; }

  // Whether coarse() needs no division, which is slow on a GPU.
  JAXSPARSE_HD bool is_simple() const { return dilation_ == 1 && shift_ >= 0; }

  // Base 2 logarithm of the stride, -1 if it is not a power of two.
  JAXSPARSE_HD int shift() const { return shift_; }

  // The i-th of these coarse coordinates, i = 0 .. most() - 1. False if there is no i-th one.
  JAXSPARSE_HD bool coarse(int64_t fine, int64_t i, int64_t* out) const {
    const int64_t padded = fine + padding_;
    if (is_simple()) {
      const int64_t tap = (padded & (stride_ - 1)) + i * stride_;
      *out = (padded - tap) >> shift_;
      return tap < kernel_;
    }
    for (int64_t first = 0; first < period_ && first < kernel_; ++first) {
      if ((padded - dilation_ * first) % stride_ != 0) continue;
      const int64_t tap = first + i * period_;
      *out = (padded - dilation_ * tap) / stride_;
      return tap < kernel_;
    }
    return false;
  }

 private:
  JAXSPARSE_HD static int64_t gcd(int64_t a, int64_t b) {
    while (b) {
      const int64_t t = a % b;
      a = b;
      b = t;
    }
    return a;
  }

  int64_t kernel_, stride_, padding_, dilation_;
  int64_t period_, most_;  // taps that give an integer coarse coordinate are `period_` apart
  int shift_;
};

}  // namespace jaxsparse
