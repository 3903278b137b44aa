// The product that both convolutions are made of: C [kRows, kCols] += A [kRows, depth] B [depth, kCols], operands in
// shared memory, sums in the registers of one block of 128 threads.
//
//     TensorTile  tensor cores through wmma: float16, bfloat16; sums in float32
//     FmaTile     plain fused multiply-add: float32 and float64
//
// A lies row-major in forward (a row of A is a piece of a feature row) and depth-major in wgrad (A is transposed there).
// Either way a row of C is a function of the same row of A and of B alone, whatever the other rows hold.
#pragma once

#include <mma.h>

#include <type_traits>

#include "cuda/common/device.cuh"
#include "cuda/common/numbers.cuh"

namespace jaxsparse::cuda {

constexpr int kTileThreads = 128;
constexpr int kTileCols = 64;  // columns of C
constexpr int kVectorBytes = 16;

template <typename T>
constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));  // elements in a vector

// Depth of one pipeline step: 64 bytes of a row.
template <typename T>
constexpr int kDepth = 64 / static_cast<int>(sizeof(T));

enum class LayoutA { kRowMajor, kDepthMajor };

// Leading dimensions in shared memory, in elements: 16 bytes more than the row, an odd multiple of 16, so that the rows
// of a fragment lie in different banks; 16 or 8 rows further is a multiple of 32 bytes, as wmma asks of each operand.
template <typename T, int kRows, LayoutA kLayout>
constexpr int kStrideA = (kLayout == LayoutA::kRowMajor ? kDepth<T> : kRows) + kVector<T>;
template <typename T>
constexpr int kStrideB = kTileCols + kVector<T>;
template <typename T, int kRows, LayoutA kLayout>
constexpr int kElementsA = (kLayout == LayoutA::kRowMajor ? kRows : kDepth<T>) * kStrideA<T, kRows, kLayout>;
template <typename T>
constexpr int kElementsB = kDepth<T> * kStrideB<T>;

constexpr int kStrideC = kTileCols + 4;

// Four warps; each owns 16-row by 16-column fragments of C: all 64 columns of its rows, or half of them when there are
// only 32 rows to share.
template <typename T_, int kRows_, LayoutA kLayout>
struct TensorTile {
  using T = T_;
  using Sum = float;
  static constexpr int kRows = kRows_;
  static constexpr LayoutA kLayoutA = kLayout;

  static constexpr int kMmaDepth = 16;
  using WmmaLayoutA =
      std::conditional_t<kLayout == LayoutA::kRowMajor, nvcuda::wmma::row_major, nvcuda::wmma::col_major>;
  using FragmentA = nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, kMmaDepth, T, WmmaLayoutA>;
  using FragmentB = nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, kMmaDepth, T, nvcuda::wmma::row_major>;
  using FragmentC = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, kMmaDepth, float>;

  static constexpr int kWarpsAcross = kRows == 32 ? 2 : 1;
  static constexpr int kFragmentRows = kRows / 16 / (4 / kWarpsAcross);  // of a warp
  static constexpr int kFragmentCols = kTileCols / 16 / kWarpsAcross;
  static constexpr int kStepA = kStrideA<T, kRows, kLayout>;

  FragmentC sums[kFragmentRows][kFragmentCols];

  __device__ static int first_row() { return static_cast<int>(threadIdx.x) / 32 / kWarpsAcross * kFragmentRows * 16; }
  __device__ static int first_col() { return static_cast<int>(threadIdx.x) / 32 % kWarpsAcross * kFragmentCols * 16; }

  __device__ void clear() {
    for (auto& row : sums) {
      for (auto& sum : row) nvcuda::wmma::fill_fragment(sum, 0.0f);
    }
  }

  // Rows and columns past the used ones are left out where a whole fragment lies there.
  __device__ void multiply(const T* a, const T* b, int used_rows, int used_cols) {
    const int row0 = first_row(), col0 = first_col();
    for (int d = 0; d < kDepth<T>; d += kMmaDepth) {
      FragmentA fa[kFragmentRows];
#pragma unroll
      for (int i = 0; i < kFragmentRows; ++i) {
        const int row = row0 + i * 16;
        const T* from = kLayout == LayoutA::kRowMajor ? a + row * kStepA + d : a + d * kStepA + row;
        nvcuda::wmma::load_matrix_sync(fa[i], from, kStepA);
      }
#pragma unroll
      for (int j = 0; j < kFragmentCols; ++j) {
        const int col = col0 + j * 16;
        if (col >= used_cols) break;
        FragmentB fb;
        nvcuda::wmma::load_matrix_sync(fb, b + d * kStrideB<T> + col, kStrideB<T>);
#pragma unroll
        for (int i = 0; i < kFragmentRows; ++i) {
          if (row0 + i * 16 < used_rows) nvcuda::wmma::mma_sync(sums[i][j], fa[i], fb, sums[i][j]);
        }
      }
    }
  }

  // To shared memory, [kRows, kStrideC].
  __device__ void store(float* c) const {
    for (int i = 0; i < kFragmentRows; ++i) {
      for (int j = 0; j < kFragmentCols; ++j) {
        nvcuda::wmma::store_matrix_sync(c + (first_row() + i * 16) * kStrideC + first_col() + j * 16, sums[i][j],
                                        kStrideC, nvcuda::wmma::mem_row_major);
      }
    }
  }
};

// 8 x 16 threads; thread (r, c) owns rows r, r + 8, ... and columns c, c + 16, ...: a warp reads 16 neighbours of B and
// two values of A at a time.
template <typename T_, int kRows_, LayoutA kLayout>
struct FmaTile {
  using T = T_;
  using Sum = Accumulator<T>;
  static constexpr int kRows = kRows_;
  static constexpr LayoutA kLayoutA = kLayout;
  static constexpr int kOwnRows = kRows / 8;
  static constexpr int kOwnCols = kTileCols / 16;
  static constexpr int kStepA = kStrideA<T, kRows, kLayout>;

  Sum sums[kOwnRows][kOwnCols];

  __device__ static int first_row() { return static_cast<int>(threadIdx.x) / 16; }
  __device__ static int first_col() { return static_cast<int>(threadIdx.x) % 16; }

  __device__ void clear() {
    for (auto& row : sums) {
      for (auto& sum : row) sum = 0;
    }
  }

  __device__ void multiply(const T* a, const T* b, int used_rows, int used_cols) {
    (void)used_rows;
    (void)used_cols;
#pragma unroll 2
    for (int d = 0; d < kDepth<T>; ++d) {
      Sum right[kOwnCols];
#pragma unroll
      for (int j = 0; j < kOwnCols; ++j) right[j] = widen(b[d * kStrideB<T> + first_col() + j * 16]);
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        const int row = first_row() + i * 8;
        const Sum left = widen(kLayout == LayoutA::kRowMajor ? a[row * kStepA + d] : a[d * kStepA + row]);
#pragma unroll
        for (int j = 0; j < kOwnCols; ++j) sums[i][j] = fma(left, right[j], sums[i][j]);
      }
    }
  }

  __device__ void store(Sum* c) const {
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
      for (int j = 0; j < kOwnCols; ++j) {
        c[(first_row() + i * 8) * kStrideC + first_col() + j * 16] = sums[i][j];
      }
    }
  }
};

}  // namespace jaxsparse::cuda
