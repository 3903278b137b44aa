// Builds an index of input sites, or of their blocks: one kernel clears a hash map, another enters the sites. For sites made
// by coarse_sites, that builds the index itself, which costs less. By blocks they take 2 and 6 us for a scan of 91,767 sites
// on an H200, 10 and 21 for 1 million, 37 and 109 for 4 million, whose index no longer fits L2. Tried instead:
//     all blocks entered with atomics, also those of a single warp: entering 7, 23, 125
//     lanes look ahead to what later warps hold of a block, so that only the compare-and-swap is atomic: entering 7, 25, 108
//     only the key of each slot cleared: as long for a scan, 22 us for 1 million sites
#include "cuda/coords/site_index.cuh"

#include "cuda/common/device.cuh"
#include "cuda/coords/kernel_map.h"

namespace jaxsparse::cuda {
namespace {

constexpr int kThreads = 256;

template <int D>
__device__ Key key_of(const Site<D>& site) {
  int64_t coord[D];
  for (int d = 0; d < D; ++d) coord[d] = site.coord[d];
  return make_key<D>(site.batch, coord);
}

template <typename Slot>
__global__ void clear_kernel(SiteIndexArgs a, Slot* index) {
  clear_slots(index, Slot::number(real_rows(a.count, a.rows)));
}

template <int D>
__global__ void enter_kernel(SiteIndexArgs a, SiteSlot* index) {
  const int32_t rows = real_rows(a.count, a.rows);
  HashMap<SiteSlot> map(index, SiteSlot::number(rows));
  for (int64_t row = global_thread(); row < rows; row += all_threads()) {
    const Key key = key_of(Site<D>(a.coords, row));
    if (key == kNoKey) continue;
    // an empty row is -1, the largest unsigned number, so of equal sites the first row wins
    atomicMin(reinterpret_cast<unsigned*>(&map.insert_if_absent(key)->row), static_cast<unsigned>(row));
  }
}

template <int D>
__global__ void enter_kernel(SiteIndexArgs a, BlockSlot* index) {
  const auto site_at = [&](int64_t row) { return Site<D>(a.coords, min(row, int64_t{a.rows} - 1)); };
  int64_t row = global_thread();
  Site<D> site = site_at(row);
  HashMap<BlockSlot> map(index, static_cast<uint32_t>(index->slots));
  __syncwarp();  // keeps the compiler from moving these loads below the branches that wait for the count
  const int32_t rows = real_rows(a.count, a.rows);
  while (row - threadIdx.x % kWarp < rows) {
    const InBlock in = in_block(site);
    // Sites are sorted, so only the first and the last block of a warp may have sites in other warps.
    const bool is_first = __shfl_sync(kAllLanes, in.block, 0) == in.block;
    const bool is_last = __shfl_sync(kAllLanes, in.block, kWarp - 1) == in.block;
    enter_in_order(map, in, row < rows && in.block != kNoKey, static_cast<int32_t>(row), !is_first && !is_last);
    row += all_threads();
    site = site_at(row);
  }
}

template <int D, typename Slot>
cudaError_t enter_sites(const SiteIndexArgs& a, cudaStream_t stream) {
  void (*const enter)(SiteIndexArgs, Slot*) = enter_kernel<D>;
  Slot* const index = static_cast<Slot*>(a.index);
  JAXSPARSE_TRY(launch(clear_kernel<Slot>, striding_blocks(Slot::number(a.rows), kThreads), {kThreads}, stream, a, index));
  return launch(enter, striding_blocks(a.rows, kThreads), {kThreads}, stream, a, index);
}

}  // namespace

cudaError_t site_index(const SiteIndexArgs& a, cudaStream_t stream) {
  return for_dims(a.dims, [&](auto dims) {
    constexpr int D = decltype(dims)::value;
    return a.of_blocks ? enter_sites<D, BlockSlot>(a, stream) : enter_sites<D, SiteSlot>(a, stream);
  });
}

}  // namespace jaxsparse::cuda
