// Computes coarse sites for every geometry and order of fine sites, except the cases of shifted_sites.cu. It works on blocks
// of 64 coarse sites, stored as 64-bit masks: neighbouring fine sites reach the same few blocks. Three kernels:
//
//     extent  finds how far from 0 the fine sites lie, which decides how many bits the blocks' codes need
//     list    each thread block collects the masks of the blocks that its rows reach, in a hash map in shared memory. It
//             lists them with their codes and marks them in the top level of the tree
//     tree    cooperative: sorts the listed blocks, see tree.cuh, and writes their sites, and the index for kernel maps from
//             these sites
//
// 111,028 sites of a scan, kernel 3^3, stride 2, reach 14,351 blocks; 256 rows at a time list 18 thousand entries.
// On an H200 87,872 sites of another scan take 3, 10 and 19 us, 10,000 sites 3, 9 and 11.
//
// Tried, not faster:
//     a sort of the list by block: 60 us more, on an H100
//     blocks entered in the index as soon as their leaves are known, before the sites are numbered: 2 us more for 10,000 sites
//     one cooperative kernel for all, codes with as many bits on each axis as the longest needs: 42 us, 20 for 32,667 sites
#include "cuda/coords/coarse_sites.h"

#include "cuda/coords/block_codes.cuh"
#include "cuda/coords/padding.cuh"
#include "cuda/coords/reached.cuh"
#include "cuda/coords/site_index.cuh"
#include "cuda/coords/tree.cuh"

namespace jaxsparse::cuda {
namespace {

constexpr int kListThreads = 256;
constexpr int kListSlots = 1024;
constexpr int kExtentBlocks = kListThreads;  // at most, so that list_kernel has a thread for each one's result

// A block of coarse sites, and a mask of those that some fine sites reach.
struct alignas(16) Entry {
  uint64_t block;  // see blocks.cuh
  uint64_t sites;
};

struct Scratch {
  Entry* entries;     // [candidates]
  uint64_t* codes;    // [candidates], see BlockCodes
  Tree tree;          // of the entries
  uint32_t* highest;  // [1 + D, kExtentBlocks], maxima over the rows of each thread block: batch, |coordinate| on each axis
  int32_t* number;    // [1], number of entries
  int32_t* bits;      // [1], bits per code
};

template <int D>
__global__ void __launch_bounds__(kGridThreads) extent_kernel(CoarseSitesArgs a, Scratch s) {
  const auto site_at = [&](int64_t row) { return Site<D>(a.coords, min(row, int64_t{a.rows} - 1)); };
  constexpr int kAtOnce = 2;
  Site<D> sites[kAtOnce];
  const auto read = [&](int64_t row) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) sites[i] = site_at(row + i * all_threads());
  };
  int64_t row = global_thread();
  read(row);  // in flight together with the load of the count
  clear_tree(s.tree);
  if (row == 0) *s.number = *a.outside = 0;
  const int32_t rows = real_rows(a.count, a.rows);
  uint32_t highest[1 + D] = {};
  while (row < rows) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const Site<D>& site = sites[i];
      if (row + i * all_threads() >= rows || !has_key<D>(site.batch, site.coord)) continue;
      highest[0] = max(highest[0], static_cast<uint32_t>(site.batch));
      for (int d = 0; d < D; ++d) {
        const int32_t from_0 = site.coord[d] ^ site.coord[d] >> 31;  // -1 counts as 0
        highest[1 + d] = max(highest[1 + d], static_cast<uint32_t>(from_0));
      }
    }
    row += kAtOnce * all_threads();
    read(row);
  }
  block_max(highest);
  for (int i = 0; i < 1 + D; ++i) s.highest[i * kExtentBlocks + blockIdx.x] = highest[i];
}

// The blocks of coarse sites that the rows of a thread block reach: a hash map in shared memory.
struct BlockList {
  uint64_t block[kListSlots];  // kNoKey in an empty slot
  uint32_t sites[2][kListSlots];
  int32_t slot_of[kListSlots], number;  // the taken slots

