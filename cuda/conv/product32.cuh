// Products of float32 operands, see product.cuh: TF32 on tensor cores, or exact.
//
//     forward   A is row-major. B has a row of 128 bytes per *column*, since tensor cores cannot transpose 32-bit operands
//               in shared memory: weights come as [taps, out_channels, in_channels]
//     wgrad     A and B are depth-major: a row of 32 channels per depth; further channels follow in blocks
//
// TF32: tensor cores ignore all but the sign, the exponent and the first 10 mantissa bits, which rounds towards 0 with a
// relative error below 2^-10. Exact: one rounding per fused multiply-add, in the order of the depth.
#pragma once

#include "cuda/conv/product.cuh"

namespace jaxsparse::cuda {

struct Tf32 {};
struct Exact {};

// The shared-memory layout of float32 operands. For mma.sync, kExchanged swaps pairs of pieces in a depth-major row, so that
// the four depths of a fragment, eight channels each, lie in different banks.
template <int kCols, LayoutOfA kLayout, bool kExchanged>
struct FloatOperands {
  using T = float;
  static constexpr bool kRowsOfBAreColumns = kLayout == LayoutOfA::kRowMajor;
  static constexpr int kThreadsAtLeast = 0;
  static constexpr int kDepth = 32;  // per step: 128 bytes of a row-major row
  static constexpr int kRowBytesB = 128, kBlockBytesA = kDepth * 128, kBlockBytesB = kBlockBytesA;  // of 32 channels
  static constexpr int kBytesB = kRowsOfBAreColumns ? kCols * 128 : (kCols + 31) / 32 * kBlockBytesB;

  __device__ static uint32_t place_in_a(int depth, int piece) {
    return depth * 128 + ((piece ^ (kExchanged ? depth % 4 * 2 : 0)) << 4);
  }
  __device__ static uint32_t place_in_b(int depth, int piece) { return place_in_a(depth, piece); }
};

// Moves sums from the lanes that computed them to the layout of mma.sync.m16n8. row(i) and col(i) give the place of the
// lane's i-th sum. Adding 0 turns -0 into +0; otherwise the sign of a zero could depend on taps that only tile mates have.
template <int kCols, typename Row, typename Col>
__device__ void move_sums(float (&sums)[kCols / 2], char* shared, Row row, Col col) {
  constexpr int kStride = kCols + 4;  // rows of eight lanes start in different banks
  float* const c = reinterpret_cast<float*>(shared);
  __syncthreads();  // the operands' memory is free
#pragma unroll
  for (int i = 0; i < kCols / 2; ++i) c[row(i) * kStride + col(i)] = sums[i] + 0.0f;
  __syncthreads();
  const int lane = threadIdx.x % kWarp, first_row = threadIdx.x / kWarp % 4 * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < kCols / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[j * 4 + e] = c[(first_row + e / 2 * 8) * kStride + j * 8 + lane % 4 * 2 + e % 2];
  }
}
template <int kCols>
constexpr int kMoveBytes = kGroupRows * (kCols + 4) * 4;

// TF32 with mma.sync. Forward reads fragments by ldmatrix, which moves a 32-bit element as two 16-bit ones. Wgrad needs
// transposed fragments, which ldmatrix offers only for 16-bit elements: there lanes read single elements, and a warp
// computes 32 rows and half of the columns, which needs the fewest reads.
template <int kCols, LayoutOfA kLayout>
struct Tf32MmaProduct : FloatOperands<kCols, kLayout, true>, Synchronous {
  using Operands = FloatOperands<kCols, kLayout, true>;
  static constexpr bool kIsWgrad = kLayout == LayoutOfA::kDepthMajor;
  static constexpr int kFinishBytes = kIsWgrad ? kMoveBytes<kCols> : 0;

