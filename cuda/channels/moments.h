// Sums over real rows, channel by channel: what batch normalisation needs, forward and backward.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/types.h"

namespace jaxsparse::cuda {

// The rows are divided into so many shares, whatever the device: they decide how sums are split. Two blocks for each
// multiprocessor of an H100.
constexpr int kMomentShares = 264;

struct MomentsArgs {
  Dtype dtype;           // of a and b; accumulators are float32, and float64 for float64
  const void* a;         // [rows, channels]
  const void* b;         // [rows, channels]
  const void* center;    // [channels], accumulators
  const int32_t* count;  // [1]
  int32_t rows, channels;
  void* sum;        // [channels], accumulators: of b
  void* product;    // [channels], accumulators: of (a - center) * b
  void* workspace;  // moments_workspace(...)
};

cudaError_t channel_moments(const MomentsArgs& args, cudaStream_t stream);

struct StatisticsArgs {
  Dtype dtype;           // of x
  const void* x;         // [rows, channels]
  const int32_t* count;  // [1]
  int32_t rows, channels;
  void* mean;       // [channels], accumulators; 0 without real rows
  void* squares;    // [channels], accumulators: the sum of (x - mean)^2
  void* workspace;  // moments_workspace(...)
};

cudaError_t channel_statistics(const StatisticsArgs& args, cudaStream_t stream);

constexpr int64_t moments_workspace(int64_t channels, Dtype dtype) {
  return 2 * kMomentShares * channels * accumulator_bytes(dtype);
}

}  // namespace jaxsparse::cuda
