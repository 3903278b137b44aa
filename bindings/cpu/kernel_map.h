// Kernel maps on the CPU. Plain C++ over raw pointers; the arguments are those of the custom calls of the same names (see
// jaxsparse/_coords.py).
#pragma once

#include <cstdint>

#include "bindings/cpu/parallel.h"
#include "bindings/cpu/segments.h"
#include "cuda/coords/key.h"

namespace jaxsparse::cpu {

// Enters the sites of coords[0 .. count), or if of_blocks (and sorted) their blocks of 64, into a hash map in `index`, which
// has 32 bytes for each of hash_slots(rows) slots.
void site_index(const ParallelFor&, int dims, bool of_blocks, const int32_t* coords, int64_t count, int64_t rows,
                void* index);

struct KernelMapArgs {
  Geometry geometry;
  bool by_blocks;  // `index` is an index of blocks
  const void* index;
  int64_t in_rows, in_count;
  const int32_t* out_coords;
  int64_t out_rows, out_count;
  int32_t* table;   // [taps, out_rows]
  uint32_t* masks;  // [out_rows, ceil(taps / 32)]
};

// table[k, m] = row of the fine site under output m and tap k, or -1; masks hold the taps with a row, 32 per word. Of equal
// input sites the first counts. Columns from out_count on are not written.
void kernel_map(const ParallelFor&, const KernelMapArgs&);

// reverse[k, table[k, m]] = m, -1 elsewhere; masks hold the taps of each input row. Entries outside [0, in_rows) count as
// absent.
void reverse_table(const ParallelFor&, int64_t volume, const int32_t* table, const Segments& out, int64_t in_rows,
                   int32_t* reverse, uint32_t* masks);

}  // namespace jaxsparse::cpu
