// The slots of an index of sites: what a key of its hash map stands for.
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
  uint64_t slots;  // in the first one, how many there are
  uint4 sites;     // a mask of which of its 64 exist, the row of the first that does, unused: read and written at once

  static __device__ uint32_t hash(uint64_t key) { return hash_block(key); }
  __device__ void hold(uint64_t mask, int32_t first_row) {
    sites = make_uint4(static_cast<uint32_t>(mask), static_cast<uint32_t>(mask >> 32), static_cast<uint32_t>(first_row), 0);
  }

  // How many for so many sites. There are far fewer blocks than sites, so the map may be small; were each site alone in its
  // block it would still leave a fifth empty.
  static JAXSPARSE_HD uint32_t number(int32_t rows) { return static_cast<uint32_t>(rows) + rows / 4 + 1; }
};

// Empties slots; all threads of the grid call it. Neighbours write neighbouring words, and whole sectors of the cache.
template <typename Slot>
__device__ void clear_slots(Slot* index, uint32_t slots) {
  uint4* const words = reinterpret_cast<uint4*>(index);
  const int64_t number = int64_t{slots} * (sizeof(Slot) / sizeof(uint4));
  for (int64_t i = global_thread(); i < number; i += all_threads()) words[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
  if constexpr (std::is_same_v<Slot, BlockSlot>) {
    if (global_thread() == 0) index->slots = slots;
  }
}

}  // namespace jaxsparse::cuda
