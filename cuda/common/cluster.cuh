// Thread block clusters of sm_90: blocks that run together, synchronise, and read each other's shared memory.
//
// Every thread of the cluster must arrive at its barrier and wait for it. Writes before arriving are visible after waiting.
// A block must not end before the others have read its shared memory.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/device.cuh"

namespace jaxsparse::cuda {

// Whether device code for this architecture can use clusters. Host code calls `has_clusters` instead.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_wait() {}
__device__ inline float4 load_from_block(const float4* at, int) { return *at; }
#else
constexpr bool kHasClusters = true;
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Reads another block's shared memory: `at` is an address in this block's, `rank` the other block's rank in the cluster.
__device__ inline float4 load_from_block(const float4* at, int rank) {
  float4 v;
  asm volatile(
      "{\n"
      ".reg .u32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n"
      "}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(at))), "r"(rank));
  return v;
}
#endif

// Whether the code of this kernel that runs on the current device was compiled for an architecture with clusters.
template <typename... Params>
cudaError_t has_clusters(void (*kernel)(Params...), bool* has) {
  cudaFuncAttributes attributes;
  JAXSPARSE_TRY(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  *has = attributes.ptxVersion >= 90;
  return cudaSuccess;
}

}  // namespace jaxsparse::cuda
