// cuda/common/cluster.cuh on the host. At the barrier of a cluster the other blocks have their turns, as at that of a grid.
#pragma once

#include "cuda/common/device.cuh"

namespace jaxsparse::cuda {

constexpr bool kHasClusters = true;

inline void cluster_arrive() {
  if (cuda_on_host::running->has_arrived) cuda_on_host::die("a thread arrives twice at a barrier of its cluster");
  cuda_on_host::running->has_arrived = true;
}
inline void cluster_wait() {
  if (!cuda_on_host::running->has_arrived) cuda_on_host::die("a thread waits at a barrier where it has not arrived");
  cuda_on_host::running->has_arrived = false;
  __syncthreads();
  if (threadIdx.x == 0) {
    cuda_on_host::turns.pass_on();
    cuda_on_host::turns.wait_for(cuda_on_host::own_turn);
  }
  __syncthreads();
}

inline float4 load_from_block(const float4* at, int rank) {
  return *reinterpret_cast<const float4*>(cuda_on_host::shared_of_blocks.elsewhere(at, rank));
}

template <typename... Params>
cudaError_t has_clusters(void (*)(Params...), bool* has) {
  return *has = cuda_on_host_has_clusters, cudaSuccess;
}

}  // namespace jaxsparse::cuda
