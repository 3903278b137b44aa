// The hash table of sites, the kernel map looked up in it, and the map's reverse.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/types.h"
#include "cuda/coords/key.h"

namespace jaxsparse::cuda {

// Open addressing with linear probing from first_slot(), 2^log2_slots slots, at most half of them full.
struct HashTable {
  Key* keys;      // [slots], kNoKey where empty
  int32_t* rows;  // [slots], -1 where empty
  int log2_slots;
};

// Enters the first count[0] rows of coords [rows, 1 + dims]. Rows whose site has no key are skipped; of rows with equal
// sites the smallest wins. Where a key lies depends on which thread came first; what a lookup finds does not.
cudaError_t hash_build(const int32_t* coords, const int32_t* count, int dims, int32_t rows, const HashTable& hash,
                       cudaStream_t stream);

struct KernelMapArgs {
  HashTable hash;             // of the input (fine) sites
  const int32_t* out_coords;  // [out_rows, 1 + dims]
  const int32_t* out_count;   // [1]
  Geometry geometry;
  int32_t out_rows, taps, mask_words;
  int32_t* table;   // [taps, out_rows]
  uint32_t* masks;  // [out_rows, mask_words]
};

// table[k, m] = row of site stride * out[m] - padding + dilation * tap_k, -1 where there is none; masks say where.
cudaError_t kernel_map(const KernelMapArgs& args, cudaStream_t stream);

struct ReverseTableArgs {
  const int32_t* table;  // [taps, out_rows]
  Segments out_rows;
  int32_t taps, in_rows, mask_words;
  int32_t* reverse;  // [taps, in_rows]
  uint32_t* masks;   // [in_rows, mask_words]
};

// reverse[k, table[k, m]] = m for real rows m, -1 elsewhere.
cudaError_t reverse_table(const ReverseTableArgs& args, cudaStream_t stream);

}  // namespace jaxsparse::cuda
