// Puts sites in order inside a cooperative kernel, as many as a device value says, in no order and met any number of times.
//
// A node of the tree is a mask of 64 bits: which of its children there are, and among a leaf's, which sites. A level has a
// digit of 6 bits of the sites' codes (see KeySpan), the leaf the last. The top level's nodes are addressed by the bits
// above; those of the others have the numbers 0, 1 .. in the order of their codes. Level by level:
//
//     mark    each entry sets its bits in its node; who sets one adds to what the node's share of nodes has
//     number  a sum over the shares before and a scan over each say where the children of each node begin
//
// So 33 bits, those of a scan's coarse sites, take 3 levels and 6 barriers of the grid, where a radix sort takes 4 passes of
// 3, and equal sites cost an atomic each instead of a place in every pass. All of it is bound by latency.
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
  int32_t* node_of;   // [entries], on the level at hand, in the end the leaf
  int32_t* entry_of;  // [kTopNodes + entries], of each leaf one that has it
  int32_t* nodes_of;  // [kMostLevels, kMostBlocks], children of a block's share of nodes

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

// Blocks to launch for so many rows: few of them too have the top level to clear and to number.
inline int64_t tree_blocks(int64_t rows) {
  constexpr int64_t least = 64;
  const int64_t blocks = div_up(rows, kGridThreads);
  return blocks < least ? least : blocks;
}

// A barrier of the grid must follow before grow_tree.
__device__ inline void clear_tree(const Tree& tree) {
  for (int64_t node = global_thread(); node < kTopNodes; node += all_threads()) tree.top.children[node] = 0;
  if (threadIdx.x < kMostLevels) tree.nodes_of[threadIdx.x * kMostBlocks + blockIdx.x] = 0;
}

// Calls act(value, bits) in one lane for each value that lanes of the warp hold with some bits, those of all its lanes.
template <typename Act>
__device__ void for_each_distinct(uint64_t value, uint64_t bits, Act act) {
  const int lane = threadIdx.x % kWarp;
  unsigned left = __ballot_sync(kAllLanes, bits != 0);
  while (left != 0) {
    const int first = __ffs(static_cast<int>(left)) - 1;
    const bool shares = __shfl_sync(kAllLanes, value, first) == value && bits != 0;
    const uint64_t own = shares ? bits : 0;
    const uint32_t low = __reduce_or_sync(kAllLanes, static_cast<uint32_t>(own));
    const uint32_t high = __reduce_or_sync(kAllLanes, static_cast<uint32_t>(own >> 32));
    if (lane == first) act(value, static_cast<uint64_t>(high) << 32 | low);
    left &= ~__ballot_sync(kAllLanes, shares);
  }
}

struct Leaves {
  Level level;      // of the nodes in `own`; of all after the next barrier of the grid
  Range own;        // this block's share of them
  BlockSums sites;  // those of the leaves before its share, and all
};

