// Sums over real rows, channel by channel: what batch normalisation needs, forward and backward.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/types.h"

namespace jaxsparse::cuda {

// A block has a tile of channels and a share of the rows. How many shares there are depends on the channels alone, not on
// the device: it decides how sums are split. In all a block for each multiprocessor of an H100.
constexpr int kMomentBlocks = 132;

constexpr int64_t moment_shares(int64_t tiles) { return tiles < kMomentBlocks ? kMomentBlocks / tiles : 1; }

struct MomentsArgs {
  Dtype dtype;           // of a and b; accumulators are float32, and float64 for float64
  const void* a;         // [rows, channels], or null
  const void* b;         // [rows, channels]
  const void* center;    // [channels], accumulators; null as a is
  const void* gate_scale;  // [channels], accumulators, or null: b counts as 0 where (a - center) * gate_scale + gate_shift <= 0
  const void* gate_shift;
  const int32_t* count;  // [1]
  int32_t rows, channels;
  void* first;      // [channels], accumulators: the sum of b; without a its mean, 0 without real rows
  void* second;     // [channels], accumulators: the sum of (a - center) * b; without a that of (b - mean)^2
  void* workspace;  // moments_workspace(...)
};

cudaError_t channel_moments(const MomentsArgs& args, cudaStream_t stream);

constexpr int64_t moments_workspace(int64_t channels, Dtype dtype) {
  return 2 * moment_shares(div_up(channels, 64)) * channels * accumulator_bytes(dtype);
}

}  // namespace jaxsparse::cuda
