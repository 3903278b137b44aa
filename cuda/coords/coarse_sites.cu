// shifted_sites, where the coarse sites are the sorted fine ones without their last bits; one cooperative kernel:
//
//     count   fine sites in each block's share whose coarse site differs from that of the one before
//     write   those
//
// coarse_sites, for every other geometry and order. It works on blocks of 64 coarse sites, a mask of 64 bits each, because
// there are few of them: neighbouring fine sites reach the same blocks over and over. One cooperative kernel:
//
//     list    each block of threads lists the masks that its rows reach, those of neighbouring lanes together
//     tree    puts the listed sites in order, see tree.cuh
//     write   its leaves
//
// On an H100 with 111,028 sites of a scan, kernel 3^3, stride 2: 41 us; 11 for the list, 24 for the tree, 3 to write.
// Tried and left:
//     a sort of the list, made in a hash map in shared memory, by block: 106 us with the launch (now 46)
//     the list merged over all lanes of a warp, block by block, not only neighbours: 28 us, up to 32 rounds of collectives
//     two blocks of threads a processor, 64 registers: spills, 2 us more
#include "cuda/coords/coarse_sites.h"

#include "cuda/coords/tree.cuh"

namespace jaxsparse::cuda {
namespace {

template <int D>
__device__ void write_end(const CoarseSitesArgs& a, int32_t found, int32_t outside) {
  for (int64_t row = found + global_thread(); row < a.capacity; row += all_threads()) {
    write_padding<D>(a.sites + row * (1 + D));
  }
  if (global_thread() == 0) {
    *a.kept = min(found, a.capacity);
    *a.found = found;
    *a.outside = outside;
  }
}

// --- shifted ---

// Sites have keys, and so have these, which are nearer to 0: none is made.
template <int D>
__global__ void __launch_bounds__(kGridThreads, 2) shifted_sites_kernel(CoarseSitesArgs a, int shift, int32_t* heads_of) {
  const Grid grid = cooperative_groups::this_grid();
  const int32_t n = real_rows(a.count, a.rows);
  const auto coarse_site = [&](int64_t row) {
    Site<D> site(a.coords, row);
    for (int d = 0; d < D; ++d) site.coord[d] >>= shift;
    return site;
  };
  const Range own = share(n, kGridThreads, gridDim.x);
  const auto is_head = [&](int32_t i, const Site<D>& site) {  // whether a row begins a coarse site
    const Site<D> below = coarse_site(max(i - 1, 0));
    bool differs = i == 0 || below.batch != site.batch, is_within = true;
    for (int d = 0; d < D; ++d) {
      differs = differs || below.coord[d] != site.coord[d];
      is_within = is_within && (!a.bounded || (site.coord[d] >= 0 && site.coord[d] < a.bounds[d]));
    }
    return differs && is_within;
  };
  int32_t heads = 0;
  for (int32_t i = own.begin + threadIdx.x; i < own.end; i += kGridThreads) heads += is_head(i, coarse_site(i));
  heads = block_sum(heads);
  if (threadIdx.x == 0) heads_of[blockIdx.x] = heads;
  grid.sync();

  const BlockSums rows = sum_blocks(heads_of);
  int32_t next = rows.before;
  for (int32_t begin = own.begin; begin < own.end; begin += kGridThreads) {
    const int32_t i = begin + threadIdx.x;
    const Site<D> site = coarse_site(min(i, own.end - 1));
    const bool head = i < own.end && is_head(i, site);
    int32_t total;
    const int32_t row = next + block_exclusive_scan<kGridThreads>(static_cast<int32_t>(head), &total);
    next += total;
    if (head && row < a.capacity) site.write(a.sites, row);
  }
  write_end<D>(a, rows.all, 0);
}

// --- general ---

// Sites of a block that one row reaches, or a few rows of one warp.
struct alignas(16) Entry {
  Key block;  // that of its first site
  uint64_t mask;
};

struct Scratch {
  Entry* entries;       // [candidates], those of a block of threads from its first row's candidates on
  Tree tree;            // of the entries
  uint64_t* bits_of;    // [blocks], of a block's entries, see KeySpan
  int32_t* outside_of;  // [blocks]
};

template <int D>
struct CoarseAxes {
  CoarseAxis axis[D];
  int32_t windows;   // that can hold one fine site
  bool at_most_two;  // on each axis, as with kernel 3, stride 2

