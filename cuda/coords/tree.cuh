// Sorts a list of blocks of 64 sites by code and merges equal ones, by a tree. Only the device knows the list's length.
//
// A node is a 64-bit mask: of its children, or in a leaf, which is a block, of its sites. Each level has 6 bits of the
// blocks' codes, from the highest. Nodes of the top level are addressed by the bits above; nodes of other levels are
// numbered in the order of their codes. The kernel that lists the entries marks their children in the top level. Then a
// cooperative kernel does, level by level:
//
//     number  a sum over the earlier shares of nodes, and a scan over the own share, number the children of each node
//     mark    each entry sets its bits in its node of the next level. Above the leaves, a thread block first combines in
//             shared memory what goes to the same node
//
// A scan's coarse blocks have 22 bits, which the top level covers. Latency bounds everything: a barrier of the grid is 0.75
// us, a sum over the blocks as much, and each phase between them 2 to 3 us of dependent accesses to L2.
//
// Tried, not better, on an H100, with more entries per node than now:
//     each warp marks inner nodes in global memory: 9 and 22 us for two levels, atomics wait for one address
//     setting a leaf's bits also adds to its share's count: 12 us, where a counting phase takes 2; on an H200 the whole
//         kernel 815 us instead of 352 for 6.2 million sites
//     that, and the top numbered without a barrier (each block sums counts of 16 nodes, each entry the rest): 53 us for
//         four trees of a network on an H200, and 53 without both
//     each block writes its own share of leaves: 7 us (now 3), since shares differ in sites
//     18 bits for the top level: as fast if that saves no level, 6 us more if the tree is small
#pragma once

#include "cuda/common/grid.cuh"
#include "cuda/coords/tree.h"

namespace jaxsparse::cuda {

struct Level {
  uint64_t* children;  // per node, the mask of its children
  int32_t* first;      // per node, the number of its first child
};

struct Tree {
  Level top;            // [kTopNodes]
  Level odd, even;      // [entries], used in turn by the levels below
  int32_t* node_of;     // [entries], each entry's node on the current level
  uint64_t* block_of;   // [entries], the block key of each leaf
  int32_t* nodes_of;    // [kMostLevels, kMostBlocks], number of children in a block's share of nodes
  int32_t* sites_of;    // [kMostBlocks], number of sites per group of leaves

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
  tree.block_of = workspace.take<uint64_t>(entries);
  tree.nodes_of = workspace.take<int32_t>(kMostLevels * kMostBlocks);
  tree.sites_of = workspace.take<int32_t>(kMostBlocks);
  return tree;
}

// Must run in an earlier kernel than the marking of the top level.
__device__ inline void clear_tree(const Tree& tree) {
  for (int64_t node = global_thread(); node < kTopNodes; node += all_threads()) tree.top.children[node] = 0;
  for (int64_t i = global_thread(); i < kMostLevels * kMostBlocks; i += all_threads()) tree.nodes_of[i] = 0;
}

// The shape of a tree for codes of `bits` bits.
struct TreeShape {
  int levels;  // above the leaves

