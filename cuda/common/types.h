// Types that the bindings pass to the kernels.
#pragma once

#include <cstdint>

#include "cuda/common/host_device.h"

namespace jaxsparse::cuda {

enum class Dtype { kF16, kBF16, kF32, kF64 };

// Sums are float32, or float64 for float64 features.
constexpr int64_t accumulator_bytes(Dtype dtype) { return dtype == Dtype::kF64 ? 8 : 4; }

// `rows` rows in `number` equal segments; row r is real where r % (rows / number) < counts[r / (rows / number)].
struct Segments {
  const int32_t* counts;  // on the device
  int32_t number;
  int32_t rows;
};

constexpr int kTapsOfWord = 32;  // taps in one word of a mask

JAXSPARSE_HD constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The alignment of the parts of a workspace, in bytes.
constexpr int64_t kWorkspaceAlign = 256;
constexpr int64_t padded(int64_t bytes) { return div_up(bytes, kWorkspaceAlign) * kWorkspaceAlign; }

// Hands out consecutive parts of a workspace.
class Workspace {
 public:
  explicit Workspace(void* base) : next_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t elements) {
    T* part = reinterpret_cast<T*>(next_);
    next_ += padded(elements * static_cast<int64_t>(sizeof(T)));
    return part;
  }

 private:
  char* next_;
};

}  // namespace jaxsparse::cuda
