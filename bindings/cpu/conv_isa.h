// The two inner loops of the convolution on the CPU, compiled once per instruction set and chosen at the first call.
#pragma once

#include <cstdint>

namespace jaxsparse::cpu {

// Columns are processed in vectors of 64 bytes: 16 floats or 8 doubles. Callers pad their buffers to whole vectors.
template <typename T>
constexpr int64_t kLanes = 64 / sizeof(T);

template <typename T>
struct InnerLoops {
  // For each pair p: y[y_row[p]] += x[x_row[p]] @ w, with w [c_in, columns], y rows `columns` apart, x rows c_in apart.
  // `columns` is a whole number of vectors and w, y are 64-byte aligned.
  void (*gather_gemm)(const T* x, const int32_t* x_row, const T* w, const int32_t* y_row, int64_t pairs, int64_t c_in,
                      int64_t columns, T* y);
  // dw[i, :] += sum over p of x[p, i] * g[p, :], with x [pairs, c_in], g [pairs, columns], dw [c_in, columns].
  void (*outer_sum)(const T* x, const T* g, int64_t pairs, int64_t c_in, int64_t columns, T* dw);
};

// The argument only selects the element type. avx2 and avx512 exist only on x86-64.
InnerLoops<float> loops_baseline(float);
InnerLoops<double> loops_baseline(double);
InnerLoops<float> loops_avx2(float);
InnerLoops<double> loops_avx2(double);
InnerLoops<float> loops_avx512(float);
InnerLoops<double> loops_avx512(double);

}  // namespace jaxsparse::cpu
