// Site keys and the index relation: the arithmetic that CPU and GPU code share, so that both give the same bits.
//
// A site is int32 [1 + D]: batch, then D coordinates, D = 1..4. Its key is 64 bits, batch above the Morton code of the
// coordinates (offset by half their range, so that order is numeric; the first axis is the most significant of each
// bit group). Sorting keys sorts sites by (batch, Morton); dropping low bits moves to a coarser grid.
//
//     D   bits an axis   coordinate range     batch
//     1        31        +- 1,073,741,824      0 .. 2^31 - 1
//     2        24        +- 8,388,608         0 .. 65,534
//     3        18        +- 131,072           0 .. 1,022
//     4        14        +- 8,192             0 .. 254
//
// The all-ones key is never a site: it marks empty slots and rows that do not count.
#pragma once

#include <cstdint>

#include "cuda/common/host_device.h"

namespace jaxsparse {

using Key = uint64_t;

constexpr int kMaxDims = 4;
constexpr Key kNoKey = ~Key{0};
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

// A key is the OR of a part for the batch and one for each axis. A part that does not fit is all ones, and so is then
// the key: kNoKey. Coordinates are int64 so that a caller's arithmetic cannot wrap on the way in.
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

template <int D>
JAXSPARSE_HD Key make_key(int64_t batch, const int64_t (&coord)[D]) {
  Key key = batch_part<D>(batch);
  for (int a = 0; a < D; ++a) key |= axis_part<D>(a, coord[a]);
  return key;
}

template <int D>
JAXSPARSE_HD Key key_of_row(const int32_t* site) {
  int64_t coord[D];
  for (int a = 0; a < D; ++a) coord[a] = site[1 + a];
  return make_key<D>(site[0], coord);
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

// The kernel's geometry, an entry an axis. One relation serves every op:
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

  // Splits a flat tap number into one tap an axis.
  JAXSPARSE_HD void split_tap(int64_t flat, int64_t* tap) const {
    for (int a = dims - 1; a >= 0; --a) {
      tap[a] = flat % kernel[a];
      flat /= kernel[a];
    }
  }

  JAXSPARSE_HD int64_t fine(int axis, int64_t coarse, int64_t tap) const {
    return stride[axis] * coarse - padding[axis] + dilation[axis] * tap;
  }

  // Key of the fine site under a coarse site and tap; kNoKey where it does not fit.
  template <int D>
  JAXSPARSE_HD Key fine_key(const int32_t* coarse, const int64_t* tap) const {
    int64_t coord[D];
    for (int a = 0; a < D; ++a) coord[a] = fine(a, coarse[1 + a], tap[a]);
    return make_key<D>(coarse[0], coord);
  }
};

// The i-th coarse coordinate, on one axis, whose window holds `fine`, i = 0 .. coarse_per_axis() - 1. False where
// there is no i-th one.
struct CoarseAxis {
  int64_t kernel, stride, padding, dilation;

  JAXSPARSE_HD static int64_t gcd(int64_t a, int64_t b) {
    while (b) {
      const int64_t t = a % b;
      a = b;
      b = t;
    }
    return a;
  }

  // At most this many taps of one fine coordinate give a whole coarse coordinate.
  JAXSPARSE_HD int64_t coarse_per_axis() const {
    const int64_t period = stride / gcd(stride, dilation);  // taps that give a whole coordinate are this far apart
    return (kernel + period - 1) / period;
  }

  JAXSPARSE_HD bool coarse(int64_t fine, int64_t i, int64_t* out) const {
    const int64_t period = stride / gcd(stride, dilation);
    for (int64_t first = 0; first < period && first < kernel; ++first) {
      const int64_t scaled = fine + padding - dilation * first;
      if (scaled % stride != 0) continue;
      const int64_t tap = first + i * period;
      if (tap >= kernel) return false;
      *out = (fine + padding - dilation * tap) / stride;
      return true;
    }
    return false;
  }
};

// Slot at which the probe sequence of a key starts, in a table of 2^log2_slots slots: the finaliser of MurmurHash3
// (Appleby, public domain), which mixes every bit of the key into every bit of the slot.
JAXSPARSE_HD uint64_t first_slot(Key key, int log2_slots) {
  key ^= key >> 33;
  key *= 0xff51afd7ed558ccdull;
  key ^= key >> 33;
  key *= 0xc4ceb9fe1a85ec53ull;
  key ^= key >> 33;
  return key & ((uint64_t{1} << log2_slots) - 1);
}

}  // namespace jaxsparse
