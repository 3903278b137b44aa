// site_index clears a hash map and enters the input sites, in two kernels; of sites that coarse_sites makes it makes the index
// of blocks itself, which costs less there. By blocks 2 and 7 us for a scan of 91,767 sites on an H200, 1 and 3 for 5,925, 10
// and 25 for 1 million. What seems to bound the second is compare-and-swaps, some 9 thousand million a second.
//
// Of each slot the key alone cleared: as long for a scan, 22 us for 1 million sites.
//
// A lane that does not look ahead but enters what its warp holds of a block, the bits by an atomic where another warp has
// more of them, took 0.5 us less for each index, and clearing the masks too 0.3 more.
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
  const uint32_t slots = Slot::number(real_rows(a.count, a.rows));
  clear_slots(index, 0, slots, global_thread(), all_threads());
  if constexpr (std::is_same_v<Slot, BlockSlot>) {
    if (global_thread() == 0) index->slots = slots;
  }
}

template <int D>
__global__ void enter_kernel(SiteIndexArgs a, SiteSlot* index) {
  const int32_t rows = real_rows(a.count, a.rows);
  HashMap<SiteSlot> map(index, SiteSlot::number(rows));
  for (int64_t row = global_thread(); row < rows; row += all_threads()) {
    const Key key = key_of(Site<D>(a.coords, row));
    if (key == kNoKey) continue;
    // -1 is the largest unsigned number, so of equal sites the first row wins
    atomicMin(reinterpret_cast<unsigned*>(&map.insert_if_absent(key)->row), static_cast<unsigned>(row));
  }
}

// A site's block, kNoKey if the site has no key, and which of the block's sites it is.
struct InBlock {
  uint64_t block;
  int32_t bit;
};

template <int D>
__device__ InBlock in_block(const Site<D>& site) {
  constexpr BlockNumbers<D> numbers;
  bool fits = site.batch >= 0 && site.batch <= max_batch(D);
  InBlock in{static_cast<uint64_t>(site.batch) << numbers.batch_shift, 0};
#pragma unroll
  for (int d = 0; d < D; ++d) {
    const uint32_t at = static_cast<uint32_t>(site.coord[d]) + (uint32_t{1} << (axis_bits(D) - 1));
    fits = fits && at < uint32_t{1} << axis_bits(D);
    in.block |= static_cast<uint64_t>(at >> block_axis_bits(D, d)) << numbers.shift[d];
    in.bit |= bits_in_block<D>(d, static_cast<int32_t>(at));
  }
  if (!fits) in.block = kNoKey;
  return in;
}

// Sorted sites: of the lanes that hold one block's, neighbours, the first enters it.
template <int D>
__global__ void enter_kernel(SiteIndexArgs a, BlockSlot* index) {
  const auto site_at = [&](int64_t row) { return Site<D>(a.coords, max(min(row, int64_t{a.rows} - 1), int64_t{0})); };
  const int lane = threadIdx.x % kWarp;
  int64_t row = global_thread();
  Site<D> site = site_at(row), below = site_at(row - 1), ahead = site_at(row + kWarp);
  HashMap<BlockSlot> map(index, static_cast<uint32_t>(index->slots));
  __syncwarp();  // keeps those reads above the branches that wait for the count
  const int32_t rows = real_rows(a.count, a.rows);
  while (row - lane < rows) {
    const InBlock in = in_block(site);
    const uint64_t block = row < rows ? in.block : kNoKey;
    const bool begins = row == 0 || in_block(below).block != block;
    uint64_t mask = or_of_run(block == kNoKey ? 0 : uint64_t{1} << in.bit, lane == 0 || begins);
    // The last lane's block may go on: 64 sites lie in no more than three warps.
    const uint64_t last_block = __shfl_sync(kAllLanes, block, kWarp - 1);
    uint64_t rest = 0;
    bool goes_on = last_block != kNoKey;
    for (int warps = 1; warps <= 2 && goes_on; ++warps) {
      if (warps == 2) ahead = site_at(row + 2 * kWarp);
      const InBlock next = in_block(ahead);
      const bool belongs = row + warps * kWarp < rows && next.block == last_block;
      const uint64_t bit = belongs ? uint64_t{1} << next.bit : 0;
      const uint32_t low = __reduce_or_sync(kAllLanes, static_cast<uint32_t>(bit));
      const uint32_t high = __reduce_or_sync(kAllLanes, static_cast<uint32_t>(bit >> 32));
      rest |= static_cast<uint64_t>(high) << 32 | low;
      goes_on = __shfl_sync(kAllLanes, belongs, kWarp - 1);
    }
    if (block != kNoKey && begins) {
      if (block == last_block) mask |= rest;
      map.insert_if_absent(block)->hold(mask, static_cast<int32_t>(row));
    }
    row += all_threads();
    site = site_at(row);
    below = site_at(row - 1);
    ahead = site_at(row + kWarp);
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
