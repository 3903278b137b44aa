// What follows the sums of a convolution in the same kernel: normalisation of channels, a residual, an activation.
//
// At its end a block has nothing of its own left to wait behind, so nothing is asked for there: scale and shift of the
// columns are in shared memory before the first step, and the residual's rows come by cp.async, into stages that the last
// steps of the product leave free, while these are multiplied.
#pragma once

#include <cstring>

#include "cuda/common/device.cuh"
#include "cuda/conv/gemm.h"
#include "cuda/conv/product.cuh"

namespace jaxsparse::cuda {

// The bits of a channel's number, and later, when they have arrived, the number.
__device__ inline uint32_t bits_of(const PerChannel& numbers, int32_t channel) {
  if (numbers.data == nullptr) return 0;
  return numbers.dtype == Dtype::kF32 ? static_cast<const uint32_t*>(numbers.data)[channel]
                                      : static_cast<const uint16_t*>(numbers.data)[channel];
}
template <typename T>
__device__ float value_of_bits(uint32_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return widen(value);
}
__device__ inline float value_of(const PerChannel& numbers, uint32_t bits, float absent) {
  if (numbers.data == nullptr) return absent;
  if (numbers.dtype == Dtype::kF32) return value_of_bits<float>(bits);
  return numbers.dtype == Dtype::kF16 ? value_of_bits<__half>(bits) : value_of_bits<__nv_bfloat16>(bits);
}

// {scale, scale, shift, shift} of each two columns of the block.
template <int kCols>
__device__ float4* affine_of_columns() {
  __shared__ float4 affine[kCols / 2];
  return affine;
}

// What a thread fetches at the start: how many rows are real, and the numbers of its channel, for which it puts scale and
// shift into shared memory once they have arrived.
struct Channel {
  uint32_t mean = 0, variance = 0, scale = 0, bias = 0;
  int32_t real_rows = 0;

  template <int kCols>
  __device__ void ask(const FusedConvArgs& a, int32_t first_col) {
    const Epilogue& e = a.epilogue;
    const int32_t channel = first_col + static_cast<int32_t>(threadIdx.x);
    real_rows = e.rows.counts[0];
    if (threadIdx.x >= kCols || channel >= a.out_channels) return;
    mean = bits_of(e.mean, channel);
    variance = bits_of(e.variance, channel);
    scale = bits_of(e.scale, channel);
    bias = bits_of(e.bias, channel);
  }

  template <int kCols>
  __device__ void put(const Epilogue& e, float4* affine) const {
    if (threadIdx.x >= kCols) return;
    const float deviation = e.variance.data == nullptr ? 1 : rsqrtf(value_of(e.variance, variance, 0) + e.epsilon);
    const float factor = value_of(e.scale, scale, 1) * deviation;
    float* to = reinterpret_cast<float*>(affine + threadIdx.x / 2) + threadIdx.x % 2;
    to[0] = factor;
    to[2] = fmaf(-value_of(e.mean, mean, 0), factor, value_of(e.bias, bias, 0));
  }
};

// Padding rows are marked: as numbers below -1, which stands for no row at all.
__device__ inline int32_t unmarked(int32_t row) { return -2 - row; }
__device__ inline bool is_marked(int32_t row) { return row < -1; }
__device__ inline void mark_padding(const Segments& rows, int32_t real_rows, int32_t (&out_row)[2]) {
#pragma unroll
  for (int32_t& row : out_row) {
    const bool is_real = rows.number == 1 ? row < real_rows : row_is_real(rows, row);
    if (row >= 0 && !is_real) row = -2 - row;
  }
}

// What a block of P does beyond the product. A lane's sums are those of rows out_row[0] and out_row[1].
template <class P>
struct Ending {
  using T = typename P::T;
  static constexpr int kCols = P::kCols;
  // The residual in blocks of 64 columns, rows of 128 bytes as those of A. In float32 it is not copied ahead.
  static constexpr int kBlocks = sizeof(T) == 2 ? (kCols + 63) / 64 : 0, kBlockBytes = P::kGroups * kBytesA;
  static constexpr int kFit = P::kStageBytes / kBlockBytes, kBlocksInStage = kFit < kBlocks ? kFit : kBlocks;
  static constexpr int kStagesOfResidual = kBlocks == 0 ? 0 : (kBlocks + kBlocksInStage - 1) / kBlocksInStage;
  static_assert(kStagesOfResidual < P::kStages);

