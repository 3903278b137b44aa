// Writes padding rows of sites.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/coords/key.h"

namespace jaxsparse::cuda {

// Fills rows begin .. end - 1 with padding, in coalesced writes. All threads of the grid call it.
template <int D>
__device__ void fill_padding(int32_t* sites, int64_t begin, int64_t end) {
  if constexpr (D == 3) {
    const int4 padding = make_int4(kPaddingCoord, kPaddingCoord, kPaddingCoord, kPaddingCoord);
    int4* const rows = reinterpret_cast<int4*>(sites);
    for (int64_t row = begin + global_thread(); row < end; row += all_threads()) rows[row] = padding;
  } else {
    for (int64_t i = begin * (1 + D) + global_thread(); i < end * (1 + D); i += all_threads()) sites[i] = kPaddingCoord;
  }
}

// Completes a list of `found` distinct sites: pads it up to `end` and writes the counts. All threads of the grid call it.
template <int D, class Args>
__device__ void end_sites(const Args& a, int32_t found, int32_t end) {
  fill_padding<D>(a.sites, found, end);
  if (global_thread() == 0) {
    *a.kept = min(found, a.capacity);
    *a.found = found;
  }
}

}  // namespace jaxsparse::cuda
