// Builds an index of input sites, or of their blocks: one kernel clears its slots, another enters the sites. For sites made
// by coarse_sites, that builds the index itself, which costs less.
//
// By blocks, on an H200, in microseconds for a scan of 91,767 sites, 1 million and 4 million: clearing 1.4, 4, 7, entering 4,
// 18, 84, looking up a 3^3 map 7.6, 59, 262. Beyond a million sites what is looked up (24 MB of slots and 64 MB with blocks for
// 4 million) no longer stays in L2. Tried instead, with slots for 1.25 times the sites up to the blocks of 32 bytes:
//     one array of hashed slots with key, mask and row, 32 bytes, parts of a block merged by atomics: 2, 10, 37; 6, 21, 109;
//         10, 72, 295, and coarse sites of kernel 2, which make their index, 51 for 1 million where they take 32 now
//     such keys and such sites in arrays of their own: 1.9, 9, 32; 6, 18, 159; 9.7, 69, 291
//     this index, slots next to each other probed one after the other: 1.6, 5, 8; 6.7, 21, 84; 10.3, 67, 273. Searches differ
//         little in mean, but a warp waits for the longest of its 256
//     blocks of 32 bytes, so that whole sectors are written: entering 90 for 4 million where it took 78
//     twice the slots from 1 million sites on: 6, 13 to clear, 19, 93 to enter, 62, 266 to look up
//     blocks that are neighbours on the last two axes side by side in the slots: looking up 8.1, 63, 267
//     sites read and blocks written past L2 (__ldcs, __stcs) when entering: 4, 18, 81
//     slots with priority in L2 (evict_last): entering 4, 18, 71, but they would keep it from the kernels that follow
//     a slot per thread cleared, 4 bytes at a time: 2.5, 6, 9, and 4 for 400,000 rows with 100,000 sites, now 1.5
#include "cuda/coords/site_index.cuh"

#include "cuda/common/device.cuh"
#include "cuda/coords/kernel_map.h"

namespace jaxsparse::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void clear_sites_kernel(SiteIndexArgs a, SiteSlot* index) {
  uint4* const words = reinterpret_cast<uint4*>(index);
  const int64_t slots = SiteSlot::number(real_rows(a.count, a.rows));
  for (int64_t i = global_thread(); i < slots; i += all_threads()) words[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
}

template <int D>
__global__ void enter_sites_kernel(SiteIndexArgs a, SiteSlot* index) {
  const int32_t rows = real_rows(a.count, a.rows);
  HashMap<SiteSlot> map(index, SiteSlot::number(rows));
  for (int64_t row = global_thread(); row < rows; row += all_threads()) {
    const Site<D> site(a.coords, row);
    const Key key = make_key<D>(site.batch, site.coord);
    if (key == kNoKey) continue;
    // an empty row is -1, the largest unsigned number, so of equal sites the first row wins
    atomicMin(reinterpret_cast<unsigned*>(&map.insert_if_absent(key)->row), static_cast<unsigned>(row));
  }
}

__global__ void clear_blocks_kernel(SiteIndexArgs a) {
  BlockIndex(a.index, a.rows, BlockIndex::slots_for(real_rows(a.count, a.rows))).clear();
}

template <int D>
__global__ void enter_blocks_kernel(SiteIndexArgs a) {
  const int32_t lane = threadIdx.x % kWarp, step = static_cast<int32_t>(all_threads());
  const auto site_at = [&](int32_t row) { return Site<D>(a.coords, max(min(row, a.rows - 1), 0)); };
  int32_t first = static_cast<int32_t>(global_thread()) - lane;  // of the warp's rows
  Site<D> before = site_at(first - 1), site = site_at(first + lane), after = site_at(first + lane + kWarp);
  const BlockIndex index(a.index, a.rows);
  __syncwarp();  // keeps the compiler from moving these loads below the branches that wait for the count
  const int32_t rows = real_rows(a.count, a.rows);
#pragma unroll 1
  while (first < rows) {
    const int32_t row = first + lane;
    const InBlock in = row < rows ? in_block(site) : InBlock{kNoKey, -1};
    Rest rest{__shfl_sync(kAllLanes, in.block, kWarp - 1), 0};
    for (int32_t later = row + kWarp; rest.add(later < rows ? in_block(after) : InBlock{kNoKey, -1});) {
      later += kWarp;
      after = site_at(later);
    }
    enter_in_order(index, in, row, rows, first == 0 || !same_block(before, site), &rest);
    first += step;
    before = site_at(first - 1);
    site = site_at(first + lane);
    after = site_at(first + lane + kWarp);
  }
}

template <int D>
cudaError_t index_in(const SiteIndexArgs& a, cudaStream_t stream) {
  if (a.of_blocks) {
    constexpr int64_t kSlots = 16;  // that a thread clears: few blocks, since the number of rows decides how many there are
    const int64_t blocks = striding_blocks(BlockIndex::slots_for(a.rows), kSlots * kThreads);
    JAXSPARSE_TRY(launch(clear_blocks_kernel, blocks, {kThreads}, stream, a));
    return launch(enter_blocks_kernel<D>, striding_blocks(a.rows, kThreads), {kThreads}, stream, a);
  }
  SiteSlot* const index = static_cast<SiteSlot*>(a.index);
  JAXSPARSE_TRY(launch(clear_sites_kernel, striding_blocks(hash_slots(a.rows), kThreads), {kThreads}, stream, a, index));
  return launch(enter_sites_kernel<D>, striding_blocks(a.rows, kThreads), {kThreads}, stream, a, index);
}

}  // namespace

cudaError_t site_index(const SiteIndexArgs& a, cudaStream_t stream) {
  return for_dims(a.dims, [&](auto dims) { return index_in<decltype(dims)::value>(a, stream); });
}

}  // namespace jaxsparse::cuda
