// Sums over groups of rows. invert_index: a stable sort by value, then a binary search for each value's start.
// segment_sum: a thread per (value, channel) adds rows in a fixed order, without float atomics, so results are bitwise
// reproducible. It is bound by the latency of reading x by index, so a thread reads several rows at once: 11 us on an H200
// for the features of 271,156 points of ten sweeps; 32 with one row at a time and groups of up to 32 rows per thread.
#include "cuda/rows/rows.h"

#include "cuda/common/numbers.cuh"
#include "cuda/sort/radix_sort.cuh"

namespace jaxsparse::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kSortThreads, 1) invert_index_kernel(InvertIndexArgs a, SortBuffers buffers, int bits) {
  __shared__ SortShared shared;
  const Grid grid = cooperative_groups::this_grid();
  put_keys(buffers, a.positions, shared, [&](int32_t p) {
    const int32_t value = a.index[p];
    return static_cast<uint64_t>(value >= 0 && value < a.values ? value : a.values);  // values out of range sort last
  });
  grid.sync();
  radix_sort(grid, buffers, a.positions, bits, shared, [](const auto&) {});
  const uint64_t* keys = buffers.keys;
  for (int64_t i = global_thread(); i < a.positions; i += all_threads()) {
    a.order[i] = keys[i] < static_cast<uint64_t>(a.values) ? static_cast<int32_t>(buffers.values[i]) : -1;
  }
  for (int64_t value = global_thread(); value <= a.values; value += all_threads()) {
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

// The sum of one channel of rows order[begin], order[begin + step] ..., in that order. The next indices are loaded while
// rows are in flight: dependent loads of an index and a row at a time would take a microsecond per row.
template <typename T>
__device__ Accumulator<T> sum_listed(const SegmentSumArgs& a, int32_t channel, int32_t begin, int32_t end, int32_t step) {
  constexpr int kAtOnce = 8;
  const T* x = static_cast<const T*>(a.x) + channel;
  int32_t rows[kAtOnce];  // -1 past the end
  const auto read_rows = [&](int32_t first) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) rows[i] = first + i * step < end ? a.order[first + i * step] : -1;
  };
  Accumulator<T> sum = 0;
  if (begin >= end) return sum;  // 35 instructions less for padding
  read_rows(begin);
  for (int32_t first = begin; first < end; first += kAtOnce * step) {
    Accumulator<T> elements[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      elements[i] = rows[i] >= 0 ? widen(x[static_cast<int64_t>(rows[i]) * a.channels]) : Accumulator<T>{0};
    }
    read_rows(first + kAtOnce * step);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) sum += elements[i];
  }
  return sum;
}

constexpr int32_t kManyRows = 16;  // larger groups are summed by a warp
constexpr int kRun = 8;

// A thread per (value, channel). Groups of many rows, such as the voxel of a scanner's own returns, are summed by a warp per
// channel: lane l takes rows l, l + 32, ... Such groups tend to be neighbours, so to balance blocks, each searches values
// that are spread over the whole range, in runs of kRun neighbours (32 bytes of offsets).
template <typename T>
__global__ void __launch_bounds__(kThreads) segment_sum_kernel(SegmentSumArgs a) {
  __shared__ int32_t many[kThreads];
  __shared__ int32_t number_of_many;
  T* y = static_cast<T*>(a.y);
  if (threadIdx.x == 0) number_of_many = 0;
  __syncthreads();
  const int64_t i = global_thread();
  const bool exists = i < static_cast<int64_t>(a.values) * a.channels;
  const int32_t value = exists ? static_cast<int32_t>(i / a.channels) : 0;
  const int32_t begin = exists ? a.offsets[value] : 0, end = exists ? a.offsets[value + 1] : 0;
  // All offsets are read before any is tested, so that they are in flight at once.
  const int64_t other = (int64_t{threadIdx.x / kRun} * gridDim.x + blockIdx.x) * kRun + threadIdx.x % kRun;
  const int32_t of_other = other < a.values ? a.offsets[other + 1] - a.offsets[other] : 0;
  if (of_other > kManyRows) many[atomicAdd(&number_of_many, 1)] = static_cast<int32_t>(other);
  if (exists && end - begin <= kManyRows) {
    const int32_t channel = static_cast<int32_t>(i - static_cast<int64_t>(value) * a.channels);
    y[i] = narrow<T>(sum_listed<T>(a, channel, begin, end, 1));
  }
  __syncthreads();
  for (int64_t n = threadIdx.x / kWarp; n < int64_t{number_of_many} * a.channels; n += kThreads / kWarp) {
    const int32_t value = many[n / a.channels], channel = static_cast<int32_t>(n % a.channels);
    const int32_t begin = a.offsets[value] + static_cast<int32_t>(threadIdx.x % kWarp);
    const Accumulator<T> sum = warp_sum(sum_listed<T>(a, channel, begin, a.offsets[value + 1], kWarp));
    if (threadIdx.x % kWarp == 0) y[static_cast<int64_t>(value) * a.channels + channel] = narrow<T>(sum);
  }
}

}  // namespace

cudaError_t invert_index(const InvertIndexArgs& a, cudaStream_t stream) {
  Workspace workspace(a.workspace);
  int bits = 1;
  while (a.values >> bits != 0) ++bits;
  SortBuffers buffers;
  JAXSPARSE_TRY(take_sort_buffers(workspace, a.positions, stream, &buffers));
  const int64_t blocks = div_up(a.positions, kSortThreads);
  return launch_grid<kSortThreads>(invert_index_kernel, blocks, stream, a, buffers, bits);
}

cudaError_t segment_sum(const SegmentSumArgs& a, cudaStream_t stream) {
  const int64_t blocks = div_up(static_cast<int64_t>(a.values) * a.channels, kThreads);
  switch (a.dtype) {
    case Dtype::kF16: return launch(segment_sum_kernel<__half>, blocks, {kThreads}, stream, a);
    case Dtype::kBF16: return launch(segment_sum_kernel<__nv_bfloat16>, blocks, {kThreads}, stream, a);
    case Dtype::kF32: return launch(segment_sum_kernel<float>, blocks, {kThreads}, stream, a);
    case Dtype::kF64: return launch(segment_sum_kernel<double>, blocks, {kThreads}, stream, a);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jaxsparse::cuda
