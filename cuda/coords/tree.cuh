// Puts sites in order inside a cooperative kernel, as many as a device value says, met in any order and any number of times.
//
// A node of the tree is a mask of 64 bits: which of its children there are, and in a leaf which sites. A level has a digit
// of 6 bits of the sites' codes (see KeySpan), the leaves the last. The nodes of the top level are addressed by the bits
// above; those of the others have the numbers 0, 1 .. in the order of their codes. Level by level:
//
//     mark    each entry sets its bits in its node; a block of threads first gathers in shared memory what goes to one node
//     number  a sum over the shares of nodes before and a scan over each say where the children of each node begin
//
// 33 bits, those of a scan's coarse sites, are 3 levels. All of it is bound by latency: a barrier of the grid is 0.75 us, a
// sum over the blocks as much, and each phase between them 2 to 3 us of dependent accesses to L2.
//
// Tried and left, on an H100, the entries of coarse_sites.cu's scan:
//     each warp marks in global memory: 9 and 22 us for the two inner levels (now 3 and 4), atomics wait for one address
//     who sets a leaf's bits adds to its share's count: 12 us for the leaves (now 5, and 2 for a phase that counts)
//     each block writes its own share of leaves: 7 us (now 3), shares differ in sites
//     18 bits for the top level: as fast for 33, 6 us more where 24 then have no other
#pragma once

#include "cuda/common/grid.cuh"
#include "cuda/coords/tree.h"

namespace jaxsparse::cuda {

struct Level {
  uint64_t* children;  // of each node, those that exist
  int32_t* first;      // the number of the first of them
};

struct Tree {
  Level top;          // [kTopNodes]
  Level odd, even;    // [entries], the levels below in turn
  int32_t* node_of;   // [entries], on the level at hand
  int32_t* entry_of;  // [kTopNodes + entries], of each leaf one that has it
  int32_t* nodes_of;  // [kMostLevels, kMostBlocks], children in a block's share of nodes

