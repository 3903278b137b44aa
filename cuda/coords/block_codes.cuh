// Codes of blocks of coarse sites: numbers in (batch, Morton) order, with as few bits as the fine sites' extent allows.
#pragma once

#include "cuda/coords/reached.cuh"

namespace jaxsparse::cuda {

// Replaces each value by its maximum over the thread block, all threads of which call it.
template <int N>
__device__ void block_max(uint32_t (&values)[N]) {
  __shared__ uint32_t highest[N];
  if (threadIdx.x < N) highest[threadIdx.x] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const uint32_t of_warp = __reduce_max_sync(kAllLanes, values[i]);
    if (threadIdx.x % kWarp == 0) atomicMax(&highest[i], of_warp);
  }
  __syncthreads();
  for (int i = 0; i < N; ++i) values[i] = highest[i];
}

// Computes the codes, from look-up tables in shared memory. If coordinates are far from the ends of their range, the high
// bits below the sign bit equal its complement and carry no information. Codes omit them: 22 bits for a scan's blocks.
template <int D>
struct BlockCodes {
  static constexpr int kPart = 4;  // bits of a block's number on an axis per look-up
  static constexpr int kParts = (axis_bits(D) - 1 - block_axis_bits(D, 0) + kPart - 1) / kPart;
  static constexpr int kEntries = D * kParts << kPart;

  uint64_t parts[kEntries];  // [axis, part, value of the part]: its bits in the code
  int low_bits[D];           // per axis, the bits of a coordinate below the sign bit that are kept
  int batch_bits;

  // `highest`: each thread passes the result of one block of extent_kernel, or 0. All threads of the block, at least
  // kEntries, call it; a barrier must follow.
  __device__ void fill(const CoarseAxes<D>& axes, uint32_t (&highest)[1 + D]) {
    block_max(highest);
    if (threadIdx.x == 0) batch_bits = 32 - __clz(highest[0]);
#pragma unroll
    for (int d = 0; d < D; ++d) {
      if (static_cast<int>(threadIdx.x) != 1 + d) continue;
      const uint64_t most = highest[1 + d] + uint64_t{1} + axes.reach[d];
      const int bits = __clzll(axes.stride[d]) + 1 - __clzll(most);  // at least the bits of most / stride
      low_bits[d] = min(max(bits, 0), axis_bits(D) - 1);
    }
    __syncthreads();
    if (threadIdx.x >= kEntries) return;
    const int axis = threadIdx.x / (kParts << kPart), first = threadIdx.x / (1 << kPart) % kParts * kPart;
    uint64_t code = 0;
    for (int b = 0; b < kPart; ++b) {
      const int bit = first + b + block_axis_bits(D, axis);  // counted in the coordinate
      if ((threadIdx.x >> b & 1) == 0 || bit >= low_bits[axis]) continue;
      int place = 0;
      for (int d = 0; d < D; ++d) {
        place += max(min(bit + (d > axis), low_bits[d]) - block_axis_bits(D, d), 0);
      }
      code |= uint64_t{1} << place;
    }
    parts[threadIdx.x] = code;
  }

  __device__ int bits_below_sign() const {
    int bits = 0;
    for (int d = 0; d < D; ++d) bits += max(low_bits[d] - block_axis_bits(D, d), 0);
    return bits;
  }

  __device__ int bits() const { return batch_bits + D + bits_below_sign(); }

  __device__ uint64_t code(uint64_t block) const {
    constexpr BlockNumbers<D> numbers;
    uint64_t top = block >> numbers.batch_shift, code = 0;
#pragma unroll
    for (int d = 0; d < D; ++d) {
      const uint32_t number = static_cast<uint32_t>(block >> numbers.shift[d]);
      top = top << 1 | (number >> (numbers.bits[d] - 1) & 1);
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        code |= parts[(d * kParts + i) << kPart | (number >> i * kPart & ((1 << kPart) - 1))];
      }
    }
    return top << bits_below_sign() | code;
  }
};

}  // namespace jaxsparse::cuda
