// Keys of blocks of 64 sites for hash maps: the batch, then the block's number on each axis, counted from the lower end of
// the coordinate range. Unlike Morton codes they are cheap to compute, also for neighbours, but their order means nothing.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/coords/key.h"

namespace jaxsparse::cuda {

template <int D>
struct BlockNumbers {
  int bits[D];   // bits of the number on each axis
  int shift[D];  // its position in the key
  int batch_shift;

  constexpr BlockNumbers() : bits(), shift(), batch_shift(0) {
    for (int d = D - 1; d >= 0; --d) {
      bits[d] = axis_bits(D) - block_axis_bits(D, d);
      shift[d] = batch_shift;
      batch_shift += bits[d];
    }
  }
};

// Whether two sites that have keys lie in the same block.
template <int D>
__device__ bool same_block(const Site<D>& a, const Site<D>& b) {
  bool same = a.batch == b.batch;
#pragma unroll
  for (int d = 0; d < D; ++d) same = same && (a.coord[d] ^ b.coord[d]) >> block_axis_bits(D, d) == 0;
  return same;
}

// The site of a block whose Morton key ends in the bits `bit`.
template <int D>
__device__ Site<D> block_site(uint64_t block, int bit) {
  constexpr BlockNumbers<D> numbers;
  Site<D> site;
  site.batch = static_cast<int32_t>(block >> numbers.batch_shift);
#pragma unroll
  for (int d = 0; d < D; ++d) {
    const int bits = block_axis_bits(D, d);
    int32_t at = static_cast<int32_t>(block >> numbers.shift[d] & ((1u << numbers.bits[d]) - 1)) << bits;
    for (int b = 0; b < bits; ++b) at |= (bit >> (b * D + D - 1 - d) & 1) << b;
    site.coord[d] = at - (1 << (axis_bits(D) - 1));
  }
  return site;
}

// A cheap hash: three 32-bit products, where the finaliser of MurmurHash3 takes six. Only the high bits are well mixed.
__device__ inline uint32_t hash_block(uint64_t key) {
  const uint32_t mixed = static_cast<uint32_t>(key) * 0x9e3779b1u + static_cast<uint32_t>(key >> 32) * 0x85ebca77u;
  return (mixed ^ mixed >> 15) * 0x2c1b3c6du;
}

}  // namespace jaxsparse::cuda
