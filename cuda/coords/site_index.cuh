// The slots of an index of sites or blocks, which is a hash map, and how they are filled.
#pragma once

#include "cuda/coords/blocks.cuh"
#include "cuda/hash/hash_map.cuh"

namespace jaxsparse::cuda {

// A site.
struct alignas(16) SiteSlot {
  uint64_t key;
  int32_t row;
  int32_t unused;

  static __device__ uint32_t hash(uint64_t key) { return static_cast<uint32_t>(jaxsparse::hash(key) >> 32); }
  static JAXSPARSE_HD uint32_t number(int32_t rows) { return static_cast<uint32_t>(hash_slots(rows)); }
};

// A block of sites.
struct alignas(32) BlockSlot {
  uint64_t key;    // see blocks.cuh
  uint64_t slots;  // in the first slot: the number of slots
  uint4 sites;     // x, y: mask of the block's sites; z: row of the first one; w: unused. Read and written in one access

  static __device__ uint32_t hash(uint64_t key) { return hash_block(key); }
  __device__ void hold(uint64_t mask, int32_t first_row) {
    sites = make_uint4(static_cast<uint32_t>(mask), static_cast<uint32_t>(mask >> 32), static_cast<uint32_t>(first_row), 0);
  }

  // Adds some of the block's sites; other threads may add others at the same time.
  __device__ void add(uint64_t mask, int32_t first_row) {
    atomicOr(reinterpret_cast<unsigned long long*>(&sites), static_cast<unsigned long long>(mask));
    atomicMin(&sites.z, static_cast<uint32_t>(first_row));
  }

  // The number of slots for `rows` sites. There are usually far fewer blocks than sites; even if each site has a block of
  // its own, a fifth of the slots stays empty.
  static JAXSPARSE_HD uint32_t number(int32_t rows) { return static_cast<uint32_t>(rows) + rows / 4 + 1; }
};

// Empties slots, in coalesced writes of whole sectors. All threads of the grid call it.
template <typename Slot>
__device__ void clear_slots(Slot* index, uint32_t slots) {
  constexpr int kWords = sizeof(Slot) / sizeof(uint4);
  uint4* const words = reinterpret_cast<uint4*>(index);
  for (int64_t i = global_thread(); i < int64_t{slots} * kWords; i += all_threads()) {
    const uint32_t half = i % kWords == 0 ? ~0u : 0;  // kNoKey, or an empty mask
    words[i] = make_uint4(half, half, ~0u, ~0u);
  }
  if constexpr (std::is_same_v<Slot, BlockSlot>) {
    if (global_thread() == 0) index->slots = slots;
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

// Enters a site for each lane of a warp with `exists`; all lanes call it. The first lane of a run in the same block enters
// it for all, so `row` must be that of the lane's site or, without one, that of the next lane with one. If other warps hold
// no site of the block, `is_whole` may say so, which saves atomics. (shifted_sites, short of registers, does not.)
__device__ inline void enter_in_order(HashMap<BlockSlot>& map, const InBlock& in, bool exists, int32_t row,
                                      bool is_whole = false) {
  const uint64_t below = __shfl_up_sync(kAllLanes, in.block, 1);
  const bool leads = threadIdx.x % kWarp == 0 || below != in.block;
  const uint64_t mask = or_of_run(exists ? uint64_t{1} << in.bit : 0, leads);
  if (!leads || mask == 0) return;
  BlockSlot* const slot = map.insert_if_absent(in.block);
  is_whole ? slot->hold(mask, row) : slot->add(mask, row);
}

}  // namespace jaxsparse::cuda
