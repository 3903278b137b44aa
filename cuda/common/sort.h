// Sorting 64-bit keys, with the temporary storage in the caller's workspace.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/common/types.h"

namespace jaxsparse::cuda {

// Bytes that sort_keys may take for n < 2^31 keys, besides its two key buffers: known without a device, so generous.
//
// On sm_80 and newer CUB sorts 64-bit keys by "onesweep", 8 bits a pass, at most 8 passes. With a double buffer it asks
// for, each part padded to 256 bytes, in portions of just under 2^28 keys (at most 9 below 2^31):
//     bins       portions * 8 passes * 256 digits * 4 bytes                 <= 73,728
//     lookback   ceil(min(n, 2^28) / tile) * 256 digits * 4 bytes           <= n + 1,024 for a tile of 1,024 keys or more
//                                                                           (3,840 and 5,760 in CUB 3.0)
//     counters   portions * 8 passes * 4 bytes                              <= 288
constexpr int64_t sort_temp_bound(int64_t n) { return n + (int64_t{1} << 18); }

// What CUB itself asks for on the current device.
cudaError_t sort_temp_bytes(int64_t n, size_t* bytes);

// Sorts bits [begin_bit, end_bit) of n keys, stably. Both buffers hold n keys and are overwritten; `keys` comes back as
// the sorted one of the two, `spare` as the other. Takes time for n keys whatever they are: n is a host value.
cudaError_t sort_keys(uint64_t** keys, uint64_t** spare, int64_t n, int begin_bit, int end_bit, void* temp,
                      int64_t temp_bytes, cudaStream_t stream);

}  // namespace jaxsparse::cuda
