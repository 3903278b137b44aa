// shifted_sites, where the coarse sites are the sorted fine ones without their last bits; one cooperative kernel:
//
//     count   fine sites in each block's share whose coarse site differs from that of the one before
//     write   those
//
// coarse_sites, for every other geometry and order. It works on blocks of 64 coarse sites, a mask of 64 bits each, because
// there are few of them: neighbouring fine sites reach the same blocks over and over. A plain kernel marks:
//
//     mark    each block of threads gathers the masks that its rows reach in a hash map in shared memory, and lists them
//
// and a cooperative one turns the list into sites:
//
//     sort    the list by block
//     merge   masks of the same block; how many sites each share has
//     write   the sites of each mask
//
// On a LiDAR scan the 880,000 candidates of a 3^3 kernel with stride 2 become some 40,000 list entries. All of it is
// bound by latency: barriers of the grid and of blocks, dependent loads.
#include "cuda/coords/coarse_sites.h"

#include "cuda/hash/hash_map.cuh"
#include "cuda/sort/radix_sort.cuh"

namespace jaxsparse::cuda {
namespace {

__device__ int64_t real_rows(const CoarseSitesArgs& a) {
  const int32_t count = a.count[0];
  return count < 0 ? 0 : count < a.rows ? count : a.rows;
}

template <int D>
__device__ void write_end(const CoarseSitesArgs& a, int32_t found, int32_t outside) {
  for (int64_t row = found + global_thread(); row < a.capacity; row += all_threads()) {
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
    const Site<D> site(a.coords, row);
    int64_t coarse[D];
    for (int d = 0; d < D; ++d) {
      coarse[d] = site.coord[d] >> shift;
      if (a.bounded && (coarse[d] < 0 || coarse[d] >= a.bounds[d])) return kNoKey;
    }
    return make_key<D>(site.batch, coarse);
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

// A block of coarse sites met in a round, and which of its sites were.
struct alignas(16) Mark {
  uint64_t key;
  uint32_t masks[2];
};
constexpr int kMarkThreads = 128;
constexpr int kEach = 8;                          // candidates of a thread in a round, at most
constexpr int kSlots = 2 * kMarkThreads * kEach;  // so at most half of them are taken

struct Found {
  unsigned long long bits;  // in which the list's keys differ, see KeySpan
  int32_t entries;          // in the list
  int32_t outside;
};

struct Scratch {
  SortBuffers sort;   // its keys are the list's blocks
  uint64_t* masks;    // [candidates], of the list's entries
  Found* found;       // [1]
  int32_t* sites_of;  // [blocks], distinct sites in a block's share of the sorted list
};

// Calls meet(key) for the coarse sites of windows [first, first + kEach) of a fine site; kNoKey for a site that exists but
// has no key. Windows are numbered by their places on the axes, the last the fastest.
template <int D, typename Meet>
__device__ void coarse_keys(const CoarseSitesArgs& a, const CoarseAxis (&axes)[D], const Site<D>& site, int32_t first,
                            int32_t windows, Meet meet) {
  bool fits = site.batch >= 0 && site.batch <= max_batch(D);
  for (int d = 0; d < D; ++d) fits = fits && axis_fits(site.coord[d], D);
  if (!fits) return;
  const Key batch = batch_part<D>(site.batch);
  const auto coarse_part = [&](int d, int64_t i, Key* part) {
    int64_t coarse;
    if (!axes[d].coarse(site.coord[d], i, &coarse)) return false;
    *part = axis_part<D>(d, coarse);
    return !a.bounded || (coarse >= 0 && coarse < a.bounds[d]);
  };
  bool at_most_two = true;
  for (int d = 0; d < D; ++d) at_most_two = at_most_two && axes[d].most() <= 2;
  if (at_most_two && windows <= kEach) {  // as with kernel 3, stride 2: each axis is looked at once
    Key parts[D][2];
    bool exists[D][2];
#pragma unroll
    for (int d = 0; d < D; ++d) {
#pragma unroll
      for (int i = 0; i < 2; ++i) exists[d][i] = i < axes[d].most() && coarse_part(d, i, &parts[d][i]);
    }
#pragma unroll
    for (int window = 0; window < 1 << D; ++window) {
      Key key = batch;
      bool all_exist = true;
#pragma unroll
      for (int d = 0; d < D; ++d) {
        key |= parts[d][window >> d & 1];
        all_exist = all_exist && exists[d][window >> d & 1];
      }
      if (all_exist) meet(key);
    }
    return;
  }
  for (int32_t window = first; window < first + kEach && window < windows; ++window) {
    Key key = batch;
    bool all_exist = true;
    int32_t rest = window;
    for (int d = D - 1; d >= 0; --d) {
      const int32_t most = static_cast<int32_t>(axes[d].most());
      Key part = 0;
      all_exist = all_exist && coarse_part(d, rest % most, &part);
      key |= part;
      rest /= most;
    }
    if (all_exist) meet(key);
  }
}

// Lists the blocks of coarse sites that the rows reach, each once a round, with the mask of the sites reached.
template <int D>
__global__ void __launch_bounds__(kMarkThreads) mark_kernel(CoarseSitesArgs a, int32_t windows, Scratch s) {
  __shared__ Mark marks[kSlots];
  __shared__ CoarseAxis axes[D];
  __shared__ int32_t first_entry;
  if (threadIdx.x == 0) {
    for (int d = 0; d < D; ++d) axes[d] = CoarseAxis(a.geometry, d);
  }
  __syncthreads();
  const int32_t chunks = (windows + kEach - 1) / kEach;
  const int64_t end = real_rows(a) * chunks;
  HashMap<Mark> map(marks, kSlots);
  uint64_t bits = 0;
  int32_t outside = 0;
  for (int64_t begin = int64_t{kMarkThreads} * blockIdx.x; begin < end; begin += int64_t{kMarkThreads} * gridDim.x) {
    for (int slot = threadIdx.x; slot < kSlots; slot += kMarkThreads) marks[slot] = {kNoKey, {0, 0}};
    __syncthreads();
    // Neighbouring sites often meet the same block: a warp takes distant ones, so that its lanes rarely want one slot.
    const int64_t unit = begin + threadIdx.x % kWarp * (kMarkThreads / kWarp) + threadIdx.x / kWarp;
    if (unit < end) {
      const int32_t row = static_cast<int32_t>(unit) / chunks, chunk = static_cast<int32_t>(unit) % chunks;
      coarse_keys(a, axes, Site<D>(a.coords, row), chunk * kEach, windows, [&](Key key) {
        outside += key == kNoKey;
        if (key == kNoKey) return;
        const int site = static_cast<int>(key & kInBlock);
        atomicOr(&map.find_or_insert(key & ~kInBlock)->masks[site / 32], 1u << (site % 32));
      });
    }
    __syncthreads();
    int32_t taken = 0, total;
    for (int slot = threadIdx.x; slot < kSlots; slot += kMarkThreads) taken += marks[slot].key != kNoKey;
    int32_t entry = block_exclusive_scan<kMarkThreads>(taken, &total);
    if (threadIdx.x == 0) first_entry = atomicAdd(&s.found->entries, total);
    __syncthreads();
    entry += first_entry;
    for (int slot = threadIdx.x; slot < kSlots; slot += kMarkThreads) {
      const Mark mark = marks[slot];
      if (mark.key == kNoKey) continue;
      bits |= KeySpan<D>::bits_of(mark.key);
      s.sort.keys[entry] = mark.key;
      s.masks[entry++] = static_cast<uint64_t>(mark.masks[1]) << 32 | mark.masks[0];
    }
    __syncthreads();
  }
  bits = block_or<kMarkThreads>(bits);
  outside = block_sum<kMarkThreads>(outside);
  if (threadIdx.x == 0 && bits != 0) atomicOr(&s.found->bits, static_cast<unsigned long long>(bits));
  if (threadIdx.x == 0 && outside != 0) atomicAdd(&s.found->outside, outside);
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
__global__ void __launch_bounds__(kGridThreads, 2) coarse_sites_kernel(CoarseSitesArgs a, Scratch s) {
  __shared__ union {
    SortShared sort;
    struct {
      int32_t first[kGridThreads];  // sites of the tile's masks before each
      uint64_t masks[kGridThreads];
    } tile;
  } shared;
  const Grid grid = cooperative_groups::this_grid();
  const int32_t n = s.found->entries;
  const KeySpan<D> span(s.found->bits, false);
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
  write_end<D>(a, rows.all, s.found->outside);
}

template <int D>
cudaError_t coarse_sites_in(const CoarseSitesArgs& a, cudaStream_t stream) {
  Workspace workspace(a.workspace);
  const int32_t windows = static_cast<int32_t>(windows_per_site(a.geometry));
  const int64_t candidates = int64_t{a.rows} * windows;
  const int shift = coarse_shift(a.geometry);
  if (a.sorted && shift > 0) {
    return launch_grid(shifted_sites_kernel<D>, div_up(a.rows, kGridThreads), stream, a, shift,
                       workspace.take<int32_t>(kMostBlocks));
  }
  Scratch s;
  s.sort = take_sort_buffers(workspace, candidates);
  s.masks = workspace.take<uint64_t>(candidates);
  s.found = workspace.take<Found>(1);
  s.sites_of = workspace.take<int32_t>(kMostBlocks);
  JAXSPARSE_TRY(cudaMemsetAsync(s.found, 0, sizeof(Found), stream));
  const int64_t units = a.rows * div_up(windows, kEach);
  JAXSPARSE_TRY(launch(mark_kernel<D>, striding_blocks(units, kMarkThreads), {kMarkThreads}, stream, a, windows, s));
  return launch_grid(coarse_sites_kernel<D>, div_up(candidates, kSortTile), stream, a, s);
}

}  // namespace

cudaError_t coarse_sites(const CoarseSitesArgs& a, cudaStream_t stream) {
  return for_dims(a.geometry.dims, [&](auto dims) { return coarse_sites_in<decltype(dims)::value>(a, stream); });
}

}  // namespace jaxsparse::cuda
