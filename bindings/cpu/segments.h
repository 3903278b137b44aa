// Real and padding rows: an array of rows has `number` equal segments; the first counts[s] rows of segment s are real.
#pragma once

#include <algorithm>
#include <cstdint>

namespace jaxsparse::cpu {

struct Segments {
  int64_t number;
  int64_t rows_each;
  const int32_t* counts;  // [number]

  int64_t rows() const { return number * rows_each; }
  int64_t begin(int64_t s) const { return s * rows_each; }
  int64_t end(int64_t s) const { return begin(s) + std::clamp<int64_t>(counts[s], 0, rows_each); }
};

}  // namespace jaxsparse::cpu
