// One cooperative kernel:
//
//     keys    a key a point, and which of their bits differ
//     tree    of the keys' codes, which puts the sites in order, see tree.cuh; writes them
//     rows    each point finds its site in the tree
//     sort    points by row, stably: those of a site come in increasing order
//     write   order and where each row begins; then padding
//
// A sort by row has half the passes of one by key: 17 bits for 130,000 voxels, where a scan's keys differ in 36 to 45.
// All of it is bound by latency up to a million points, by 24 bytes a point and pass beyond.
#include "cuda/coords/unique_sites.h"

#include "cuda/coords/tree.cuh"
#include "cuda/sort/radix_sort.cuh"

namespace jaxsparse::cuda {
namespace {

struct Scratch {
  SortBuffers sort;
  Tree tree;            // an entry a point
  uint64_t* bits_of;    // [blocks], of the keys in a block's share
  int32_t* no_keys_of;  // [blocks], points without a key
};

template <int D>
__global__ void __launch_bounds__(kGridThreads, 1) unique_sites_kernel(UniqueSitesArgs a, Scratch s) {
  __shared__ SortShared shared;
  const Grid grid = cooperative_groups::this_grid();
  const int32_t n = a.count[0] < a.points ? (a.count[0] > 0 ? a.count[0] : 0) : a.points;
  const Range own = share(n, kWarp, gridDim.x);

  clear_tree(s.tree);
  uint64_t bits = 0;
  int32_t no_keys = 0;
  for (int32_t p = own.begin + threadIdx.x; p < own.end; p += kGridThreads) {
    const Key key = key_of_row<D>(a.coords + int64_t{p} * (1 + D));
    s.sort.keys[p] = key;
    if (key != kNoKey) bits |= KeySpan<D>::bits_of(key);
    no_keys += key == kNoKey;
  }
  bits = block_or(bits);
  no_keys = block_sum(no_keys);
  if (threadIdx.x == 0) {
    s.bits_of[blockIdx.x] = bits;
    s.no_keys_of[blockIdx.x] = no_keys;
  }
  grid.sync();

  const KeySpan<D> span(or_blocks(s.bits_of), false);
  const auto site_in_block = [&](Key key) { return key == kNoKey ? 0 : uint64_t{1} << (key & kInBlock); };
  const Leaves leaves = grow_tree(
      grid, s.tree, own, span.bits(), [&](int32_t p) { return span.code(s.sort.keys[p]); },
      [&](int32_t p) { return site_in_block(s.sort.keys[p]); });
  const int32_t found = leaves.sites.all, with_key = n - sum_blocks(s.no_keys_of).all;
  write_leaves<D>(s.tree, leaves, a.sites, a.capacity, [&](int32_t p) { return s.sort.keys[p] & ~kInBlock; });
  grid.sync();

  for (int32_t p = own.begin + threadIdx.x; p < own.end; p += kGridThreads) {
    const uint64_t site = site_in_block(s.sort.keys[p]);
    int32_t row = found;  // after all others
    if (site != 0) {
      const int32_t leaf = s.tree.node_of[p];
      row = leaves.level.first[leaf] + __popcll(leaves.level.children[leaf] & (site - 1));
    }
    s.sort.keys[p] = static_cast<uint32_t>(row);
    a.row_of[p] = row < found && row < a.capacity ? row : -1;
  }
  grid.sync();

  int row_bits = 0;
  while (found >> row_bits != 0) ++row_bits;
  radix_sort(grid, s.sort, n, row_bits, shared, [](uint64_t row) { return row; });
  for (int64_t i = global_thread(); i < n; i += all_threads()) {
    const int32_t row = static_cast<int32_t>(s.sort.keys[i]);
    const bool is_first = i == 0 || static_cast<int32_t>(s.sort.keys[i - 1]) != row;
    if (is_first && row < found && row <= a.capacity) a.offsets[row] = static_cast<int32_t>(i);
    a.order[i] = row < found && row < a.capacity ? static_cast<int32_t>(s.sort.values[i]) : -1;
  }
  for (int64_t i = n + global_thread(); i < a.points; i += all_threads()) a.row_of[i] = a.order[i] = -1;
  for (int64_t row = found + global_thread(); row <= a.capacity; row += all_threads()) {
    a.offsets[row] = with_key;
    if (row < a.capacity) write_padding<D>(a.sites + row * (1 + D));
  }
  if (global_thread() == 0) *a.found = found;
}

template <int D>
cudaError_t unique_sites_in(const UniqueSitesArgs& a, cudaStream_t stream) {
  Workspace workspace(a.workspace);
  Scratch s;
  s.sort = take_sort_buffers(workspace, a.points);
  s.tree = take_tree(workspace, a.points);
  s.bits_of = workspace.take<uint64_t>(kMostBlocks);
  s.no_keys_of = workspace.take<int32_t>(kMostBlocks);
  return launch_grid(unique_sites_kernel<D>, tree_blocks(a.points), stream, a, s);
}

}  // namespace

cudaError_t unique_sites(const UniqueSitesArgs& a, cudaStream_t stream) {
  return for_dims(a.dims, [&](auto dims) { return unique_sites_in<decltype(dims)::value>(a, stream); });
}

}  // namespace jaxsparse::cuda
