// The indexes that kernel maps are made from: of sites in any order, and of the blocks of sorted sites.
#pragma once

#include "cuda/coords/blocks.cuh"
#include "cuda/hash/hash_map.cuh"

namespace jaxsparse::cuda {

// A slot of an index of sites, which is a hash map.
struct alignas(16) SiteSlot {
  uint64_t key;
  int32_t row;
  int32_t unused;

  static __device__ uint32_t hash(uint64_t key) { return static_cast<uint32_t>(jaxsparse::hash(key) >> 32); }
  static JAXSPARSE_HD uint32_t number(int32_t rows) { return static_cast<uint32_t>(hash_slots(rows)); }
};

// An index of blocks. What a block holds lies at the row of its first site, so neighbours lie side by side. A hash table of
// these rows leads there, with 4 bytes a slot. Beside the row a slot has as many bits of the block's hash as fit, so that
// other blocks' slots are seldom followed. Four slots are a bucket, read at once: few searches need a second one. A block is
// entered once, by one thread.
class BlockIndex {
 public:
  struct alignas(16) Block {
    uint64_t key, sites;  // see blocks.cuh; mask of its sites
  };

  // Where a search stands: at the bucket that a state of a generator of random numbers names, the hash first, and at the row
  // of the first site of a block that may be the right one, no row if none may.
  struct Probe {
    uint32_t state, row;
  };

  // An index for an array of `rows` sites, made with so many slots, of whole buckets and more than there will be blocks; or
  // one that was made, which knows its number of slots.
  __device__ BlockIndex(void* index, int32_t rows, uint32_t slots)
      : blocks_(static_cast<Block*>(index) + 1),
        buckets_(reinterpret_cast<uint4*>(blocks_ + rows)),
        number_(slots / kSlots) {
    row_bits_ = 32 - __clz(rows);
  }
  __device__ BlockIndex(void* index, int32_t rows) : BlockIndex(index, rows, *static_cast<const uint32_t*>(index)) {}

  // The number of slots for `rows` sites. There are usually far fewer blocks than sites, and searches are short; even if
  // each site has a block of its own, a fifth of the slots stays empty.
  static JAXSPARSE_HD uint32_t slots_for(int32_t rows) {
    constexpr int32_t kCheap = 1 << 20;  // slots that take little time to clear
    const int32_t more = rows < kCheap / 3 ? 3 * rows : rows < 4 * kCheap ? kCheap : rows / 4;
    return (static_cast<uint32_t>(rows) + more) / kSlots * kSlots + kSlots;
  }

  // Empties all slots. All threads of the grid call it.
  __device__ void clear() const {
    for (int64_t i = global_thread(); i < number_; i += all_threads()) buckets_[i] = make_uint4(kNone, kNone, kNone, kNone);
    if (global_thread() == 0) *reinterpret_cast<uint32_t*>(blocks_ - 1) = number_ * kSlots;
  }

  // Enters a block. The slots must be empty before the first one.
  __device__ void enter(uint64_t block, int32_t first_row, uint64_t sites) const {
    blocks_[first_row] = {block, sites};
    uint32_t state = hash_block(block);
    const uint32_t held = state << row_bits_ | static_cast<uint32_t>(first_row);
    while (true) {
      uint32_t* const slots = reinterpret_cast<uint32_t*>(buckets_ + bucket(state));
#pragma unroll
      for (uint32_t i = 0; i < kSlots; ++i) {
        if (atomicCAS(slots + (first_row + i) % kSlots, kNone, held) == kNone) return;
      }
      state = next(state);
    }
  }