// Builds the tree of the entries that the blocks have, `entries` in this one: code_of(i) has `bits` bits, the last six of
// which say nothing; sites_of(i) is the mask of them that entry i has, 0 if none.
template <typename CodeOf, typename SitesOf>
__device__ Leaves grow_tree(Grid grid, const Tree& tree, Range entries, int bits, CodeOf code_of, SitesOf sites_of) {
  int levels = 1;
  while (bits - levels * kBlockBits > kTopBits) ++levels;
  int32_t nodes = 1 << (bits - levels * kBlockBits);
  for (int depth = 0;; ++depth) {
    const bool is_leaf = depth == levels - 1;
    const Level level = tree.level(depth);
    const uint32_t each = share_size(nodes, kWarp, gridDim.x);
    int32_t* const children_of = tree.nodes_of + depth * kMostBlocks;
    const auto mark = [&](int32_t node, uint64_t children) {
      const uint64_t before = atomicOr(reinterpret_cast<unsigned long long*>(level.children + node),
                                       static_cast<unsigned long long>(children));
      const int added = __popcll(children & ~before);
      if (added != 0) atomicAdd(children_of + node / each, added);
      return before;
    };
    for (int32_t begin = entries.begin; begin < entries.end; begin += kGridThreads) {
      const int32_t i = begin + threadIdx.x;
      const uint64_t sites = i < entries.end ? sites_of(i) : 0;
      const uint64_t code = sites != 0 ? code_of(i) : 0;
      const auto digit = [&](int of) { return code >> (levels - 1 - of) * kBlockBits & kInBlock; };
      int32_t node = static_cast<int32_t>(code >> levels * kBlockBits);
      if (depth > 0 && sites != 0) {
        const Level above = tree.level(depth - 1);
        const int32_t parent = tree.node_of[i];
        node = above.first[parent] + __popcll(above.children[parent] & ((uint64_t{1} << digit(depth - 1)) - 1));
      }
      if (sites != 0) tree.node_of[i] = node;
      if (!is_leaf) {
        for_each_distinct(node, sites != 0 ? uint64_t{1} << digit(depth) : 0, mark);
      } else if (sites != 0 && mark(node, sites) == 0) {
        tree.entry_of[node] = i;
      }
    }
    grid.sync();

    const BlockSums children = sum_blocks(children_of);
    const Range own = share(nodes, kWarp, gridDim.x);
    int32_t next = children.before;
    for (int32_t begin = own.begin; begin < own.end; begin += kGridThreads) {
      const int32_t node = begin + threadIdx.x;
      int32_t total;
      const int32_t before =
          block_exclusive_scan<kGridThreads>(node < own.end ? __popcll(level.children[node]) : 0, &total);
      if (node < own.end) level.first[node] = next + before;
      next += total;
    }
    if (is_leaf) return {level, own, children};
    uint64_t* const below = tree.level(depth + 1).children;
    for (int32_t child = children.before + threadIdx.x; child < next; child += kGridThreads) below[child] = 0;
    nodes = children.all;
    grid.sync();
  }
}

// Position of the n-th set bit, n = 0 for the lowest.
__device__ inline int nth_bit(uint64_t mask, int n) {
  int position = 0;
  for (int width = 32; width > 0; width /= 2) {
    const int below = __popcll(mask & ((uint64_t{1} << width) - 1));
    if (n >= below) {
      n -= below;
      mask >>= width;
      position += width;
    }
  }
  return position;
}

// Writes the sites of this block's leaves, those that fit, to their rows; block_of(i) is the block of entry i.
template <int D, typename BlockOf>
__device__ void write_leaves(const Tree& tree, const Leaves& leaves, int32_t* sites, int32_t capacity,
                             BlockOf block_of) {
  __shared__ int32_t first[kGridThreads];  // site of each of the tile's leaves, counted from the tile's first
  __shared__ uint64_t masks[kGridThreads];
  __shared__ Key blocks[kGridThreads];
  int32_t next = leaves.sites.before;
  for (int32_t begin = leaves.own.begin; begin < leaves.own.end; begin += kGridThreads) {
    const int32_t leaf = begin + threadIdx.x, number = min(kGridThreads, leaves.own.end - begin);
    const uint64_t mask = leaf < leaves.own.end ? leaves.level.children[leaf] : 0;
    int32_t total;
    first[threadIdx.x] = block_exclusive_scan<kGridThreads>(__popcll(mask), &total);
    masks[threadIdx.x] = mask;
    if (mask != 0) blocks[threadIdx.x] = block_of(tree.entry_of[leaf]);
    __syncthreads();
    for (int32_t j = threadIdx.x; j < min(total, capacity - next); j += kGridThreads) {
      int low = 0, high = number - 1;  // the last leaf that begins at j or before has site j
      while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (first[middle] <= j) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      const Key key = blocks[low] | nth_bit(masks[low], j - first[low]);
      write_site<D>(key, sites + static_cast<int64_t>(next + j) * (1 + D));
    }
    next += total;
    __syncthreads();
  }
}

}  // namespace jaxsparse::cuda
