// wmma: lane 0 of a warp holds each fragment whole, the other lanes hold nothing.
#pragma once

#include "cuda_fp16.h"
#include "cuda_on_host.h"

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major };

inline float to_float(__half v) { return __half2float(v); }
inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  static constexpr int kRows = std::is_same_v<Use, matrix_b> ? K : M;
  static constexpr int kCols = std::is_same_v<Use, matrix_a> ? K : N;
  static constexpr int num_elements = kRows * kCols;
  float x[num_elements];  // row-major
};

inline bool is_leader() { return threadIdx.x % 32 == 0; }

inline void check_operand(const void* at, size_t stride_bytes) {
  if (reinterpret_cast<uintptr_t>(at) % 32 != 0 || stride_bytes % 16 != 0) {
    cuda_on_host::die("a wmma operand is misaligned");
  }
}

template <typename F>
void fill_fragment(F& f, float value) {
  std::fill(f.x, f.x + F::num_elements, value);
}

template <typename Use, int M, int N, int K, typename T, typename Layout, typename S>
void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& f, const S* from, int stride) {
  using F = fragment<Use, M, N, K, T, Layout>;
  check_operand(from, stride * sizeof(S));
  if (!is_leader()) return;
  for (int r = 0; r < F::kRows; ++r) {
    for (int c = 0; c < F::kCols; ++c) {
      f.x[r * F::kCols + c] = to_float(std::is_same_v<Layout, row_major> ? from[r * stride + c] : from[c * stride + r]);
    }
  }
}

template <typename D, typename A, typename B>
void mma_sync(D& d, const A& a, const B& b, const D& c) {
  if (!is_leader()) return;
  for (int i = 0; i < D::kRows; ++i) {
    for (int j = 0; j < D::kCols; ++j) {
      float sum = c.x[i * D::kCols + j];
      for (int k = 0; k < A::kCols; ++k) sum += a.x[i * A::kCols + k] * b.x[k * B::kCols + j];
      d.x[i * D::kCols + j] = sum;
    }
  }
}

template <typename F>
void store_matrix_sync(float* to, const F& f, int stride, layout_t) {
  check_operand(to, stride * sizeof(float));
  if (!is_leader()) return;
  for (int r = 0; r < F::kRows; ++r) {
    for (int c = 0; c < F::kCols; ++c) to[r * stride + c] = f.x[r * F::kCols + c];
  }
}

}  // namespace nvcuda::wmma
