// Sparse convolution of 16-bit and float32 features: forward over a schedule, the gradient of the weights over pairs.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/types.h"
#include "cuda/conv/pairs.h"
#include "cuda/conv/tiles.h"

namespace jaxsparse::cuda {

struct ConvGemmArgs {
  Dtype dtype, out_dtype;      // of x and w, not kF64; of y: the same, or float32
  bool exact;                  // float32 products in full, not rounded to TF32
  Tile tile;                   // changes speed; its splits also in which order sums are added
  const void* x;               // [in_rows, in_channels], a multiple of 4
  const void* w;               // [taps, in_channels, out_channels], a multiple of 8; float32: [taps, out_channels, in_channels]
  const int32_t* order;        // of a schedule, see schedule.h
  const uint32_t* tile_masks;
  const int32_t* tile_table;
  int32_t out_rows, taps, mask_words, in_channels, out_channels;
  void* y;  // [out_rows, out_channels]
};

// y[m] = sum over taps k of x[table[k, m]] @ w[k] for real rows m, exactly 0 for the others.
cudaError_t conv_gemm(const ConvGemmArgs& args, cudaStream_t stream);
cudaError_t conv_gemm_float(const ConvGemmArgs& args, cudaStream_t stream);  // what conv_gemm calls for float32

enum class Activation : int32_t { kNone, kRelu, kLeakyRelu, kGelu, kSilu };  // leaky: 0.01; GELU in tanh's form

// A number for each channel: [channels] of float16, bfloat16 or float32, or null.
struct PerChannel {
  const void* data;
  Dtype dtype;
};

// activation((sum - mean) / sqrt(variance + epsilon) * scale + bias + residual) of real rows; what is null is left out.
struct Epilogue {
  PerChannel mean, variance, scale, bias;
  float epsilon;
  const void* residual;  // [out_rows, out_channels], as y
  Activation activation;
  Segments rows;  // which are real
};

struct FusedConvArgs : ConvGemmArgs {
  int32_t first_channels;  // of x, whose rows go on in `second`: both widths are multiples of 8 where there is one
  const void* second;      // [in_rows, in_channels - first_channels], or null
  Epilogue epilogue;
};

// conv_gemm with an epilogue, rounded once: x of 16 bits, y of the same dtype. `order` may be null where there is one tap:
// each row of y is then that row of x times w, without a schedule.
cudaError_t conv_fused(const FusedConvArgs& args, cudaStream_t stream);

struct WgradGemmArgs {
  Dtype dtype, out_dtype;    // of x and g, not kF64; of dw: the same, or float32
  bool exact;                // float32 products in full, not rounded to TF32
  Tile tile;                 // changes speed, never the result
  int32_t slots;             // shares that all pairs are divided into, at least twice the taps; decides how sums are split
  const void* x;             // [in_rows, in_channels], a multiple of 4
  const void* g;             // [out_rows, out_channels], a multiple of 8
  const Pair* pairs;         // of list_pairs
  const int32_t* tap_pairs;
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
