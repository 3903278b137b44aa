// Sums over groups of rows on the CPU: a counting sort by index, and one task per range of groups.
#include "bindings/cpu/rows.h"

#include <algorithm>

#include "bindings/cpu/segments.h"

namespace jaxsparse::cpu {

void invert_index(const int32_t* index, int64_t positions, int64_t groups, int32_t* order, int32_t* offsets) {
  std::fill(offsets, offsets + groups + 1, 0);
  const auto valid = [&](int64_t p) { return is_row(index[p], groups); };
  for (int64_t p = 0; p < positions; ++p) {
    if (valid(p)) ++offsets[index[p] + 1];
  }
  for (int64_t v = 0; v < groups; ++v) offsets[v + 1] += offsets[v];
  std::fill(order + offsets[groups], order + positions, -1);
  // Advances offsets[v] from the start of group v to its end, the start of group v + 1; they are shifted back below.
  for (int64_t p = 0; p < positions; ++p) {
    if (valid(p)) order[offsets[index[p]]++] = static_cast<int32_t>(p);
  }
  for (int64_t v = groups; v > 0; --v) offsets[v] = offsets[v - 1];
  offsets[0] = 0;
}

template <typename T>
void segment_sum(const ParallelFor& parallel_for, const T* x, int64_t positions, int64_t channels,
                 const int32_t* order, const int32_t* offsets, int64_t groups, T* y) {
  const auto start = [&](int64_t v) { return std::clamp<int64_t>(offsets[v], 0, positions); };
  parallel_ranges(parallel_for, groups, 2048, [&](int64_t begin, int64_t end) {
    std::fill(y + begin * channels, y + end * channels, T{0});
    for (int64_t v = begin; v < end; ++v) {
      for (int64_t j = start(v), stop = start(v + 1); j < stop; ++j) {
        if (!is_row(order[j], positions)) continue;
        const T* row = x + int64_t{order[j]} * channels;
        for (int64_t c = 0; c < channels; ++c) y[v * channels + c] += row[c];
      }
    }
  });
}

template void segment_sum(const ParallelFor&, const float*, int64_t, int64_t, const int32_t*, const int32_t*, int64_t,
                          float*);
template void segment_sum(const ParallelFor&, const double*, int64_t, int64_t, const int32_t*, const int32_t*, int64_t,
                          double*);

}  // namespace jaxsparse::cpu