  // Looks up the wanted blocks: up to a slot whose bits of the hash are right, or a bucket that is not full. The buckets of
  // all are read together.
  template <int kBlocks>
  __device__ void probe(const uint64_t (&blocks)[kBlocks], const bool (&wanted)[kBlocks], Probe (&probes)[kBlocks]) const {
    uint4 slots[kBlocks];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      probes[i].state = hash_block(blocks[i]);
      slots[i] = wanted[i] ? buckets_[bucket(probes[i].state)] : make_uint4(kNone, kNone, kNone, kNone);
    }
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      probes[i].row = first_row(slots[i], probes[i].state, 0);
      if (has_row(probes[i]) || !is_full(slots[i])) continue;
      probes[i].state = next(probes[i].state);
      search(blocks[i], 0, &probes[i]);
    }
  }

  // The blocks that were looked up, after their probes; without sites if there are none. A probe whose bits of the hash are
  // those of another block goes on.
  template <int kBlocks>
  __device__ void read(const uint64_t* blocks, Probe* probes, Block (&found)[kBlocks]) const {
    bool goes_on;
    do {
      goes_on = false;
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) found[i] = has_row(probes[i]) ? blocks_[probes[i].row] : Block{blocks[i], 0};
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        if (found[i].key == blocks[i]) continue;
        search(blocks[i], probes[i].row + 1, &probes[i]);
        goes_on = true;
      }
    } while (goes_on);
  }

 private:
  static constexpr uint32_t kSlots = 4;   // of a bucket
  static constexpr uint32_t kNone = ~0u;  // no row has all bits set: 2^row_bits_ exceeds the number of rows

  __device__ uint32_t bucket(uint32_t state) const { return __umulhi(state, number_); }
  // A linear congruential generator (constants of Numerical Recipes): it takes all 2^32 states, so no bucket is left out.
  static __device__ uint32_t next(uint32_t state) { return state * 1664525 + 1013904223; }
  static __device__ bool is_full(uint4 slots) { return max(max(slots.x, slots.y), max(slots.z, slots.w)) != kNone; }
  __device__ bool has_row(Probe probe) const { return probe.row < (1u << row_bits_) - 1; }

  // The lowest row, from `from` on, in slots with the hash's bits; no row if there is none. Empty slots have no row.
  __device__ uint32_t first_row(uint4 slots, uint32_t hash, uint32_t from) const {
    const auto row = [&](uint32_t slot) {
      const uint32_t found = slot ^ hash << row_bits_;  // above all rows if the hash's bits differ
      return found < from ? kNone : found;
    };
    return min(min(row(slots.x), row(slots.y)), min(row(slots.z), row(slots.w)));
  }

  // Goes on from the probe's bucket, in which rows below `from` were seen.
  __device__ void search(uint64_t block, uint32_t from, Probe* probe) const {
    const uint32_t hash = hash_block(block);
    while (true) {
      const uint4 slots = buckets_[bucket(probe->state)];
      probe->row = first_row(slots, hash, from);
      if (has_row(*probe) || !is_full(slots)) return;
      probe->state = next(probe->state);
      from = 0;
    }
  }

  Block* blocks_;   // [rows], one before them is for the number of slots
  uint4* buckets_;  // [number_]
  uint32_t number_;
  int row_bits_;
};

// A site's block, kNoKey if the site has no key, and which of the block's sites it is, -1 if the site does not count.
struct InBlock {
  uint64_t block;
  int32_t bit;

  __device__ uint64_t mask() const { return bit < 0 ? 0 : uint64_t{1} << bit; }
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

// The sites of a block that begins in rows before some row, from that row on.
struct Rest {
  uint64_t block, sites;

  // Adds those among a warp's next rows; all lanes call it. Returns whether the block may go on.
  __device__ bool add(const InBlock& in) {
    const bool is_same = in.block == block && block != kNoKey;
    sites |= or_of_warp(is_same ? in.mask() : 0);
    return __ballot_sync(kAllLanes, is_same) == kAllLanes;
  }
};

// Enters the blocks that begin in a warp's rows, one a lane, of sorted sites; all lanes call it.
//
// in: each lane's site. row: that of the site or, if it does not count, of the next that does; entered if below `rows`.
// begins: whether lane 0 has the first site of its block. rest: of the rows after the warp's; then from the warp's on.
__device__ inline void enter_in_order(const BlockIndex& index, const InBlock& in, int32_t row, int32_t rows, bool begins,
                                      Rest* rest) {
  const uint64_t below = __shfl_up_sync(kAllLanes, in.block, 1);
  const bool leads = threadIdx.x % kWarp == 0 || below != in.block;
  uint64_t sites = or_of_run(in.mask(), leads);
  if (in.block == rest->block) sites |= rest->sites;
  const bool is_first = leads && (begins || threadIdx.x % kWarp != 0);
  if (is_first && in.block != kNoKey && sites != 0 && row < rows) index.enter(in.block, row, sites);
  *rest = {__shfl_sync(kAllLanes, in.block, 0), __shfl_sync(kAllLanes, sites, 0)};
}

}  // namespace jaxsparse::cuda