  __device__ void clear() {
    for (int slot = threadIdx.x; slot < kListSlots; slot += kListThreads) {
      block[slot] = kNoKey;
      sites[0][slot] = sites[1][slot] = 0;
    }
    if (threadIdx.x == 0) number = 0;
  }

  // Adds sites of a block. Returns false if no slot was found.
  __device__ bool add(uint64_t key, uint64_t of_block) {
    constexpr int kTries = 16;
    uint32_t slot = hash_block(key) >> 16;
#pragma unroll 1
    for (int i = 0; i < kTries; ++i) {
      slot = (slot + i) % kListSlots;
      uint64_t held = *const_cast<volatile uint64_t*>(&block[slot]);
      if (held == kNoKey) {
        held = atomicCAS(reinterpret_cast<unsigned long long*>(&block[slot]), ~0ull, static_cast<unsigned long long>(key));
        if (held == kNoKey) {
          slot_of[atomicAdd(&number, 1)] = static_cast<int32_t>(slot);
          held = key;
        }
      }
      if (held != key) continue;
      const uint32_t halves[2] = {static_cast<uint32_t>(of_block), static_cast<uint32_t>(of_block >> 32)};
      if (halves[0] != 0) atomicOr(&sites[0][slot], halves[0]);
      if (halves[1] != 0) atomicOr(&sites[1][slot], halves[1]);
      return true;
    }
    return false;
  }
};

template <int D>
__global__ void __launch_bounds__(kListThreads, 4)
    list_kernel(CoarseSitesArgs a, CoarseAxes<D> axes, Scratch s, int extent_blocks, int tree_blocks) {
  __shared__ BlockList list;
  __shared__ BlockCodes<D> codes;
  static_assert(BlockCodes<D>::kEntries <= kListThreads);
  __shared__ int32_t first_entry;
  const auto site_at = [&](int64_t row) { return Site<D>(a.coords, min(row, int64_t{a.rows} - 1)); };
  Site<D> site = site_at(global_thread());  // in flight together with the loads of the count and the extent
  const int32_t rows = real_rows(a.count, a.rows);
  uint32_t highest[1 + D];
  for (int i = 0; i < 1 + D; ++i) {
    highest[i] = static_cast<int>(threadIdx.x) < extent_blocks ? s.highest[i * kExtentBlocks + threadIdx.x] : 0;
  }
  if (blockIdx.x > 0 && int64_t{blockIdx.x} * kListThreads >= rows) return;
  codes.fill(axes, highest);
  __syncthreads();
  const TreeShape shape(codes.bits());
  if (global_thread() == 0) *s.bits = codes.bits();
  const uint32_t each = share_size(kTopNodes, kWarp, tree_blocks);
  int32_t outside = 0;
  for (int64_t begin = int64_t{blockIdx.x} * kListThreads; begin < rows; begin += all_threads()) {
    bool more = begin + threadIdx.x < rows && has_key<D>(site.batch, site.coord);
    int32_t step = 0;      // the site's next block or window
    bool goes_on = false;  // whether this is a further round because the list was full
    do {
      list.clear();
      __syncthreads();
      if (more && axes.are_simple) {
        const Reached<D> reached(axes, site);
        if (!goes_on) outside += reached.outside;
#pragma unroll 1
        while (more) {
          uint64_t block;
          const uint64_t sites = reached.in_block(step, &block);
          if (sites != 0 && !list.add(block, sites)) break;
          step = (step - reached.seconds) & reached.seconds;  // next subset of `seconds`; the empty set after the last
          more = step != 0;
        }
      } else {
#pragma unroll 1
        while (more) {
          uint64_t block;
          const uint64_t sites = reached_by(a, axes, site, step, &block, &outside);
          if (sites != 0 && !list.add(block, sites)) break;
          more = ++step < axes.windows;
        }
      }
      goes_on = __syncthreads_count(more) > 0;
      // The last thread does this, since its warp seldom has children to mark; the marking takes as long.
      if (threadIdx.x == kListThreads - 1) first_entry = atomicAdd(s.number, list.number);
      for (int32_t next = 0; next < list.number; next += kListThreads) {
        const int32_t i = next + threadIdx.x;
        const bool exists = i < list.number;
        uint64_t block = 0, sites = 0, code = 0;
        if (exists) {
          const int32_t slot = list.slot_of[i];
          block = list.block[slot];
          sites = static_cast<uint64_t>(list.sites[1][slot]) << 32 | list.sites[0][slot];
          code = codes.code(block);
        }
        mark_children<kListThreads>(s.tree, 0, each, exists, shape.top_node(code), shape.digit(code, 0));
        if (exists) {
          s.entries[first_entry + i] = {block, sites};
          s.codes[first_entry + i] = code;
        }
      }
      __syncthreads();  // the list is free
    } while (goes_on);
    site = site_at(begin + all_threads() + threadIdx.x);
  }
  if (outside != 0) atomicAdd(a.outside, outside);
}

