// Sparse convolution of 16-bit and float32 features: forward works on a schedule, wgrad (gradient of the weights) on pairs.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/types.h"
#include "cuda/conv/pairs.h"
#include "cuda/conv/tiles.h"

namespace jaxsparse::cuda {

struct ConvGemmArgs {
  Dtype dtype, out_dtype;      // dtype of x and w, not kF64; of y: the same, or float32
  bool exact;                  // full float32 products, not TF32
  Tile tile;                   // affects speed; its splits also affect the order of summation
  const void* x;               // [in_rows, in_channels]; in_channels is a multiple of 4
  const void* w;               // [taps, in_channels, out_channels], the last a multiple of 8; float32: the last two swapped
  const int32_t* order;        // these three: a schedule, see schedule.h
  const uint32_t* tile_masks;
  const int32_t* tile_table;
  int32_t out_rows, taps, mask_words, in_channels, out_channels;
  void* y;  // [out_rows, out_channels]
};

// y[m] = sum over taps k of x[table[k, m]] @ w[k] for real rows m, exactly 0 for padding rows.
cudaError_t conv_gemm(const ConvGemmArgs& args, cudaStream_t stream);
cudaError_t conv_gemm_float(const ConvGemmArgs& args, cudaStream_t stream);  // called by conv_gemm for float32

enum class Activation : int32_t { kNone, kRelu, kLeakyRelu, kGelu, kSilu };  // leaky slope 0.01; GELU in its tanh form

// One number per channel: [channels] of float16, bfloat16 or float32, or null.
struct PerChannel {
  const void* data;
  Dtype dtype;
};

// activation((sum - mean) / sqrt(variance + epsilon) * scale + bias + residual) for real rows; null terms are left out.
struct Epilogue {
  PerChannel mean, variance, scale, bias;
  float epsilon;
  const void* residual;  // [out_rows, out_channels], of y's dtype
  Activation activation;
  Segments rows;  // which output rows are real
};

struct FusedConvArgs : ConvGemmArgs {
  int32_t first_channels;  // columns of x; the other channels are in `second`. With one, both are multiples of 8
  const void* second;      // [in_rows, in_channels - first_channels], or null
  Epilogue epilogue;
};

// conv_gemm with an epilogue, rounded once, for 16-bit x and y of the same dtype. Padding rows of y are not written. With one
// tap `order` may be null: row m of y is then row m of x times w, without a schedule.
cudaError_t conv_fused(const FusedConvArgs& args, cudaStream_t stream);

struct WgradGemmArgs {
  Dtype dtype, out_dtype;    // dtype of x and g, not kF64; of dw: the same, or float32
  bool exact;                // full float32 products, not TF32
  Tile tile;                 // affects speed, never the result
  int32_t slots;             // at least twice the taps, see slots.cuh; affects the order of summation
  const void* x;             // [in_rows, in_channels]; in_channels is a multiple of 4
  const void* g;             // [out_rows, out_channels]; out_channels is a multiple of 8
  const Pair* pairs;         // these two: from list_pairs
  const int32_t* tap_pairs;
  int32_t listed;            // taps that have a list, see pairs.h
  int32_t out_rows, taps, in_channels, out_channels;
  void* dw;         // [taps, in_channels, out_channels]
  void* workspace;  // wgrad_gemm_workspace(...)
};

// dw[k] = sum over the pairs (i, m) of tap k of outer(x[i], g[m]).
cudaError_t wgrad_gemm(const WgradGemmArgs& args, cudaStream_t stream);
cudaError_t wgrad_gemm_float(const WgradGemmArgs& args, cudaStream_t stream);

constexpr int64_t wgrad_gemm_workspace(int64_t slots, int64_t in_channels, int64_t out_channels) {
  return 4 * slots * in_channels * out_channels;
}

}  // namespace jaxsparse::cuda
