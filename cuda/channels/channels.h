// Sums over real rows per channel, and the normalisation of features by them: batch norm, forward and backward.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/types.h"

namespace jaxsparse::cuda {

// A block handles 32 or 64 channels and a share of the rows. The number of shares affects the order of summation, so it
// depends only on the channels, not on the device. In all about one block per multiprocessor of an H100.
constexpr int kChannelBlocks = 132;

constexpr int64_t shares_of(int64_t tiles) { return tiles < kChannelBlocks ? kChannelBlocks / tiles : 1; }

constexpr int64_t channels_workspace(int64_t channels, Dtype dtype) {
  return 2 * shares_of(div_up(channels, 64)) * channels * accumulator_bytes(dtype);
}

// Arrays are [rows, channels] of `dtype`. Vectors are [channels] accumulators, float32, or float64 for float64, but scale and
// shift and their gradients are of the type `vectors`.
struct ChannelArgs {
  Dtype dtype, vectors;
  const int32_t* count;  // [1]
  int32_t rows, channels;
  const void* x;
  const void* ct = nullptr;        // the array that is summed; none: x itself
  const void* center = nullptr;    // with ct
  const void* scale = nullptr;     // with ct a gate: ct counts as 0 if (x - center) * scale + shift <= 0
  const void* shift = nullptr;
  const void* inverse = nullptr;   // of batch_norm_grad
  const void* residual = nullptr;  // array, or null; of batch_norm
  double epsilon = 0;
  bool relu = false;
  void* first;            // see below
  void* second;
  void* third = nullptr;
  void* result = nullptr;  // array, 0 on padding rows
  void* workspace;         // channels_workspace(...)
};

// Without ct the mean of x and the sum of (x - mean)^2, zeros without real rows; with ct the sums of ct and (x - center) * ct.
cudaError_t channel_moments(const ChannelArgs& args, cudaStream_t stream);

// mean, variance and inverse = 1 / sqrt(variance + epsilon) of x; (x - mean) * (inverse * scale) + shift + residual, and
// with `relu` 0 where that is negative.
cudaError_t batch_norm(const ChannelArgs& args, cudaStream_t stream);

// The gradient by shift, by scale, and by x, of the batch norm with that mean (`center`) and inverse, where ct is the
// gradient by its result, and with `relu` counts as 0 where the result is.
cudaError_t batch_norm_grad(const ChannelArgs& args, cudaStream_t stream);

}  // namespace jaxsparse::cuda
