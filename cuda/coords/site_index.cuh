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

// Empties slots `begin` to `end`; so many threads call it. Neighbours write neighbouring words, and whole sectors of the cache.
template <typename Slot>
__device__ void clear_slots(Slot* index, int64_t begin, int64_t end, int64_t thread, int64_t threads) {
  constexpr int kWords = sizeof(Slot) / sizeof(uint4);
  uint4* const words = reinterpret_cast<uint4*>(index);
  for (int64_t i = begin * kWords + thread; i < end * kWords; i += threads) words[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
}

}  // namespace jaxsparse::cuda
