// Distinct and coarse sites on the CPU. Plain C++ over raw pointers; the arguments are those of the custom calls of the same
// names (see jaxsparse/_coords.py).
#pragma once

#include <cstdint>

#include "bindings/cpu/parallel.h"
#include "cuda/coords/key.h"

namespace jaxsparse::cpu {

// Distinct valid sites of coords[0 .. count), sorted by key; the first `capacity` are kept, `found` counts all. The points
// of row r are order[offsets[r]] .. order[offsets[r + 1] - 1], increasing. without[i] counts the points with batch -1 - i.
void unique_sites(const ParallelFor&, int dims, const int32_t* coords, int64_t rows, int64_t count, int64_t capacity,
                  int32_t* sites, int32_t* found, int32_t* row_of, int32_t* order, int32_t* offsets,
                  int32_t* without);

// Distinct coarse sites whose window holds a fine site, sorted by key. `bounds` may be null. `outside` counts the (fine
// site, tap) pairs within bounds whose coarse coordinate has no key.
void coarse_sites(const ParallelFor&, const Geometry&, const int64_t* bounds, const int32_t* coords, int64_t count,
                  int64_t capacity, int32_t* sites, int32_t* found, int32_t* outside);

}  // namespace jaxsparse::cpu
