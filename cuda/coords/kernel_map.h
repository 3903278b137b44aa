// The kernel map, which gives the input row of each tap of each output; its reverse; and the index of sites it is made from.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/types.h"
#include "cuda/coords/key.h"
#include "cuda/coords/window.h"

namespace jaxsparse::cuda {

struct SiteIndexArgs {
  const int32_t* coords;  // [rows, 1 + dims]; if of_blocks, the real ones are distinct and sorted by key
  const int32_t* count;   // [1]
  int dims;
  bool of_blocks;  // an index of blocks of 64 sites, see key.h, instead of sites
  int32_t rows;
  void* index;  // 32 * hash_slots(rows) bytes, aligned to 32
};

// Builds the index that kernel_map searches, unless coarse_sites has made it together with the sites. Its bytes depend on
// the order of threads; the result of a search does not.
cudaError_t site_index(const SiteIndexArgs& args, cudaStream_t stream);

struct KernelMapArgs {
  const int32_t* in_count;    // [1]
  const int32_t* out_coords;  // [out_rows, 1 + dims]
  const int32_t* out_count;   // [1]
  void* index;                // of the input sites
  Geometry geometry;
  MapBuilder builder;
  int32_t in_rows, out_rows, taps, mask_words;
  int32_t* table;   // [taps, out_rows]
  uint32_t* masks;  // [out_rows, mask_words]
};

// table[k, m] = row of site stride * out[m] - padding + dilation * tap_k, or -1; masks hold the taps with a row. Of equal
// input sites the first counts. Columns from out_count on are not written.
cudaError_t kernel_map(const KernelMapArgs& args, cudaStream_t stream);

struct ReverseTableArgs {
  const int32_t* table;  // [taps, out_rows]
  Segments out_rows;
  int32_t taps, in_rows, mask_words;
  int32_t* reverse;  // [taps, in_rows]
  uint32_t* masks;   // [in_rows, mask_words]
};

// reverse[k, table[k, m]] = m for real rows m; masks hold the taps of these entries. Other entries are not written.
cudaError_t reverse_table(const ReverseTableArgs& args, cudaStream_t stream);

}  // namespace jaxsparse::cuda
