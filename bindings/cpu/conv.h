// Convolution on the CPU, for T = float and double, with sums in T. The arguments are those of the custom calls of the same
// names (see jaxsparse/ops/conv/primitives.py). Entries of the table outside [0, in_rows) count as absent.
#pragma once

#include <cstdint>

#include "bindings/cpu/parallel.h"
#include "bindings/cpu/segments.h"

namespace jaxsparse::cpu {

// y[m] = sum over taps k of x[table[k, m]] @ w[k]; padding rows are zero. A task computes `tile_rows` rows.
template <typename T>
void conv_forward(const ParallelFor&, const T* x, int64_t in_rows, const T* w, const int32_t* table,
                  const Segments& out, int64_t volume, int64_t c_in, int64_t c_out, int64_t tile_rows, T* y);

// dw[k] = sum over real rows m of outer(x[table[k, m]], g[m]).
template <typename T>
void conv_wgrad(const ParallelFor&, const T* x, int64_t in_rows, const T* g, const int32_t* table, const Segments& out,
                int64_t volume, int64_t c_in, int64_t c_out, T* dw);

}  // namespace jaxsparse::cpu