  __device__ static void multiply(float (&sums)[kCols / 2], const char* a, const char* b) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % 4;
    if constexpr (kIsWgrad) {
      constexpr int kColTiles = kCols / 16;  // groups of eight columns per warp, every other one, so that n fixes the block
      const int g = lane / 4, q = lane % 4, across = warp % 2;
      const auto element = [&](const char* from, int depth, int block, int piece) {
        const char* row = from + block * Operands::kBlockBytesA + (depth + q) * 128;
        return *reinterpret_cast<const uint32_t*>(row + (((piece + g / 4) ^ q * 2) << 4) + g % 4 * 4);
      };
#pragma unroll
      for (int d = 0; d < Operands::kDepth; d += 8) {
        uint32_t fa[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) fa[i][e] = element(a, d + e / 2 * 4, warp / 2, i * 4 + e % 2 * 2);
        }
#pragma unroll
        for (int n = 0; n < kColTiles; ++n) {
          const int piece = n % 2 * 4 + across * 2;
          const uint32_t low = element(b, d, n / 2, piece), high = element(b, d + 4, n / 2, piece);
          mma<float>(sums + n * 4, fa[0], low, high);
          mma<float>(sums + (kColTiles + n) * 4, fa[1], low, high);
        }
      }
    } else {
#pragma unroll
      for (int s = 0; s < Operands::kDepth / 8; ++s) {
        uint32_t fa[4];
        load_matrices<false>(fa, a + swizzled<128>(warp * 16 + lane % 16, s * 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < kCols / 16; ++n) {
          uint32_t fb[4];
          load_matrices<false>(fb, b + swizzled<128>(n * 16 + lane / 16 * 8 + lane % 8, s * 2 + lane / 8 % 2));
          mma<float>(sums + n * 8, fa, fb[0], fb[1]);
          mma<float>(sums + n * 8 + 4, fa, fb[2], fb[3]);
        }
      }
    }
  }
  __device__ static void finish(float (&sums)[kCols / 2], char* shared) {
    if constexpr (kIsWgrad) {
      constexpr int kColTiles = kCols / 16;
      const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % 4;
      move_sums<kCols>(
          sums, shared,
          [&](int i) { return warp / 2 * 32 + i / (kColTiles * 4) * 16 + lane / 4 + i % 4 / 2 * 8; },
          [&](int i) { return (i / 4 % kColTiles * 2 + warp % 2) * 8 + lane % 4 * 2 + i % 2; });
    }
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <int kCols>
struct Tf32WgmmaProduct : FloatOperands<kCols, LayoutOfA::kRowMajor, true>, Asynchronous {
  static constexpr int kFinishBytes = 0;
  __device__ static void multiply(float (&sums)[kCols / 2], const char* a, const char* b) {
    wgmma_fence();
    const WgmmaOperand<128, 0> in_a(a), in_b(b);
#pragma unroll
    for (int s = 0; s < 4; ++s) Wgmma<float, kCols, false>::multiply(sums, in_a.after(s * 32), in_b.after(s * 32));
    wgmma_commit();
  }
  __device__ static void finish(float (&)[kCols / 2], char*) {}
};
#endif

// Exact products by fused multiply-adds. A warp is 8 x 4 lanes; a lane has kOwnRows x kOwnCols sums, as square as the tile
// allows, since a 16-byte load serves kOwnRows kOwnCols / (kOwnRows + kOwnCols) x 4 products. Lanes are numbered so that
// lane ^ 1 reads the same of A and lane ^ 2 the same of B, which halves the passes of a 16-byte load. A lane's rows and
// columns come in runs that one load of a depth covers (1 in forward). The runs of all lanes and warps are interleaved, so
// that those of one lane are a constant number of bytes apart.
template <int kCols, LayoutOfA kLayout>
struct FmaProduct : FloatOperands<kCols, kLayout, false>, Synchronous {
  using Operands = FloatOperands<kCols, kLayout, false>;
  static constexpr bool kIsWgrad = kLayout == LayoutOfA::kDepthMajor;
  static constexpr int kFinishBytes = kMoveBytes<kCols>;
  static constexpr int kThreadsAtLeast = kCols > 64 ? 384 : 512;  // at most 168 registers, or 128
  static constexpr int kWarpsAcross = kCols >= 48 ? 4 : 2, kWarpsDown = 4 / kWarpsAcross;
  static constexpr int kOwnRows = kGroupRows / kWarpsDown / 8, kOwnCols = kCols / kWarpsAcross / 4;
  static constexpr int kRunOfRows = kIsWgrad ? 4 : 1;
  static constexpr int kRunOfCols = !kIsWgrad ? 1 : kOwnCols % 4 == 0 ? 4 : kOwnCols % 2 == 0 ? 2 : 1;

  __device__ static int first_row() {
    const int lane_row = (threadIdx.x >> 1 & 1) | (threadIdx.x >> 2 & 6);
    return (threadIdx.x / kWarp % 4 / kWarpsAcross * 8 + lane_row) * kRunOfRows;
  }
  __device__ static int first_col() {
    const int lane_col = (threadIdx.x & 1) | (threadIdx.x >> 1 & 2);
    return (threadIdx.x / kWarp % kWarpsAcross * 4 + lane_col) * kRunOfCols;
  }
  __device__ static constexpr int row_step(int i) { return i / kRunOfRows * 8 * kWarpsDown * kRunOfRows + i % kRunOfRows; }
  __device__ static constexpr int col_step(int j) { return j / kRunOfCols * 4 * kWarpsAcross * kRunOfCols + j % kRunOfCols; }

  __device__ static void multiply(float (&sums)[kCols / 2], const char* a, const char* b) {
    const int row = first_row(), col = first_col();
    if constexpr (kIsWgrad) {
      const auto offset_of = [](int channels) { return channels / 32 * Operands::kBlockBytesA + channels % 32 * 4; };
      const char *const from_a = a + offset_of(row), *const from_b = b + offset_of(col);
#pragma unroll 4
      for (int d = 0; d < Operands::kDepth; ++d) {
        float left[kOwnRows], right[kOwnCols];
#pragma unroll
        for (int i = 0; i < kOwnRows; i += kRunOfRows) {
          load<kRunOfRows>(left + i, from_a + d * 128 + offset_of(row_step(i)));
        }
#pragma unroll
        for (int j = 0; j < kOwnCols; j += kRunOfCols) {
          load<kRunOfCols>(right + j, from_b + d * 128 + offset_of(col_step(j)));
        }
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
          for (int j = 0; j < kOwnCols; ++j) sums[i * kOwnCols + j] = fmaf(left[i], right[j], sums[i * kOwnCols + j]);
        }
      }
    } else {
#pragma unroll 2
      for (int piece = 0; piece < 8; ++piece) {  // four depths; rows and columns are multiples of 8 apart: the same swizzle
        float left[kOwnRows][4], right[kOwnCols][4];
        const char *const from_a = a + swizzled<128>(row, piece), *const from_b = b + swizzled<128>(col, piece);
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) load<4>(left[i], from_a + row_step(i) * 128);
#pragma unroll
        for (int j = 0; j < kOwnCols; ++j) load<4>(right[j], from_b + col_step(j) * 128);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
          for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
            for (int j = 0; j < kOwnCols; ++j) {
              sums[i * kOwnCols + j] = fmaf(left[i][e], right[j][e], sums[i * kOwnCols + j]);
            }
          }
        }
      }
    }
  }
  __device__ static void finish(float (&sums)[kCols / 2], char* shared) {
    move_sums<kCols>(
        sums, shared, [&](int i) { return first_row() + row_step(i / kOwnCols); },
        [&](int i) { return first_col() + col_step(i % kOwnCols); });
  }

 private:
  template <int kNumber>
  __device__ static void load(float* to, const char* from) {
    if constexpr (kNumber == 4) {
      const float4 v = *reinterpret_cast<const float4*>(from);
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else if constexpr (kNumber == 2) {
      const float2 v = *reinterpret_cast<const float2*>(from);
      to[0] = v.x, to[1] = v.y;
    } else {
      to[0] = *reinterpret_cast<const float*>(from);
    }
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <int kCols>
struct ProductOf<Tf32, kCols, LayoutOfA::kRowMajor> {
  using type = Tf32WgmmaProduct<kCols>;
};
template <int kCols>
struct ProductOf<Tf32, kCols, LayoutOfA::kDepthMajor> {
  using type = Tf32MmaProduct<kCols, LayoutOfA::kDepthMajor>;
};
#else
template <int kCols, LayoutOfA kLayout>
struct ProductOf<Tf32, kCols, kLayout> {
  using type = Tf32MmaProduct<kCols, kLayout>;
};
#endif
template <int kCols, LayoutOfA kLayout>
struct ProductOf<Exact, kCols, kLayout> {
  using type = FmaProduct<kCols, kLayout>;
};

}  // namespace jaxsparse::cuda
