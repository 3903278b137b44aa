// Two cooperative kernels.
//
// shifted_sites, where the coarse sites are the sorted fine ones without their last bits:
//
//     count   fine sites in each block's share whose coarse site differs from that of the one before
//     write   those
//
// coarse_sites, for every other geometry and order. It works on blocks of 64 coarse sites, a mask of 64 bits each, because
// there are few of them: fine sites of 32-lane neighbours reach the same blocks over and over.
//
//     mark    each block of threads gathers the masks that its rows reach in a hash map in shared memory, and lists them
//     sort    the list by block
//     merge   masks of the same block; how many sites each share has
//     write   the sites of each mask
//
// On a LiDAR scan the 880,000 candidates of a 3^3 kernel with stride 2 become about 40,000 list entries. All of it is
// bound by latency: barriers of the grid and of blocks, dependent loads.
#include "cuda/coords/coarse_sites.h"

#include "cuda/hash/hash_map.cuh"
#include "cuda/sort/radix_sort.cuh"

namespace jaxsparse::cuda {
namespace {

template <int D>
__device__ bool is_inside(const CoarseSitesArgs& a, const int64_t (&coarse)[D]) {
  if (!a.bounded) return true;
  for (int d = 0; d < D; ++d) {
    if (coarse[d] < 0 || coarse[d] >= a.bounds[d]) return false;
  }
  return true;
}

__device__ int64_t real_rows(const CoarseSitesArgs& a) {
  const int32_t count = a.count[0];
  return count < 0 ? 0 : count < a.rows ? count : a.rows;
}

template <int D>
__device__ void write_end(const CoarseSitesArgs& a, int32_t found, int32_t outside) {
  for (int64_t row = found + global_thread(); row < a.capacity; row += grid_threads()) {
    write_padding<D>(a.sites + row * (1 + D));
  }
  if (global_thread() == 0) {
    *a.found = found;
    *a.outside = outside;
  }
}

// --- shifted ---

template <int D>
__global__ void __launch_bounds__(kGridThreads, 2) shifted_sites_kernel(CoarseSitesArgs a, int shift, int32_t* heads_of) {
  const Grid grid = cooperative_groups::this_grid();
  const int64_t n = real_rows(a);
  const auto coarse_key = [&](int64_t row) {
    const int32_t* site = a.coords + row * (1 + D);
    int64_t coarse[D];
    for (int d = 0; d < D; ++d) coarse[d] = site[1 + d] >> shift;
    return is_inside(a, coarse) ? make_key<D>(site[0], coarse) : kNoKey;
  };
  const Range own = share(n, kGridThreads, gridDim.x);
  const auto head = [&](int32_t i) {  // the key of a row that begins a coarse site, else kNoKey
    if (i >= own.end) return kNoKey;
    const Key key = coarse_key(i);
    return i > 0 && coarse_key(i - 1) == key ? kNoKey : key;
  };
  int32_t heads = 0;
  for (int32_t i = own.begin + threadIdx.x; i < own.end; i += kGridThreads) heads += head(i) != kNoKey;
  heads = block_sum(heads);
  if (threadIdx.x == 0) heads_of[blockIdx.x] = heads;
  grid.sync();

  const BlockSums rows = sum_blocks(heads_of);
  int32_t next = rows.before;
  for (int32_t begin = own.begin; begin < own.end; begin += kGridThreads) {
    const Key key = head(begin + threadIdx.x);
    int32_t total;
    const int32_t row = next + block_exclusive_scan<kGridThreads>(static_cast<int32_t>(key != kNoKey), &total);
    next += total;
    if (key != kNoKey && row < a.capacity) write_site<D>(key, a.sites + static_cast<int64_t>(row) * (1 + D));
  }
  write_end<D>(a, rows.all, 0);  // a coarse coordinate is nearer to 0 than a fine one: it has a key
}

// --- general ---

// Block keys of coarse sites met in a round, with the masks of those met, as two words.
constexpr int kRound = 1024;        // candidates
constexpr int kSlots = 2 * kRound;  // so at most half of them are taken
struct Marks {
  uint64_t blocks[kSlots];
  uint32_t masks[2][kSlots];
};

struct Scratch {
  SortBuffers sort;
  uint64_t* masks;      // [candidates], of the list's entries; after the merge of the sorted ones
  int32_t* entries;     // [1], in the list
  uint64_t* bits_of;    // [blocks], of the keys in a block's list entries
  int32_t* outside_of;  // [blocks]
  int32_t* sites_of;    // [blocks], distinct sites in a block's share of the sorted list
};

// The coarse sites whose window holds a fine site, `windows` of them at most: the w-th, or kNoKey. `lost` is set where
// it exists but has no key.
template <int D>
__device__ Key coarse_key(const CoarseSitesArgs& a, const CoarseAxis (&axes)[D], const int32_t* site, int32_t window,
                          bool* lost) {
  if (!has_key<D>(site)) return kNoKey;
  int64_t coarse[D];
  for (int d = D - 1; d >= 0; --d) {
    const int32_t most = static_cast<int32_t>(axes[d].most());
    if (!axes[d].coarse(site[1 + d], window % most, &coarse[d])) return kNoKey;
    window /= most;
  }
  if (!is_inside(a, coarse)) return kNoKey;
  const Key key = make_key<D>(site[0], coarse);
  *lost = key == kNoKey;
  return key;
}

// Lists the blocks of coarse sites that the rows reach, each once a round, with the mask of the sites reached.
template <int D>
__device__ void mark(const CoarseSitesArgs& a, int32_t windows, const Scratch& s, Marks& marks) {
  __shared__ CoarseAxis axes[D];
  __shared__ int32_t first_entry;
  if (threadIdx.x == 0) {
    for (int d = 0; d < D; ++d) axes[d] = CoarseAxis(a.geometry, d);
  }
  HashMap map(marks.blocks, kSlots);
  uint64_t bits = 0;
  int32_t outside = 0;
  const Range own = share(real_rows(a) * int64_t{windows}, kRound, gridDim.x);
  for (int32_t begin = own.begin; begin < own.end; begin += kRound) {
    for (int slot = threadIdx.x; slot < kSlots; slot += kGridThreads) {
      marks.blocks[slot] = kNoKey;
      marks.masks[0][slot] = marks.masks[1][slot] = 0;
    }
    __syncthreads();
    for (int32_t i = begin + threadIdx.x; i < begin + kRound && i < own.end; i += kGridThreads) {
      bool lost = false;
      const int32_t row = i / windows, window = i % windows;
      const Key key = coarse_key<D>(a, axes, a.coords + int64_t{row} * (1 + D), window, &lost);
      outside += lost;
      if (key == kNoKey) continue;
      const int64_t slot = map.insert_if_absent(key & ~kInBlock);
      const int site = static_cast<int>(key & kInBlock);
      atomicOr(&marks.masks[site / 32][slot], 1u << (site % 32));
    }
    __syncthreads();
    int32_t taken = 0, total;
    for (int slot = threadIdx.x; slot < kSlots; slot += kGridThreads) taken += marks.blocks[slot] != kNoKey;
    int32_t entry = block_exclusive_scan<kGridThreads>(taken, &total);
    if (threadIdx.x == 0) first_entry = atomicAdd(s.entries, total);
    __syncthreads();
    entry += first_entry;
    for (int slot = threadIdx.x; slot < kSlots; slot += kGridThreads) {
      if (marks.blocks[slot] == kNoKey) continue;
      bits |= KeySpan<D>::bits_of(marks.blocks[slot]);
      s.sort.keys[entry] = marks.blocks[slot];
      s.masks[entry++] = static_cast<uint64_t>(marks.masks[1][slot]) << 32 | marks.masks[0][slot];
    }
  }
  bits = block_or(bits);
  outside = block_sum(outside);
  if (threadIdx.x == 0) {
    s.bits_of[blockIdx.x] = bits;
    s.outside_of[blockIdx.x] = outside;
  }
}

// Position of the n-th set bit, n = 0 for the lowest.
__device__ int nth_bit(uint64_t mask, int n) {
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

template <int D>
__global__ void __launch_bounds__(kGridThreads, 2) coarse_sites_kernel(CoarseSitesArgs a, int32_t windows, Scratch s) {
  __shared__ union {
    Marks marks;
    SortShared sort;
    struct {
      int32_t first[kGridThreads];  // sites of the tile's masks before each
      uint64_t masks[kGridThreads];
    } tile;
  } shared;
  const Grid grid = cooperative_groups::this_grid();
  if (global_thread() == 0) *s.entries = 0;
  grid.sync();
  mark<D>(a, windows, s, shared.marks);
  grid.sync();

  const int32_t n = *s.entries;
  const int32_t outside = sum_blocks(s.outside_of).all;
  const KeySpan<D> span(or_blocks(s.bits_of), false);
  radix_sort(grid, s.sort, n, span.bits() - kBlockBits, shared.sort,
             [&](Key key) { return span.code(key) >> kBlockBits; });
  const Key* blocks = s.sort.keys;
  const uint32_t* entries = s.sort.values;
  uint64_t* merged = s.sort.other_keys;  // the mask of a block at its first entry, 0 at the others

  const Range own = share(n, kGridThreads, gridDim.x);
  int32_t sites = 0;
  for (int32_t i = own.begin + threadIdx.x; i < own.end; i += kGridThreads) {
    uint64_t mask = 0;
    if (i == 0 || blocks[i - 1] != blocks[i]) {
      for (int32_t j = i; j < n && blocks[j] == blocks[i]; ++j) mask |= s.masks[entries[j]];
    }
    merged[i] = mask;
    sites += __popcll(mask);
  }
  sites = block_sum(sites);
  if (threadIdx.x == 0) s.sites_of[blockIdx.x] = sites;
  grid.sync();

  const BlockSums rows = sum_blocks(s.sites_of);
  int64_t next = rows.before;
  for (int32_t begin = own.begin; begin < own.end; begin += kGridThreads) {
    const int32_t i = begin + threadIdx.x;
    const uint64_t mask = i < own.end ? merged[i] : 0;
    int32_t total;
    const int32_t first = block_exclusive_scan<kGridThreads>(__popcll(mask), &total);
    shared.tile.first[threadIdx.x] = first;
    shared.tile.masks[threadIdx.x] = mask;
    __syncthreads();
    for (int32_t j = threadIdx.x; j < total && next + j < a.capacity; j += kGridThreads) {
      int low = 0, high = kGridThreads - 1;  // the last entry that begins at j or before: it holds site j
      while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (shared.tile.first[middle] <= j) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      const Key key = blocks[begin + low] | nth_bit(shared.tile.masks[low], j - shared.tile.first[low]);
      write_site<D>(key, a.sites + (next + j) * (1 + D));
    }
    next += total;
    __syncthreads();
  }
  write_end<D>(a, rows.all, outside);
}

template <int D>
cudaError_t coarse_sites_in(const CoarseSitesArgs& a, cudaStream_t stream) {
  Workspace workspace(a.workspace);
  const int64_t windows = windows_per_site(a.geometry), candidates = a.rows * windows;
  const int shift = coarse_shift(a.geometry);
  if (a.sorted && shift > 0) {
    return launch_grid(shifted_sites_kernel<D>, div_up(a.rows, kGridThreads), stream, a, shift,
                       workspace.take<int32_t>(kMostBlocks));
  }
  Scratch s;
  s.sort = take_sort_buffers(workspace, candidates);
  s.masks = workspace.take<uint64_t>(candidates);
  s.bits_of = workspace.take<uint64_t>(kMostBlocks);
  s.outside_of = workspace.take<int32_t>(kMostBlocks);
  s.sites_of = workspace.take<int32_t>(kMostBlocks - 1);
  s.entries = s.sites_of + kMostBlocks - 1;
  return launch_grid(coarse_sites_kernel<D>, div_up(candidates, kRound), stream, a, windows, s);
}

}  // namespace

cudaError_t coarse_sites(const CoarseSitesArgs& a, cudaStream_t stream) {
  return for_dims(a.geometry.dims, [&](auto dims) { return coarse_sites_in<decltype(dims)::value>(a, stream); });
}

}  // namespace jaxsparse::cuda