  __device__ Level level(int depth) const { return depth == 0 ? top : depth % 2 == 1 ? odd : even; }
};

inline Tree take_tree(Workspace& workspace, int64_t entries) {
  const auto take_level = [&](int64_t nodes) {
    Level level;
    level.children = workspace.take<uint64_t>(nodes);
    level.first = workspace.take<int32_t>(nodes);
    return level;
  };
  Tree tree;
  tree.top = take_level(kTopNodes);
  tree.odd = take_level(entries);
  tree.even = take_level(entries);
  tree.node_of = workspace.take<int32_t>(entries);
  tree.entry_of = workspace.take<int32_t>(kTopNodes + entries);
  tree.nodes_of = workspace.take<int32_t>(kMostLevels * kMostBlocks);
  return tree;
}

// A barrier of the grid must follow before grow_tree.
__device__ inline void clear_tree(const Tree& tree) {
  for (int64_t node = global_thread(); node < kTopNodes; node += all_threads()) tree.top.children[node] = 0;
  if (threadIdx.x < kMostLevels) tree.nodes_of[threadIdx.x * kMostBlocks + blockIdx.x] = 0;
}

// What the threads of a block mark in inner nodes, gathered: a slot for each node, unless another has it.
struct Gathered {
  static constexpr int kSlots = kGridThreads;
  int32_t node[kSlots];  // -1 in an empty one
  uint32_t bits[2][kSlots];
};

__device__ inline void clear(Gathered& gathered) {
  gathered.node[threadIdx.x] = -1;
  gathered.bits[0][threadIdx.x] = gathered.bits[1][threadIdx.x] = 0;
}

// Whether the bits found a place.
__device__ inline bool gather(Gathered& gathered, int32_t node, uint64_t bits) {
  const int slot = node % Gathered::kSlots;
  const int32_t holder = atomicCAS(&gathered.node[slot], -1, node);
  if (holder != -1 && holder != node) return false;
  const uint32_t halves[2] = {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
  if (halves[0] != 0) atomicOr(&gathered.bits[0][slot], halves[0]);
  if (halves[1] != 0) atomicOr(&gathered.bits[1][slot], halves[1]);
  return true;
}

struct Leaves {
  Level level;  // of a leaf: which sites, and the row of the first of them
  int32_t number, sites;
};

// Builds the tree of the entries that the blocks have, `entries` in this one: code_of(i) has `bits` bits, the last six of
// which say nothing; sites_of(i) is the mask of the sites that entry i has in its leaf. Ends with a barrier of the grid.
template <typename CodeOf, typename SitesOf>
__device__ Leaves grow_tree(Grid grid, const Tree& tree, Range entries, int bits, CodeOf code_of, SitesOf sites_of) {
  __shared__ Gathered gathered;
  int levels = bits < 2 * kBlockBits ? 1 : 2;
  while (bits - levels * kBlockBits > kTopBits) ++levels;
  int32_t nodes = 1 << (bits - levels * kBlockBits);
  for (int depth = 0;; ++depth) {
    const bool is_leaf = depth == levels - 1;
    const Level level = tree.level(depth);
    const uint32_t each = share_size(nodes, kWarp, gridDim.x);
    int32_t* const children_of = tree.nodes_of + depth * kMostBlocks;
    const auto set = [&](int32_t node, uint64_t children) {
      return atomicOr(reinterpret_cast<unsigned long long*>(level.children + node),
                      static_cast<unsigned long long>(children));
    };
    const auto set_inner = [&](int32_t node, uint64_t children) {
      const int added = __popcll(children & ~set(node, children));
      if (added != 0) atomicAdd(children_of + node / each, added);
    };
    for (int32_t begin = entries.begin; begin < entries.end; begin += kGridThreads) {
      const int32_t i = begin + threadIdx.x;
      const bool exists = i < entries.end;
      const uint64_t code = exists ? code_of(i) : 0;
      const auto digit = [&](int of) { return code >> (levels - 1 - of) * kBlockBits & kInBlock; };
      int32_t node = static_cast<int32_t>(code >> levels * kBlockBits);
      if (exists && depth > 0) {
        const Level above = tree.level(depth - 1);
        const int32_t parent = tree.node_of[i];
        node = above.first[parent] + __popcll(above.children[parent] & ((uint64_t{1} << digit(depth - 1)) - 1));
      }
      if (is_leaf) {
        if (exists && set(node, sites_of(i)) == 0) tree.entry_of[node] = i;
        continue;
      }
      if (exists) tree.node_of[i] = node;
      clear(gathered);
      __syncthreads();
      const int32_t node_below = __shfl_up_sync(kAllLanes, node, 1);  // neighbours often have the same
      const bool leads = threadIdx.x % kWarp == 0 || node_below != node;
      const uint64_t children = or_of_run(exists ? uint64_t{1} << digit(depth) : 0, leads);
      if (leads && children != 0 && !gather(gathered, node, children)) set_inner(node, children);
      __syncthreads();
      const uint64_t high = gathered.bits[1][threadIdx.x], low = gathered.bits[0][threadIdx.x];
      if (gathered.node[threadIdx.x] != -1) set_inner(gathered.node[threadIdx.x], high << 32 | low);
    }
    grid.sync();

    const Range own = share(nodes, kWarp, gridDim.x);
    if (is_leaf) {
      int32_t sites = 0;
      for (int32_t leaf = own.begin + threadIdx.x; leaf < own.end; leaf += kGridThreads) {
        sites += __popcll(level.children[leaf]);
      }
      sites = block_sum(sites);
      if (threadIdx.x == 0) children_of[blockIdx.x] = sites;
      grid.sync();
    }
    const BlockSums children = sum_blocks(children_of);
    int32_t next = children.before;
    for (int32_t begin = own.begin; begin < own.end; begin += kGridThreads) {
      const int32_t node = begin + threadIdx.x;
      int32_t total;
      const int32_t before =
          block_exclusive_scan<kGridThreads>(node < own.end ? __popcll(level.children[node]) : 0, &total);
      if (node < own.end) level.first[node] = next + before;
      next += total;
    }
    if (!is_leaf) {
      uint64_t* const below = tree.level(depth + 1).children;
      for (int32_t child = children.before + threadIdx.x; child < next; child += kGridThreads) below[child] = 0;
    }
    grid.sync();
    if (is_leaf) return {level, nodes, children.all};
    nodes = children.all;
  }
}

// Writes the sites that fit to their rows; block_of(i) is the key of the block of entry i. A warp has a few leaves at a
// time, a lane two sites of each.
template <int D, typename BlockOf>
__device__ void write_leaves(const Tree& tree, const Leaves& leaves, int32_t* sites, int32_t capacity,
                             BlockOf block_of) {
  constexpr int kLeaves = 8;
  const int lane = threadIdx.x % kWarp;
  int32_t origin[1 + D], within[2][1 + D];  // of the lane's sites in a block
  write_site<D>(0, origin);
  for (int half = 0; half < 2; ++half) {
    write_site<D>(lane + half * kWarp, within[half]);
    for (int d = 1; d <= D; ++d) within[half][d] -= origin[d];
  }
  for (int64_t begin = global_thread() / kWarp * kLeaves; begin < leaves.number;
       begin += all_threads() / kWarp * kLeaves) {
    const int64_t leaf = begin + lane % kLeaves;
    const uint64_t own_mask = leaf < leaves.number ? leaves.level.children[leaf] : 0;
    const int32_t own_first = own_mask != 0 ? leaves.level.first[leaf] : 0;
    int32_t own_site[1 + D];  // the block's first
    write_site<D>(own_mask != 0 ? block_of(tree.entry_of[leaf]) : 0, own_site);
    for (int i = 0; i < kLeaves; ++i) {
      const uint64_t mask = __shfl_sync(kAllLanes, own_mask, i);
      const int32_t first = __shfl_sync(kAllLanes, own_first, i);
      int32_t block[1 + D];
      for (int d = 0; d <= D; ++d) block[d] = __shfl_sync(kAllLanes, own_site[d], i);
      for (int half = 0; half < 2; ++half) {
        const int bit = lane + half * kWarp;
        const int32_t row = first + __popcll(mask & ((uint64_t{1} << bit) - 1));
        if ((mask >> bit & 1) == 0 || row >= capacity) continue;
        int32_t* const site = sites + static_cast<int64_t>(row) * (1 + D);
        site[0] = block[0];
        for (int d = 1; d <= D; ++d) site[d] = block[d] + within[half][d];
      }
    }
  }
}

}  // namespace jaxsparse::cuda
