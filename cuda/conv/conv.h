// Sparse convolution of float64 over a kernel map, for any number of channels: forward and wgrad (gradient of the weights).
// The gradient of the features is forward over the reversed map with transposed weights. gemm.h has the other dtypes.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/types.h"
#include "cuda/conv/pairs.h"

namespace jaxsparse::cuda {

struct ConvForwardArgs {
  const double* x;        // [in_rows, in_channels]
  const double* w;        // [taps, in_channels, out_channels]
  const int32_t* table;   // [taps, out_rows]
  const uint32_t* masks;  // [out_rows, mask_words]: the taps for which the table has an entry
  Segments out_rows;
  int32_t in_rows, taps, mask_words, in_channels, out_channels;
  double* y;  // [out_rows, out_channels]
};

// y[m] = sum over taps k of x[table[k, m]] @ w[k] for real rows m, exactly 0 for padding rows.
cudaError_t conv_forward(const ConvForwardArgs& args, cudaStream_t stream);

struct ConvWgradArgs {
  const double* x;        // [in_rows, in_channels]
  const double* g;        // [out_rows, out_channels]
  const int32_t* table;   // [taps, out_rows]
  const uint32_t* masks;  // [out_rows, mask_words]
  Segments out_rows;
  int32_t taps, mask_words, in_channels, out_channels;
  double* dw;       // [taps, in_channels, out_channels]
  void* workspace;  // conv_wgrad_workspace(...)
};

// dw[k] = sum over real rows m of outer(x[table[k, m]], g[m]).
cudaError_t conv_wgrad(const ConvWgradArgs& args, cudaStream_t stream);

// The number of partial sums of [in_channels, out_channels] that wgrad keeps: about 32 MiB, at most 2048, but at least two
// per tap. It decides the order of summation, so it must not depend on the number of rows.
constexpr int64_t wgrad_slots(int64_t taps, int64_t in_channels, int64_t out_channels) {
  const int64_t in_budget = (int64_t{1} << 22) / (in_channels * out_channels);
  const int64_t wanted = in_budget < 2048 ? in_budget : 2048;
  return wanted > 2 * taps ? wanted : 2 * taps;
}

constexpr int64_t conv_wgrad_workspace(int64_t taps, int64_t out_rows, int64_t in_channels, int64_t out_channels) {
  return padded(8 * taps * out_rows) + padded(4 * taps) + pairs_workspace(taps, out_rows)  // pairs
         + 8 * wgrad_slots(taps, in_channels, out_channels) * in_channels * out_channels;
}

}  // namespace jaxsparse::cuda
