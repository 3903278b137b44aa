// The matrix product of the float64 convolutions, C [kRows, 64] += A [kRows, 8] B [8, 64] by fused multiply-adds: operands
// in shared memory, sums in the registers of a block of 128 threads; and the copies that bring the operands.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/common/ptx.cuh"

namespace jaxsparse::cuda {

constexpr int kTileThreads = 128;
constexpr int kTileCols = 64;  // columns of C
constexpr int kDepth = 8;      // per step: 64 bytes of a row
constexpr int kStages = 3;     // ring buffer: one stage is multiplied while two arrive, with one barrier per step

// Leading dimensions in shared memory: rows are padded by 16 bytes against bank conflicts.
constexpr int kStrideA = kDepth + 2;
constexpr int kStrideB = kTileCols + 2;

// Copies kRows x kCols numbers in pieces of two. A thread has pieces t, t + 128, ...; row(i), col(i) locate its i-th piece.
template <int kRows, int kCols>
struct Copy {
  static constexpr int kInRow = kCols / 2;
  static constexpr int kOwn = kRows * kInRow / kTileThreads;
  static_assert(kOwn * kTileThreads == kRows * kInRow, "every thread copies as many pieces");

  __device__ static int row(int i) { return (static_cast<int>(threadIdx.x) + i * kTileThreads) / kInRow; }
  __device__ static int col(int i) { return (static_cast<int>(threadIdx.x) + i * kTileThreads) % kInRow * 2; }

  // Begins to copy source[row_of(i), first_col + c] to tile[r, c] for the thread's pieces (r, c); zeros if row_of(i) < 0 and
  // past the end of a row.
  template <typename RowOf>
  __device__ static void begin(double* tile, int stride, const double* source, int32_t width, int32_t first_col,
                               RowOf row_of) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t from_row = row_of(i);
      const int32_t from_col = first_col + col(i), there = from_row < 0 ? 0 : width - from_col;
      const double* from = source + from_row * width + from_col;
      char* to = reinterpret_cast<char*>(tile + row(i) * stride + col(i));
      if (width % 2 == 0) {
        copy_piece<16>(to, from, there > 0);
      } else {  // rows are aligned to 8 bytes only
        copy_piece<8>(to, from, there > 0);
        copy_piece<8>(to + 8, from + 1, there > 1);
      }
    }
  }
};

// The product. Element (row, depth) of A lies at row * kRowStep + depth * kDepthStep. Of 8 x 16 threads, thread (r, c) owns
// rows r, r + 8, ... and columns c, c + 16, ...: a warp reads 16 neighbours of B and two values of A at a time.
template <int kRows, int kRowStep, int kDepthStep>
struct Tile64 {
  static constexpr int kOwnRows = kRows / 8;
  static constexpr int kOwnCols = kTileCols / 16;

  double sums[kOwnRows][kOwnCols] = {};

  __device__ static int row(int i) { return static_cast<int>(threadIdx.x) / 16 + i * 8; }
  __device__ static int col(int j) { return static_cast<int>(threadIdx.x) % 16 + j * 16; }

  __device__ void multiply(const double* a, const double* b) {
#pragma unroll 2
    for (int d = 0; d < kDepth; ++d) {
      double right[kOwnCols];
#pragma unroll
      for (int j = 0; j < kOwnCols; ++j) right[j] = b[d * kStrideB + col(j)];
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        const double left = a[row(i) * kRowStep + d * kDepthStep];
#pragma unroll
        for (int j = 0; j < kOwnCols; ++j) sums[i][j] = fma(left, right[j], sums[i][j]);
      }
    }
  }

  // Calls visit(row, column, sum) for each of the thread's sums.
  template <typename Visit>
  __device__ void for_each(Visit visit) const {
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
      for (int j = 0; j < kOwnCols; ++j) visit(row(i), col(j), sums[i][j]);
    }
  }
};

}  // namespace jaxsparse::cuda
