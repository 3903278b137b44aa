// The inner loops of the convolution on the CPU, compiled once per instruction set (CMakeLists.txt sets JAXSPARSE_ISA and
// the flags). Templates of the standard library must not be used here: the linker keeps one copy of an inline function,
// which could hold instructions that the machine lacks.
//
// Both loops hold ROWS x VECTORS accumulators in registers. Each step broadcasts ROWS values and loads VECTORS vectors.
#include "bindings/cpu/conv_isa.h"

#define JAXSPARSE_JOIN_(a, b) a##b
#define JAXSPARSE_JOIN(a, b) JAXSPARSE_JOIN_(a, b)

namespace jaxsparse::cpu {
namespace {

// Block sizes that fit the registers: 32 of 64 bytes, 16 of 32, 16 of 16. Vectors have 64 bytes on all instruction sets.
#if defined(__AVX512F__)
constexpr int kRows = 6, kVectors = 4;
#elif defined(__AVX2__)
constexpr int kRows = 6, kVectors = 1;
#else
constexpr int kRows = 3, kVectors = 1;
#endif

template <typename T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(64)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(64)));
};

template <typename T, int ROWS, int VECTORS>
void gather_gemm_block(const T* x, const int32_t* x_row, const T* w, const int32_t* y_row, int64_t c_in,
                       int64_t columns, T* y) {
  using V = typename Vector<T>::type;
  V acc[ROWS][VECTORS];
  const T* row[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    row[r] = x + x_row[r] * c_in;
    for (int v = 0; v < VECTORS; ++v) acc[r][v] = reinterpret_cast<const V*>(y + y_row[r] * columns)[v];
  }
  for (int64_t c = 0; c < c_in; ++c) {
    const V* weights = reinterpret_cast<const V*>(w + c * columns);
    for (int r = 0; r < ROWS; ++r) {
      for (int v = 0; v < VECTORS; ++v) acc[r][v] += row[r][c] * weights[v];
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) reinterpret_cast<V*>(y + y_row[r] * columns)[v] = acc[r][v];
  }
}

template <typename T, int ROWS, int VECTORS>
void outer_sum_block(const T* x, const T* g, int64_t pairs, int64_t c_in, int64_t columns, T* dw) {
  using V = typename Vector<T>::type;
  V acc[ROWS][VECTORS] = {};
  for (int64_t p = 0; p < pairs; ++p) {
    const V* row = reinterpret_cast<const V*>(g + p * columns);
    for (int r = 0; r < ROWS; ++r) {
      for (int v = 0; v < VECTORS; ++v) acc[r][v] += x[p * c_in + r] * row[v];
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) reinterpret_cast<V*>(dw + r * columns)[v] += acc[r][v];
  }
}

// block_of calls f with a block's size, min(rows, ROWS), as a constant; for_row_blocks takes blocks of kRows, then the rest.
template <int ROWS, typename F>
void block_of(int64_t rows, F&& f) {
  if constexpr (ROWS > 0) {
    if (rows >= ROWS) return f.template operator()<ROWS>();
    block_of<ROWS - 1>(rows, f);
  }
}

template <typename F>
void for_row_blocks(int64_t rows, F&& f) {
  for (int64_t r = 0; r < rows; r += kRows) block_of<kRows>(rows - r, [&]<int ROWS>() { f.template operator()<ROWS>(r); });
}

template <typename F>
void for_column_blocks(int64_t vectors, F&& f) {
  int64_t v = 0;
  for (; v + kVectors <= vectors; v += kVectors) f.template operator()<kVectors>(v);
  for (; v < vectors; ++v) f.template operator()<1>(v);
}

template <typename T>
void gather_gemm(const T* x, const int32_t* x_row, const T* w, const int32_t* y_row, int64_t pairs, int64_t c_in,
                 int64_t columns, T* y) {
  for_column_blocks(columns / kLanes<T>, [&]<int VECTORS>(int64_t v) {
    for_row_blocks(pairs, [&]<int ROWS>(int64_t p) {
      gather_gemm_block<T, ROWS, VECTORS>(x, x_row + p, w + v * kLanes<T>, y_row + p, c_in, columns,
                                          y + v * kLanes<T>);
    });
  });
}

template <typename T>
void outer_sum(const T* x, const T* g, int64_t pairs, int64_t c_in, int64_t columns, T* dw) {
  for_column_blocks(columns / kLanes<T>, [&]<int VECTORS>(int64_t v) {
    for_row_blocks(c_in, [&]<int ROWS>(int64_t i) {
      outer_sum_block<T, ROWS, VECTORS>(x + i, g + v * kLanes<T>, pairs, c_in, columns,
                                        dw + i * columns + v * kLanes<T>);
    });
  });
}

}  // namespace

InnerLoops<float> JAXSPARSE_JOIN(loops_, JAXSPARSE_ISA)(float) { return {gather_gemm<float>, outer_sum<float>}; }
InnerLoops<double> JAXSPARSE_JOIN(loops_, JAXSPARSE_ISA)(double) { return {gather_gemm<double>, outer_sum<double>}; }

}  // namespace jaxsparse::cpu
