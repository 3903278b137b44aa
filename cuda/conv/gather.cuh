// Rows from global to shared memory, absent rows and the columns past the end as zeros.
#pragma once

#include <cuda_pipeline.h>

#include "cuda/conv/tile.cuh"

namespace jaxsparse::cuda {

// Steps of copies in flight: one is multiplied while the next two arrive, one barrier a step.
constexpr int kStages = 3;

// Rows of `width` elements can be copied 16 bytes at a time.
template <typename T>
__device__ bool rows_are_vectors(const void* source, int32_t width) {
  return width % kVector<T> == 0 && reinterpret_cast<uintptr_t>(source) % kVectorBytes == 0;
}

// How a block shares a kRows x kCols piece: thread t copies vectors t, t + 128, ...; own_row(i) is the row of its i-th.
template <typename T, int kRows, int kCols>
struct Gather {
  static constexpr int kVectorsInRow = kCols / kVector<T>;
  static constexpr int kOwn = kRows * kVectorsInRow / kTileThreads;  // vectors a thread copies
  static_assert(kOwn * kTileThreads == kRows * kVectorsInRow, "every thread copies as many vectors");

  __device__ static int own_row(int i) { return (static_cast<int>(threadIdx.x) + i * kTileThreads) / kVectorsInRow; }
  __device__ static int own_col(int i) {
    return (static_cast<int>(threadIdx.x) + i * kTileThreads) % kVectorsInRow * kVector<T>;
  }

  // tile[r, c] = source[row_of(i), col + c] for the thread's own (r, c); row_of(i) < 0 where the row is absent.
  // Vectors arrive after a __pipeline_wait_prior and a barrier, zeros and single elements after the barrier.
  template <typename RowOf>
  __device__ static void copy(T* tile, int stride, const T* source, int32_t width, int32_t col, bool vectors,
                              RowOf row_of) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t row = row_of(i);
      const int32_t from_col = col + own_col(i);
      const T* from = source + row * width + from_col;
      T* to = tile + own_row(i) * stride + own_col(i);
      if (row < 0 || from_col >= width) {
        *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
      } else if (vectors) {
        __pipeline_memcpy_async(to, from, kVectorBytes);
      } else {
        for (int e = 0; e < kVector<T>; ++e) to[e] = from_col + e < width ? from[e] : zero<T>();
      }
    }
  }
};

}  // namespace jaxsparse::cuda