  __device__ explicit TreeShape(int bits) : levels(max((bits - kTopBits + kTreeDigitBits - 1) / kTreeDigitBits, 1)) {}
  __device__ int32_t top_node(uint64_t code) const { return static_cast<int32_t>(code >> levels * kTreeDigitBits); }
  __device__ int digit(uint64_t code, int depth) const {
    return static_cast<int>(code >> (levels - 1 - depth) * kTreeDigitBits) & ((1 << kTreeDigitBits) - 1);
  }
};

// The marks that a thread block sets in inner nodes, combined in shared memory. A node's slot may be taken by another node.
template <int kSlots>
struct Gathered {
  int32_t node[kSlots];  // -1 in an empty slot
  uint32_t bits[2][kSlots];
};

// Marks children of a node of a level, and adds the number of new ones to the count of its share, which has `each` nodes.
__device__ inline void mark_child(const Tree& tree, int depth, uint32_t each, int32_t node, uint64_t children) {
  const uint64_t before = atomicOr(reinterpret_cast<unsigned long long*>(tree.level(depth).children + node),
                                   static_cast<unsigned long long>(children));
  const int added = __popcll(children & ~before);
  if (added != 0) atomicAdd(tree.nodes_of + depth * kMostBlocks + node / each, added);
}

// The same for one child per thread with `exists`. All threads of the block call it.
template <int kThreads>
__device__ void mark_children(const Tree& tree, int depth, uint32_t each, bool exists, int32_t node, int digit) {
  __shared__ Gathered<kThreads> gathered;
  const int own = threadIdx.x, slot = node % kThreads;
  gathered.node[own] = -1;
  gathered.bits[0][own] = gathered.bits[1][own] = 0;
  __syncthreads();
  if (exists) {
    const int32_t holder = atomicCAS(&gathered.node[slot], -1, node);
    if (holder == -1 || holder == node) {
      atomicOr(&gathered.bits[digit / 32][slot], 1u << digit % 32);
    } else {
      mark_child(tree, depth, each, node, uint64_t{1} << digit);
    }
  }
  __syncthreads();
  const uint64_t high = gathered.bits[1][own], low = gathered.bits[0][own];
  if (gathered.node[own] != -1) mark_child(tree, depth, each, gathered.node[own], high << 32 | low);
  __syncthreads();
}

// An entry. On inner levels only its code is needed.
struct Listed {
  uint64_t code, block, sites;
};

struct Leaves {
  const uint64_t* sites;  // per leaf, the mask of its sites
  int32_t number;
};

// Numbers and marks all levels below the top, whose marks must be set. entry_of(i, is_leaf) returns an entry, all of it only
// if is_leaf. All blocks call it; it ends with a barrier of the grid.
template <typename EntryOf>
__device__ Leaves grow_tree(Grid grid, const Tree& tree, int32_t entries, const TreeShape& shape, EntryOf entry_of) {
  const auto read_entry = [&](int64_t i, bool is_leaf) {
    return i < entries ? entry_of(static_cast<int32_t>(i), is_leaf) : Listed{};
  };
  int32_t nodes = kTopNodes;  // all of them, since loading the shape is still in flight
  for (int depth = 0;; ++depth) {
    const Level level = tree.level(depth), below = tree.level(depth + 1);
    const Range own = share(nodes, kWarp, gridDim.x);
    const auto read_children = [&](int32_t node) { return node < own.end ? level.children[node] : 0; };
    uint64_t held = read_children(own.begin + threadIdx.x);  // in flight during the sums
    const BlockSums children = sum_blocks(tree.nodes_of + depth * kMostBlocks);
    int32_t next = children.before;
    for (int32_t begin = own.begin; begin < own.end; begin += kGridThreads) {
      const int32_t node = begin + threadIdx.x;
      int32_t total;
      const int32_t before = block_exclusive_scan<kGridThreads>(__popcll(held), &total);
      if (node < own.end) level.first[node] = next + before;
      next += total;
      held = read_children(node + kGridThreads);
    }
    for (int32_t child = children.before + threadIdx.x; child < next; child += kGridThreads) below.children[child] = 0;
    nodes = children.all;
    const bool to_leaves = depth == shape.levels - 1;
    Listed entry;
    sync_while(grid, [&] {
      entry = read_entry(global_thread(), to_leaves);
    });

    const uint32_t each = share_size(nodes, kWarp, gridDim.x);
    for (int64_t begin = int64_t{blockIdx.x} * kGridThreads; begin < entries; begin += all_threads()) {
      const int32_t i = static_cast<int32_t>(begin) + threadIdx.x;
      const bool exists = i < entries;
      int32_t node = 0;
      if (exists) {
        const int32_t parent = depth == 0 ? shape.top_node(entry.code) : tree.node_of[i];
        const uint64_t before = (uint64_t{1} << shape.digit(entry.code, depth)) - 1;
        node = level.first[parent] + __popcll(level.children[parent] & before);
        if (to_leaves) {
          atomicOr(reinterpret_cast<unsigned long long*>(below.children + node),
                   static_cast<unsigned long long>(entry.sites));
          tree.block_of[node] = entry.block;
        } else {
          tree.node_of[i] = node;
        }
      }
      if (!to_leaves) {
        mark_children<kGridThreads>(tree, depth + 1, each, exists, node, shape.digit(entry.code, depth + 1));
      }
      entry = read_entry(i + all_threads(), to_leaves);
    }
    grid.sync();
    if (to_leaves) return {below.children, nodes};
  }
}

// The position of a mask's n-th set bit; n counts from 0.
__device__ inline int nth_bit(uint64_t mask, int n) {
  uint32_t word = static_cast<uint32_t>(mask);
  int bit = 0;
  const auto skip = [&](int bits, int set, uint32_t rest) {
    if (n < set) return;
    n -= set;
    word = rest;
    bit += bits;
  };
  skip(32, __popc(word), static_cast<uint32_t>(mask >> 32));
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) skip(bits, __popc(word & ((1u << bits) - 1)), word >> bits);
  return bit;
}

