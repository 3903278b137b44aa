// Final steps on a block's sums: adding those of all blocks of a cluster, and packing for wide stores.
#pragma once

#include <cstring>

#include "cuda/common/cluster.cuh"
#include "cuda/common/device.cuh"
#include "cuda/common/numbers.cuh"

namespace jaxsparse::cuda {

// Rounds two floats to T and packs them into one word.
template <typename T>
__device__ uint32_t pack(float low, float high) {
  const T both[2] = {narrow<T>(low), narrow<T>(high)};
  uint32_t bits;
  memcpy(&bits, both, 4);
  return bits;
}

// Transposes within a quad of lanes: v[i] was the lane's part of column group i and becomes part i of the lane's own group.
__device__ inline void transpose_quad(uint32_t (&v)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? v[i] : v[i + 1], 1);
    (odd ? v[i] : v[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, high ? v[i] : v[i + 2], 2);
    (high ? v[i] : v[i + 2]) = other;
  }
}

// Adds the sums of all blocks of a cluster, in the order of their ranks. Those of the block's own columns end up at the
// start of `sums`. The caller must call cluster_wait() before the block ends.
template <class P>
__device__ void add_splits(float (&sums)[P::kCols / 2], char* shared, int rank) {
  constexpr int kOwn = P::kOwnCols / 8;
  float4* const shown = reinterpret_cast<float4*>(shared) + threadIdx.x;  // [kCols / 8, kThreads]
#pragma unroll
  for (int j = 0; j < P::kCols / 8; ++j) {
    shown[j * P::kThreads] = make_float4(sums[j * 4], sums[j * 4 + 1], sums[j * 4 + 2], sums[j * 4 + 3]);
  }
  cluster_arrive();
  cluster_wait();
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    float4 sum = load_from_block(shown + (rank * kOwn + j) * P::kThreads, 0);
#pragma unroll
    for (int from = 1; from < P::kSplits; ++from) {
      const float4 v = load_from_block(shown + (rank * kOwn + j) * P::kThreads, from);
      sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
    }
    sums[j * 4] = sum.x, sums[j * 4 + 1] = sum.y, sums[j * 4 + 2] = sum.z, sums[j * 4 + 3] = sum.w;
  }
  cluster_arrive();
}

}  // namespace jaxsparse::cuda
