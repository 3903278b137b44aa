// Sums over real rows per channel, as batch normalisation needs them, forward and backward.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/types.h"

namespace jaxsparse::cuda {

// A block handles a tile of channels and a share of the rows. The number of shares affects the order of summation, so it
// depends only on the channels, not on the device. In all about one block per multiprocessor of an H100.
constexpr int kMomentBlocks = 132;

constexpr int64_t moment_shares(int64_t tiles) { return tiles < kMomentBlocks ? kMomentBlocks / tiles : 1; }

struct MomentsArgs {
  Dtype dtype;           // of a and b; accumulators are float32, or float64 for float64
  const void* a;         // [rows, channels], or null
  const void* b;         // [rows, channels]
  const void* center;    // [channels], accumulators; null if a is
  const void* gate_scale;  // [channels], accumulators, or null: b counts as 0 if (a - center) * gate_scale + gate_shift <= 0
  const void* gate_shift;
  const int32_t* count;  // [1]
  int32_t rows, channels;
  void* first;      // [channels], accumulators: the sum of b; without a, the mean of b, 0 without real rows
  void* second;     // [channels], accumulators: the sum of (a - center) * b; without a, that of (b - mean)^2
  void* workspace;  // moments_workspace(...)
};

cudaError_t channel_moments(const MomentsArgs& args, cudaStream_t stream);

constexpr int64_t moments_workspace(int64_t channels, Dtype dtype) {
  return 2 * moment_shares(div_up(channels, 64)) * channels * accumulator_bytes(dtype);
}

}  // namespace jaxsparse::cuda
