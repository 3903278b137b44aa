// invert_index: one stable sort by value, a binary search for each value's start. segment_sum: one thread for each
// (value, channel), rows in order, so no atomics and no race; bound by reading x once.
#include "cuda/rows/rows.h"

#include "cuda/common/numbers.cuh"
#include "cuda/sort/radix_sort.cuh"

namespace jaxsparse::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kGridThreads, 2) invert_index_kernel(InvertIndexArgs a, SortBuffers buffers, int bits) {
  __shared__ SortShared shared;
  const Grid grid = cooperative_groups::this_grid();
  for (int64_t p = global_thread(); p < a.positions; p += grid_threads()) {
    const int32_t value = a.index[p];
    buffers.keys[p] = value >= 0 && value < a.values ? value : a.values;  // what is outside sorts behind the others
  }
  grid.sync();
  radix_sort(grid, buffers, a.positions, bits, shared, [](uint64_t key) { return key; });
  const uint64_t* keys = buffers.keys;
  for (int64_t i = global_thread(); i < a.positions; i += grid_threads()) {
    a.order[i] = keys[i] < static_cast<uint64_t>(a.values) ? static_cast<int32_t>(buffers.values[i]) : -1;
  }
  for (int64_t value = global_thread(); value <= a.values; value += grid_threads()) {
    int32_t low = 0, high = a.positions;  // the first position of this value or a larger one
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (keys[middle] < static_cast<uint64_t>(value)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    a.offsets[value] = low;
  }
}

template <typename T>
__global__ void segment_sum_kernel(SegmentSumArgs a) {
  const int64_t i = global_thread();
  if (i >= static_cast<int64_t>(a.values) * a.channels) return;
  const int32_t value = static_cast<int32_t>(i / a.channels);
  const int32_t channel = static_cast<int32_t>(i % a.channels);
  const T* x = static_cast<const T*>(a.x);
  Accumulator<T> sum = 0;
  for (int32_t j = a.offsets[value]; j < a.offsets[value + 1]; ++j) {
    sum += widen(x[static_cast<int64_t>(a.order[j]) * a.channels + channel]);
  }
  static_cast<T*>(a.y)[i] = narrow<T>(sum);
}

}  // namespace

cudaError_t invert_index(const InvertIndexArgs& a, cudaStream_t stream) {
  Workspace workspace(a.workspace);
  int bits = 1;
  while (a.values >> bits != 0) ++bits;
  return launch_grid(invert_index_kernel, div_up(a.positions, kGridThreads), stream, a,
                     take_sort_buffers(workspace, a.positions), bits);
}

cudaError_t segment_sum(const SegmentSumArgs& a, cudaStream_t stream) {
  const int64_t blocks = div_up(static_cast<int64_t>(a.values) * a.channels, kThreads);
  switch (a.dtype) {
    case Dtype::kF16: return launch(segment_sum_kernel<__half>, blocks, kThreads, stream, a);
    case Dtype::kBF16: return launch(segment_sum_kernel<__nv_bfloat16>, blocks, kThreads, stream, a);
    case Dtype::kF32: return launch(segment_sum_kernel<float>, blocks, kThreads, stream, a);
    case Dtype::kF64: return launch(segment_sum_kernel<double>, blocks, kThreads, stream, a);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jaxsparse::cuda
