// Helpers that all kernel files use: launches, real rows, coordinate rows, and sums and scans over a warp or block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/common/types.h"

#define JAXSPARSE_TRY(call)                                                    \
  do {                                                                        \
    if (const cudaError_t error = (call); error != cudaSuccess) return error; \
  } while (0)

namespace jaxsparse::cuda {

struct Block {
  int threads;
  int64_t shared_bytes = 0;  // dynamic shared memory, see dynamic_shared()
  int cluster = 1;           // blocks per cluster, see cluster.cuh; divides the number of blocks
};

// Launches a kernel with `blocks` blocks, at least one cluster. Returns the status of this launch, not an error left behind
// by an earlier one. (Tried: the later kernels of a handler launched early, by programmatic stream serialisation, which XLA's
// graphs keep. Whole networks gained nothing to 0.7 %.)
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, Block block, cudaStream_t stream, Args... args) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks > 0 ? blocks : block.cluster));
  config.blockDim = dim3(static_cast<unsigned>(block.threads));
  config.dynamicSmemBytes = static_cast<size_t>(block.shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute cluster = {};
  if (block.cluster > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(block.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

// Calls f(std::integral_constant<int, D>) for a run-time number of dimensions.
template <typename F>
cudaError_t for_dims(int dims, F&& f) {
  switch (dims) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    default: return cudaErrorInvalidValue;
  }
}

// The 64-bit product of two non-negative numbers: one instruction, where a signed product takes three.
__device__ inline uint64_t wide(uint32_t a, uint32_t b) { return uint64_t{a} * b; }

// The number of real rows among `rows` rows in one segment.
__device__ inline int32_t real_rows(const int32_t* count, int32_t rows) {
  return count[0] < 0 ? 0 : count[0] < rows ? count[0] : rows;
}

// Row -1 is not real.
__device__ inline bool row_is_real(const Segments& segments, int32_t row) {
  if (static_cast<uint32_t>(row) >= static_cast<uint32_t>(segments.rows)) return false;
  if (segments.number == 1) return row < segments.counts[0];
  const int32_t segment_rows = segments.rows / segments.number;
  return row % segment_rows < segments.counts[row / segment_rows];
}

// The kernel's dynamic shared memory, aligned for wgmma; more than 48 KiB needs cudaFuncAttributeMaxDynamicSharedMemorySize.
__device__ inline char* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(1024) char bytes[];
  return bytes;
#else  // host tests
  return cuda_on_host::dynamic_shared;
#endif
}

// *bytes: the shared memory that a block may have on this device.
inline cudaError_t most_shared_memory(int* bytes) {
  int device = 0;
  JAXSPARSE_TRY(cudaGetDevice(&device));
  return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// *at_once: the smaller of `blocks` and the number of blocks resident at once, at least 1.
template <typename... Params>
cudaError_t blocks_at_once(void (*kernel)(Params...), Block block, int64_t blocks, int* at_once) {
  int device = 0, processors = 0, per_processor = 0;
  JAXSPARSE_TRY(cudaGetDevice(&device));
  JAXSPARSE_TRY(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  JAXSPARSE_TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, block.threads,
                                                              static_cast<size_t>(block.shared_bytes)));
  const int64_t most = int64_t{processors} * per_processor;
  if (blocks > most) blocks = most;
  *at_once = static_cast<int>(blocks > 0 ? blocks : 1);
  return cudaSuccess;
}

// The grid size of a kernel with a grid-stride loop over a number of items that only the device knows: enough blocks to fill
// any device, but bounded, so that a larger capacity costs nothing.
constexpr int64_t kMostStridingBlocks = 4096;
constexpr int64_t striding_blocks(int64_t items, int64_t items_a_block) {
  const int64_t blocks = div_up(items, items_a_block);
  return blocks < kMostStridingBlocks ? blocks : kMostStridingBlocks;
}

__device__ inline int64_t all_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

__device__ inline int64_t global_thread() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

// A row of coordinates, int32 [1 + D]; for D = 3 it is read and written in one access.
template <int D>
struct Site {
  int32_t batch, coord[D];

  Site() = default;
  __device__ Site(const int32_t* coords, int64_t row) {
    if constexpr (D == 3) {
      const int4 site = reinterpret_cast<const int4*>(coords)[row];
      batch = site.x;
      coord[0] = site.y;
      coord[1] = site.z;
      coord[2] = site.w;
    } else {
      batch = coords[row * (1 + D)];
      for (int d = 0; d < D; ++d) coord[d] = coords[row * (1 + D) + 1 + d];
    }
  }

  __device__ void write(int32_t* coords, int64_t row) const {
    if constexpr (D == 3) {
      reinterpret_cast<int4*>(coords)[row] = make_int4(batch, coord[0], coord[1], coord[2]);
    } else {
      coords[row * (1 + D)] = batch;
      for (int d = 0; d < D; ++d) coords[row * (1 + D) + 1 + d] = coord[d];
    }
  }
};

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// OR over a warp; all lanes call it.
__device__ inline uint64_t or_of_warp(uint64_t bits) {
  const uint32_t high = __reduce_or_sync(kAllLanes, static_cast<uint32_t>(bits >> 32));
  return uint64_t{high} << 32 | __reduce_or_sync(kAllLanes, static_cast<uint32_t>(bits));
}

// Segmented OR over a warp. A segment is a lane that leads and the lanes after it that do not; the leading lane gets the OR
// of its segment. All lanes call it, and lane 0 leads.
__device__ inline uint64_t or_of_run(uint64_t bits, bool leads) {
  const int lane = threadIdx.x % kWarp;
  const unsigned leaders = __ballot_sync(kAllLanes, leads);
  const int leader = 31 - __clz(leaders & (0xffffffffu >> (31 - lane)));
  for (int step = 1; step < kWarp; step *= 2) {  // each lane adds what the lane `step` above has gathered
    const uint64_t above = __shfl_down_sync(kAllLanes, bits, step);
    const int leader_above = __shfl_down_sync(kAllLanes, leader, step);
    if (lane + step < kWarp && leader_above == leader) bits |= above;
  }
  return bits;
}

// Sum over the lanes of a warp, all of which call it, as a butterfly: halves first, then quarters, and so on.
template <typename V>
__device__ V warp_sum(V value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Sum over the lanes of a warp up to and including this one. All lanes call it.
template <typename V>
__device__ V warp_inclusive_scan(V value) {
  const int lane = threadIdx.x % kWarp;
  for (int step = 1; step < kWarp; step *= 2) {
    const V below = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += below;
  }
  return value;
}

// Sum of `value` over the threads before this one; *total becomes the sum over the block. All threads of the block call it.
template <int kThreads, typename V>
__device__ V block_exclusive_scan(V value, V* total) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kThreads % kWarp == 0 && kWarps <= kWarp);
  alignas(16) __shared__ V sums[kWarps];  // aligned, since it is read 16 bytes at a time
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const V before = warp_inclusive_scan(value);
  __syncthreads();  // threads may still read the sums of an earlier scan
  if (lane == kWarp - 1) sums[warp] = before;
  __syncthreads();
  V earlier = 0, all = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) earlier += sums[w];
    all += sums[w];
  }
  *total = all;
  return earlier + before - value;
}

}  // namespace jaxsparse::cuda
