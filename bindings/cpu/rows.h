// Sums over groups of rows on the CPU: the order that groups positions by their index, and sums over the groups.
#pragma once

#include <cstdint>

#include "bindings/cpu/parallel.h"

namespace jaxsparse::cpu {

// order: the positions p with 0 <= index[p] < groups, sorted stably by index[p], then -1.
// offsets [groups + 1]: the start of each group in order.
void invert_index(const int32_t* index, int64_t positions, int64_t groups, int32_t* order, int32_t* offsets);

// y[v] = sum of x[order[j]] for j in offsets[v] .. offsets[v + 1], in that order. x and order have `positions` rows;
// what lies outside them is left out. T is float or double.
template <typename T>
void segment_sum(const ParallelFor&, const T* x, int64_t positions, int64_t channels, const int32_t* order,
                 const int32_t* offsets, int64_t groups, T* y);

}  // namespace jaxsparse::cpu
