// cub::DeviceRadixSort::SortKeys with a double buffer: sorts stably by bits [begin_bit, end_bit).
#pragma once

#include "cuda_on_host.h"

namespace cub {

template <typename T>
struct DoubleBuffer {
  T* current = nullptr;
  T* alternate = nullptr;
  DoubleBuffer() = default;
  DoubleBuffer(T* current, T* alternate) : current(current), alternate(alternate) {}
  T* Current() const { return current; }
  T* Alternate() const { return alternate; }
};

struct DeviceRadixSort {
  template <typename T>
  static cudaError_t SortKeys(void* temp, size_t& temp_bytes, DoubleBuffer<T>& keys, int n, int begin_bit, int end_bit,
                              cudaStream_t = nullptr) {
    const size_t needed = static_cast<size_t>(n) / 4 + 65536;
    if (temp == nullptr) return temp_bytes = needed, cudaSuccess;
    if (temp_bytes < needed) return cudaErrorInvalidValue;
    std::memset(temp, 0xa5, needed);
    const T mask = (end_bit - begin_bit == 64 ? ~T{0} : (T{1} << (end_bit - begin_bit)) - 1) << begin_bit;
    std::copy(keys.current, keys.current + n, keys.alternate);
    std::swap(keys.current, keys.alternate);
    std::stable_sort(keys.current, keys.current + n, [=](T a, T b) { return (a & mask) < (b & mask); });
    std::memset(keys.alternate, 0xa5, n * sizeof(T));
    return cudaSuccess;
  }
};

}  // namespace cub
