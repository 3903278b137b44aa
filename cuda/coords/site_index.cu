// Builds an index of input sites, or of their blocks: one kernel clears its slots, another enters the sites. For sites made
// by coarse_sites, that builds the index itself, which costs less.
//
// By blocks, on an H200, in microseconds for a scan of 91,767 sites, 1 million and 4 million: clearing 1.5, 3.4, 6.5, entering
// 4.2, 17, 75, looking up a 3^3 map 6.8, 55, 245. From 1 to 4 million that is more than linear: the 84 MB of slots and blocks
// no longer stay in L2, where looking up finds 78 and 73 % of what it reads and entering 55 and 47. From 4 to 8 million looking
// up is linear, entering takes 2.5 times as long. It waits for reads of sites and slots; with six thread blocks a
// multiprocessor, not eight, it takes 19 and 84.
//
// Tried, with buckets of four slots:
//     buckets next to each other searched one after the other: entering 20, 90 for 1 and 4 million
//     neighbouring blocks, 2^3 or 4^3, in 4 to 32 neighbouring buckets: all together 19 to 34 for the scan, 400 to 515 for 4
//         million
//     sites read past L2 (__ldcs), slots with priority there (evict_last): the same
//     thread blocks with consecutive rows, not strided ones: looking up 67 for 1 million, entering 95 for 4
//     what is needed a round later fetched before, to registers or to L2: the same, up to 2 % more
//
// Tried, when slots were read singly and a warp waited for the longest of its searches, clearing in 1.4, 4, 7, entering in 4,
// 18, 84, looking up in 7.6, 59, 262:
//     one array of hashed slots with key, mask and row, 32 bytes, parts of a block merged by atomics: 2, 10, 37; 6, 21, 109;
//         10, 72, 295, and coarse sites of kernel 2, which make their index, 51 for 1 million where they took 32
//     such keys and such sites in arrays of their own: 1.9, 9, 32; 6, 18, 159; 9.7, 69, 291
//     slots next to each other searched one after the other: 1.6, 5, 8; 6.7, 21, 84; 10.3, 67, 273
//     blocks of 32 bytes, so that whole sectors are written: entering 90 for 4 million where it took 78
//     twice the slots from 1 million sites on: 6, 13 to clear, 19, 93 to enter, 62, 266 to look up
//     a slot per thread cleared, 4 bytes at a time: 2.5, 6, 9, and 4 for 400,000 rows with 100,000 sites, then 1.5
#include "cuda/coords/site_index.cuh"

#include "cuda/common/device.cuh"
#include "cuda/coords/kernel_map.h"

namespace jaxsparse::cuda {
namespace {

constexpr int kThreads = 256, kBlocksAtLeast = 8;  // a multiprocessor

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
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast) enter_blocks_kernel(SiteIndexArgs a) {
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
