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

// Arrays are [rows, channels] of `dtype`. Vectors are [channels] accumulators, float32, or float64 for float64, but scale, bias
// and their gradients are of the type `vectors`.
struct ChannelArgs {
  Dtype dtype, vectors;
  const int32_t* count;  // [1]
  int32_t rows, channels;
  const void* x;
  const void* ct = nullptr;       // array
  const void* center = nullptr;   // with ct
  const void* factor = nullptr;   // with ct a gate: ct counts as 0 if (x - center) * factor + shift <= 0
  const void* shift = nullptr;
  const void* inverse = nullptr;
  const void* scale = nullptr;
  const void* bias = nullptr;
  const void* residual = nullptr;  // array, or null
  double epsilon = 0;
  bool relu = false;
  void *first, *second, *third = nullptr, *fourth = nullptr, *fifth = nullptr;  // vectors
  void* result = nullptr;                                                       // array, 0 on padding rows
  void* workspace;                                                              // channels_workspace(...)
};

// Without ct the mean of x and the sum of (x - mean)^2, zeros without real rows; with ct, center and perhaps a gate the sums
// of ct and of (x - center) * ct.
cudaError_t channel_moments(const ChannelArgs& args, cudaStream_t stream);

// Of x, scale, bias, residual, epsilon and relu: mean, variance, inverse = 1 / sqrt(variance + epsilon), factor = inverse *
// scale, and bias once more, and as result (x - mean) * factor + bias + residual, with `relu` 0 where that is negative.
cudaError_t batch_norm(const ChannelArgs& args, cudaStream_t stream);

// The gradients by bias, by scale, and as result by x, of the batch norm with that mean (`center`), inverse, factor and bias
// (`shift`), where ct is the gradient by its result, and with `relu` counts as 0 where the result is.
cudaError_t batch_norm_grad(const ChannelArgs& args, cudaStream_t stream);

}  // namespace jaxsparse::cuda
