// Which rows are real, and which entries are rows.
#pragma once

#include <algorithm>
#include <cstdint>

namespace jaxsparse::cpu {

// Real and padding rows: an array of rows has `number` equal segments; the first counts[s] rows of segment s are real.
struct Segments {
  int64_t number;
  int64_t rows_each;
  const int32_t* counts;  // [number]

  int64_t rows() const { return number * rows_each; }
  int64_t begin(int64_t s) const { return s * rows_each; }
  int64_t end(int64_t s) const { return begin(s) + std::clamp<int64_t>(counts[s], 0, rows_each); }
};

// Whether an entry of an operand is one of `rows` rows, at most 2^31; others count as absent.
inline bool is_row(int32_t entry, int64_t rows) { return static_cast<uint32_t>(entry) < static_cast<uint32_t>(rows); }

}  // namespace jaxsparse::cpu
