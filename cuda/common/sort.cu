// The only file that includes CUB.
#include "cuda/common/sort.h"

#include <cub/device/device_radix_sort.cuh>

#include "cuda/common/device.cuh"

namespace jaxsparse::cuda {

cudaError_t sort_temp_bytes(int64_t n, size_t* bytes) {
  ::cub::DoubleBuffer<uint64_t> buffers;
  *bytes = 0;
  return ::cub::DeviceRadixSort::SortKeys(nullptr, *bytes, buffers, static_cast<int>(n), 0, 64);
}

cudaError_t sort_keys(uint64_t** keys, uint64_t** spare, int64_t n, int begin_bit, int end_bit, void* temp,
                      int64_t temp_bytes, cudaStream_t stream) {
  if (n > INT32_MAX) return cudaErrorInvalidValue;
  ::cub::DoubleBuffer<uint64_t> buffers(*keys, *spare);
  size_t bytes = static_cast<size_t>(temp_bytes);
  JAXSPARSE_TRY(::cub::DeviceRadixSort::SortKeys(temp, bytes, buffers, static_cast<int>(n), begin_bit, end_bit, stream));
  *keys = buffers.Current();
  *spare = buffers.Alternate();
  return cudaSuccess;
}

}  // namespace jaxsparse::cuda