  // Begins to copy the part of the residual that the part-th free stage holds; each lane for its own quad.
  __device__ static void copy_residual(const FusedConvArgs& a, const int32_t (&out_row)[2], int32_t first_col, int part,
                                       char* stage) {
    if (a.epilogue.residual == nullptr || part >= kStagesOfResidual) return;
    const int first = part * kBlocksInStage * 64;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const T* from = static_cast<const T*>(a.epilogue.residual) + int64_t{out_row[r]} * a.out_channels + first_col;
#pragma unroll
      for (int i = 0; i < kBlocksInStage * 64 && i < kCols; i += 32) {
        const int col = i + threadIdx.x % 4 * 8;
        const bool exists = out_row[r] >= 0 && first + col < kCols && first_col + first + col < a.out_channels;
        if (kCols % 32 != 0 && col >= kCols) continue;  // less than a row's 128 bytes
        copy_piece<16>(stage + place(r, i / 64, i % 64 / 8 + threadIdx.x % 4), from + first + col, exists);
      }
    }
  }

  // The sums as the result is to be.
  __device__ static void apply(const FusedConvArgs& a, const int32_t (&out_row)[2], int32_t first_col,
                               const float4* affine, const char* const (&stages)[2], float (&sums)[kCols / 2]) {
    const int q = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
      const float4 v = affine[j * 4 + q];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float* sum = sums + j * 4 + 2 * r;
        sum[0] = fmaf(sum[0], v.x, v.z);
        sum[1] = fmaf(sum[1], v.y, v.w);
      }
    }
    if (a.epilogue.residual != nullptr) {
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          T both[2] = {};
          if constexpr (kBlocks > 0) {
            const int block = j / 8;
            memcpy(both, stages[block / kBlocksInStage] + place(r, block % kBlocksInStage, j % 8) + q * 4, 4);
          } else if (out_row[r] >= 0 && first_col + j * 8 < a.out_channels) {
            const T* row = static_cast<const T*>(a.epilogue.residual) + int64_t{out_row[r]} * a.out_channels;
            memcpy(both, __builtin_assume_aligned(row + first_col + j * 8 + q * 2, sizeof(both)), sizeof(both));
          }
          sums[j * 4 + 2 * r] += widen(both[0]);
          sums[j * 4 + 2 * r + 1] += widen(both[1]);
        }
      }
    }
    switch (a.epilogue.activation) {
      case Activation::kNone: break;
      case Activation::kRelu: each(sums, [](float v) { return v < 0 ? 0.0f : v; }); break;
      case Activation::kLeakyRelu: each(sums, [](float v) { return v < 0 ? kLeakySlope * v : v; }); break;
      case Activation::kGelu: each(sums, [](float v) { return v * sigmoid(v * fmaf(kGeluCubic, v * v, kGeluLinear)); }); break;
      case Activation::kSilu: each(sums, [](float v) { return v * sigmoid(v); }); break;
    }
  }

 private:
  // Where a 16-byte piece of row out_row[r] lies in a stage.
  __device__ static uint32_t place(int r, int block, int piece) {
    const int t = threadIdx.x;
    return block * kBlockBytes + t / kWarpgroup * kBytesA +
           swizzled<128>(t / kWarp % 4 * 16 + t % kWarp / 4 + 8 * r, piece);
  }
  // tanh's form of GELU: v (1 + tanh(u)) / 2 = v sigmoid(2 u), u = sqrt(2 / pi) (v + 0.044715 v^3).
  static constexpr float kLeakySlope = 0.01f, kGeluLinear = 1.5957691216f, kGeluCubic = kGeluLinear * 0.044715f;
  __device__ static float sigmoid(float v) { return __fdividef(1, 1 + __expf(-v)); }
  template <typename F>
  __device__ static void each(float (&sums)[kCols / 2], F f) {
#pragma unroll
    for (float& sum : sums) sum = f(sum);
  }
};

}  // namespace jaxsparse::cuda