// Passes leaves and sites to the output: begin(number of sites); hold(block, row of its first site, its sites) for each leaf;
// and write(row, block, bit) for each site, `bit` its number in the block. All blocks call it. A warp handles a few leaves at
// a time, with one lane per site.
template <typename Output>
__device__ void write_tree(Grid grid, const Tree& tree, const Leaves& leaves, const Output& output) {
  constexpr int kLeaves = 8;
  // Sites are counted in groups of leaves. Up to this many leaves each block counts all groups; beyond, it counts some, and
  // a barrier follows. On an H200 5,927 leaves took 1.5 us more if each block counted all.
  constexpr int32_t kCountedByAll = 4096;
  __shared__ int32_t before_group[kMostBlocks];
  static_assert(kMostBlocks == kGridThreads, "a group a thread");
  const int lane = threadIdx.x % kWarp;
  const int32_t each = static_cast<int32_t>(share_size(leaves.number, kLeaves, kMostBlocks));
  int64_t first = global_thread() / kWarp * kLeaves;
  uint64_t own_sites, own_block;
  const auto read_leaves = [&] {
    const int64_t own = first + lane % kLeaves;
    own_sites = own < leaves.number ? leaves.sites[own] : 0;
    own_block = own < leaves.number ? tree.block_of[own] : 0;
  };
  int32_t before = 0;  // sites of the group before leaf `first`
  const auto count_before = [&] {
    if (first >= leaves.number) return;
    before = 0;
    for (int64_t leaf = static_cast<int32_t>(first) / each * int64_t{each} + lane; leaf < first; leaf += kWarp) {
      before += __popcll(leaves.sites[leaf]);
    }
    before = warp_sum(before);
  };
  read_leaves();
  int32_t of_group = 0;
  if (leaves.number <= kCountedByAll) {
    const int32_t begin = threadIdx.x * each, end = min(begin + each, leaves.number);
#pragma unroll 8
    for (int32_t leaf = begin; leaf < end; ++leaf) of_group += __popcll(leaves.sites[leaf]);
    count_before();
  } else {
    for (int64_t group = global_thread() / kWarp; group < kMostBlocks; group += all_threads() / kWarp) {
      const int64_t begin = group * each, end = min(begin + each, int64_t{leaves.number});
      int32_t sites = 0;
      for (int64_t leaf = begin + lane; leaf < end; leaf += kWarp) sites += __popcll(leaves.sites[leaf]);
      sites = warp_sum(sites);
      if (lane == 0) tree.sites_of[group] = sites;
    }
    sync_while(grid, count_before);
    of_group = tree.sites_of[threadIdx.x];
  }

  int32_t all;
  before_group[threadIdx.x] = block_exclusive_scan<kGridThreads>(of_group, &all);
  output.begin(all);
  __syncthreads();
  while (first < leaves.number) {
    const int32_t row = before_group[static_cast<int32_t>(first) / each] + before;
    const int32_t own = lane < kLeaves ? __popcll(own_sites) : 0, up_to = warp_inclusive_scan(own), begin = up_to - own;
    if (own > 0) output.hold(own_block, row + begin, own_sites);
    const int32_t sites = __shfl_sync(kAllLanes, up_to, kWarp - 1);
    int32_t last = -1;  // the last leaf that begins before `done`
    for (int32_t done = 0; done < sites; done += kWarp) {
      const bool begins = own > 0 && begin >= done && begin < done + kWarp;
      const unsigned all_that_begin = __reduce_or_sync(kAllLanes, begins ? 1u << (begin - done) : 0u);
      const int32_t leaf = last + __popc(all_that_begin & (kAllLanes >> (kWarp - 1 - lane)));
      last += __popc(all_that_begin);
      const uint64_t of_leaf = __shfl_sync(kAllLanes, own_sites, leaf), block = __shfl_sync(kAllLanes, own_block, leaf);
      const int32_t nth = done + lane - __shfl_sync(kAllLanes, begin, leaf);
      if (done + lane < sites) output.write(row + done + lane, block, nth_bit(of_leaf, nth));
    }
    first += all_threads() / kWarp * kLeaves;
    read_leaves();
    count_before();
  }
}

}  // namespace jaxsparse::cuda