  explicit CoarseAxes(const Geometry& g) : windows(static_cast<int32_t>(windows_per_site(g))), at_most_two(true) {
    for (int d = 0; d < D; ++d) {
      axis[d] = CoarseAxis(g, d);
      at_most_two = at_most_two && axis[d].most() <= 2;
    }
  }
};

// Calls meet(block, mask) for the blocks of coarse sites that the lanes' fine sites reach. Returns how many coarse sites
// exist but have no key. All lanes call it.
template <int D, typename Meet>
__device__ int32_t coarse_blocks(const CoarseSitesArgs& a, const CoarseAxes<D>& axes, const Site<D>& site, bool is_real,
                                 Meet meet) {
  is_real = is_real && site.batch >= 0 && site.batch <= max_batch(D);
  for (int d = 0; d < D; ++d) is_real = is_real && axis_fits(site.coord[d], D);
  const Key batch = is_real ? batch_part<D>(site.batch) : 0;
  // The i-th coarse coordinate on an axis; 0 where there is none, kNoKey where it has no key.
  const auto coarse_part = [&](int d, int64_t i, bool* exists) -> Key {
    int64_t coarse;
    *exists = is_real && axes.axis[d].coarse(site.coord[d], i, &coarse) &&
              (!a.bounded || (coarse >= 0 && coarse < a.bounds[d]));
    return *exists ? axis_part<D>(d, coarse) : 0;
  };
  if (axes.at_most_two) {  // each axis is looked at once
    Key parts[D][2];
    unsigned exists[2] = {0, 0};  // a bit an axis
    unsigned in_one_block = 0;    // axes on which both are in the same block
    int32_t all = 1, with_key = 1;
#pragma unroll
    for (int d = 0; d < D; ++d) {
      int32_t sites = 0, keys = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        bool is_site = false;
        parts[d][i] = i < axes.axis[d].most() ? coarse_part(d, i, &is_site) : 0;
        const bool has_key = is_site && parts[d][i] != kNoKey;
        exists[i] |= static_cast<unsigned>(has_key) << d;
        sites += is_site;
        keys += has_key;
      }
      all *= sites;
      with_key *= keys;
      in_one_block |= static_cast<unsigned>(parts[d][0] >> kBlockBits == parts[d][1] >> kBlockBits) << d;
    }
    // The block that is the second one on some axes.
    const auto block_at = [&](unsigned second, Key* block) {
      *block = batch;
      uint64_t mask = 1;
#pragma unroll
      for (int d = 0; d < D; ++d) {  // a site's bit is at the sum of the axes' shares
        const unsigned axis = 1u << d;
        const bool has_first = (exists[0] & axis & (in_one_block | ~second)) != 0;
        const bool has_second = (exists[1] & axis & (in_one_block | second)) != 0;
        mask = (has_first ? mask << (parts[d][0] & kInBlock) : 0) | (has_second ? mask << (parts[d][1] & kInBlock) : 0);
        *block |= second & axis ? parts[d][1] : parts[d][0];
      }
      *block &= ~kInBlock;
      return mask;
    };
    Key block;
    uint64_t mask = block_at(0, &block);
    const Key block_below = __shfl_up_sync(kAllLanes, block, 1);  // of sorted sites neighbours often reach the same
    const bool leads = threadIdx.x % kWarp == 0 || block_below != block;
    mask = or_of_run(mask, leads);
    if (leads && mask != 0) meet(block, mask);
#pragma unroll 1
    for (unsigned second = 1; second < 1u << D; ++second) {
      if ((second & (in_one_block | ~exists[1])) != 0) continue;
      mask = block_at(second, &block);
      if (mask != 0) meet(block, mask);
    }
    return all - with_key;
  }
  int32_t outside = 0;
#pragma unroll 1
  for (int32_t window = 0; window < axes.windows; ++window) {  // numbered by places on the axes, the last the fastest
    Key key = batch;
    bool all_exist = is_real;
    int32_t rest = window;
    for (int d = D - 1; d >= 0; --d) {
      const int32_t most = static_cast<int32_t>(axes.axis[d].most());
      bool exists;
      key |= coarse_part(d, rest % most, &exists);
      all_exist = all_exist && exists;
      rest /= most;
    }
    outside += all_exist && key == kNoKey;
    if (all_exist && key != kNoKey) meet(key & ~kInBlock, uint64_t{1} << (key & kInBlock));
  }
  return outside;
}

// Lists the blocks of coarse sites that this block's rows reach; returns how many entries it wrote.
template <int D>
__device__ int32_t list_blocks(const CoarseSitesArgs& a, const CoarseAxes<D>& axes, Range rows, Entry* entries,
                               const Scratch& s) {
  __shared__ int32_t number;
  if (threadIdx.x == 0) number = 0;
  __syncthreads();
  uint64_t bits = 0;
  int32_t outside = 0;
  for (int32_t begin = rows.begin; begin < rows.end; begin += kGridThreads) {
    const int32_t row = begin + threadIdx.x;
    const Site<D> site(a.coords, min(row, rows.end - 1));
    outside += coarse_blocks(a, axes, site, row < rows.end, [&](Key block, uint64_t mask) {
      entries[atomicAdd(&number, 1)] = {block, mask};
      bits |= KeySpan<D>::bits_of(block);
    });
  }
  bits = block_or(bits);
  outside = block_sum(outside);
  if (threadIdx.x == 0) {
    s.bits_of[blockIdx.x] = bits;
    s.outside_of[blockIdx.x] = outside;
  }
  return number;
}

template <int D>
__global__ void __launch_bounds__(kGridThreads, 1) coarse_sites_kernel(CoarseSitesArgs a, CoarseAxes<D> axes, Scratch s) {
  const Grid grid = cooperative_groups::this_grid();
  const Range rows = share(real_rows(a.count, a.rows), kWarp, gridDim.x);
  clear_tree(s.tree);
  const int32_t first = rows.begin * axes.windows;
  const Range entries = {first, first + list_blocks<D>(a, axes, rows, s.entries + first, s)};
  grid.sync();
  const KeySpan<D> span(or_blocks(s.bits_of), false);
  const Leaves leaves = grow_tree(
      grid, s.tree, entries, span.bits(), [&](int32_t i) { return span.code(s.entries[i].block); },
      [&](int32_t i) { return s.entries[i].mask; });
  write_leaves<D>(s.tree, leaves, a.sites, a.capacity, [&](int32_t i) { return s.entries[i].block; });
  write_end<D>(a, leaves.sites, sum_blocks(s.outside_of).all);
}

template <int D>
cudaError_t coarse_sites_in(const CoarseSitesArgs& a, cudaStream_t stream) {
  Workspace workspace(a.workspace);
  const int shift = coarse_shift(a.geometry);
  if (a.sorted && shift > 0) {
    return launch_grid(shifted_sites_kernel<D>, div_up(a.rows, kGridThreads), stream, a, shift,
                       workspace.take<int32_t>(kMostBlocks));
  }
  const CoarseAxes<D> axes(a.geometry);
  const int64_t candidates = int64_t{a.rows} * axes.windows;
  Scratch s;
  s.entries = workspace.take<Entry>(candidates);
  s.tree = take_tree(workspace, candidates);
  s.bits_of = workspace.take<uint64_t>(kMostBlocks);
  s.outside_of = workspace.take<int32_t>(kMostBlocks);
  constexpr int64_t least = 64;  // few sites too have the tree's top to clear and to number
  const int64_t blocks = div_up(a.rows, kGridThreads);
  return launch_grid(coarse_sites_kernel<D>, blocks > least ? blocks : least, stream, a, axes, s);
}

}  // namespace

cudaError_t coarse_sites(const CoarseSitesArgs& a, cudaStream_t stream) {
  return for_dims(a.geometry.dims, [&](auto dims) { return coarse_sites_in<decltype(dims)::value>(a, stream); });
}

}  // namespace jaxsparse::cuda
