// invert_index: (value, position) packed into 64-bit keys, one stable sort of the value bits, a binary search for each
// value's start. segment_sum: one thread for each (value, channel), rows in order, so no atomics and no race; bound by
// reading x once.
#include "cuda/rows/rows.h"

#include "cuda/common/device.cuh"
#include "cuda/common/numbers.cuh"

namespace jaxsparse::cuda {
namespace {

constexpr int kThreads = 256;

// Positions outside 0 .. values - 1 get the value `values`, which sorts behind the others.
__global__ void pack_kernel(InvertIndexArgs a, uint64_t* keys) {
  const int64_t p = global_thread();
  if (p >= a.positions) return;
  const int32_t value = a.index[p];
  const uint64_t bucket = value >= 0 && value < a.values ? value : a.values;
  keys[p] = bucket << 32 | static_cast<uint64_t>(p);
}

__global__ void unpack_kernel(InvertIndexArgs a, const uint64_t* keys) {
  const int64_t i = global_thread();
  if (i < a.positions) {
    const bool inside = (keys[i] >> 32) < static_cast<uint64_t>(a.values);
    a.order[i] = inside ? static_cast<int32_t>(keys[i] & 0xffffffffu) : -1;
  }
  if (i <= a.values) {
    int32_t low = 0, high = a.positions;  // the first position of value i or above
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if ((keys[middle] >> 32) < static_cast<uint64_t>(i)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    a.offsets[i] = low;
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
  uint64_t* keys = workspace.take<uint64_t>(a.positions);
  uint64_t* spare = workspace.take<uint64_t>(a.positions);
  const int64_t temp_bytes = sort_temp_bound(a.positions);
  int value_bits = 1;
  while (a.values >> value_bits != 0) ++value_bits;
  JAXSPARSE_TRY(launch(pack_kernel, div_up(a.positions, kThreads), kThreads, stream, a, keys));
  JAXSPARSE_TRY(sort_keys(&keys, &spare, a.positions, 32, 32 + value_bits, workspace.take<char>(temp_bytes),
                          temp_bytes, stream));
  const int64_t longest = a.positions > a.values ? a.positions : a.values + int64_t{1};
  return launch(unpack_kernel, div_up(longest, kThreads), kThreads, stream, a, keys);
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
