// Coordinates on the CPU: distinct sites, the hash map and kernel maps. Plain C++ over raw pointers; the arguments are
// those of the custom calls of the same names (see jaxsparse/ops/_coords.py).
#pragma once

#include <cstdint>

#include "bindings/cpu/parallel.h"
#include "bindings/cpu/segments.h"
#include "cuda/coords/key.h"

namespace jaxsparse::cpu {

// Distinct valid sites of coords[0 .. count), sorted by key; the first `capacity` are kept, `found` counts all.
void unique_sites(const ParallelFor&, int dims, const int32_t* coords, int64_t rows, int64_t count, int64_t capacity,
                  int32_t* sites, int32_t* found, int32_t* row_of);

// Distinct coarse sites that have a window holding one of the fine sites, sorted by key. `bounds` may be null;
// `outside` counts the candidates that have no key.
void coarse_sites(const ParallelFor&, const Geometry&, const int64_t* bounds, const int32_t* coords, int64_t count,
                  int64_t capacity, int32_t* sites, int32_t* found, int32_t* outside);

// Open addressing with linear probing over `slots` (a power of two) slots; of equal sites the smallest row wins.
void hash_build(const ParallelFor&, int dims, const int32_t* coords, int64_t count, int64_t slots, Key* keys,
                int32_t* rows);

// table[k, m] = row of the fine site under output m and tap k, or -1; masks hold the taps present, 32 a word.
void kernel_map(const ParallelFor&, const Geometry&, const Key* keys, const int32_t* rows, int64_t slots,
                const int32_t* out_coords, int64_t out_rows, int64_t out_count, int32_t* table, uint32_t* masks);

// reverse[k, table[k, m]] = m, -1 elsewhere, with the tap masks of the input rows.
void reverse_table(const ParallelFor&, int64_t volume, const int32_t* table, const Segments& out, int64_t in_rows,
                   int32_t* reverse, uint32_t* masks);

}  // namespace jaxsparse::cpu