// Writes the tree's leaves as sites, and if a.index is set, as an index of their blocks.
template <int D>
struct Output {
  const CoarseSitesArgs& a;
  const BlockIndex index;

  __device__ Output(const CoarseSitesArgs& a, int32_t entries)
      : a(a),
        index(a.index, a.capacity, BlockIndex::slots_for(min(entries, a.capacity))) {
    if (a.index != nullptr) index.clear();
  }

  __device__ void hold(uint64_t block, int32_t first_row, uint64_t sites) const {
    if (a.index != nullptr && first_row < a.capacity) index.enter(block, first_row, sites);
  }

  __device__ void begin(int32_t found) const { end_sites<D>(a, found, a.capacity); }

  __device__ void write(int32_t row, uint64_t block, int bit) const {
    if (row < a.capacity) block_site<D>(block, bit).write(a.sites, row);
  }
};

template <int D>
__global__ void __launch_bounds__(kGridThreads, 1) tree_kernel(CoarseSitesArgs a, Scratch s) {
  const Grid grid = cooperative_groups::this_grid();
  const int32_t entries = *s.number;
  const Output<D> output(a, entries);
  const Leaves leaves = grow_tree(
      grid, s.tree, entries, TreeShape(*s.bits),
      [&](int32_t i, bool is_leaf) {
        const Entry entry = is_leaf ? s.entries[i] : Entry{};
        return Listed{s.codes[i], entry.block, entry.sites};
      });
  write_tree(grid, s.tree, leaves, output);
}

template <int D>
cudaError_t coarse_sites_in(const CoarseSitesArgs& a, cudaStream_t stream) {
  Workspace workspace(a.workspace);
  const CoarseAxes<D> axes(a);
  const int64_t candidates = int64_t{a.rows} * axes.windows;
  Scratch s;
  s.entries = workspace.take<Entry>(candidates);
  s.codes = workspace.take<uint64_t>(candidates);
  s.tree = take_tree(workspace, candidates);
  s.highest = workspace.take<uint32_t>((1 + D) * kExtentBlocks);
  s.number = workspace.take<int32_t>(1);
  s.bits = workspace.take<int32_t>(1);
  const int64_t blocks = div_up(a.rows, kGridThreads);
  constexpr int64_t least = 128;  // even with few sites, the top level must be cleared and numbered
  const int extent_blocks = static_cast<int>(std::min<int64_t>(std::max(blocks, least), kExtentBlocks));
  int tree_blocks = 0;
  JAXSPARSE_TRY(grid_size(tree_kernel<D>, std::max(blocks, least), &tree_blocks));
  JAXSPARSE_TRY(launch(extent_kernel<D>, extent_blocks, {kGridThreads}, stream, a, s));
  JAXSPARSE_TRY(launch(list_kernel<D>, striding_blocks(a.rows, kListThreads), {kListThreads}, stream, a, axes, s,
                       extent_blocks, tree_blocks));
  return launch_grid(tree_kernel<D>, tree_blocks, stream, a, s);
}

}  // namespace

cudaError_t coarse_sites(const CoarseSitesArgs& a, cudaStream_t stream) {
  if (a.sorted && coarse_shift(a.geometry) > 0) return shifted_sites(a, stream);
  return for_dims(a.geometry.dims, [&](auto dims) { return coarse_sites_in<decltype(dims)::value>(a, stream); });
}

}  // namespace jaxsparse::cuda
