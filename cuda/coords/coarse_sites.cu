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

// Block keys of coarse sites met in a round, with the masks of those met, as two words.
constexpr int kRound = 1024;        // candidates
constexpr int kSlots = 2 * kRound;  // so at most half of them are taken
struct Marks {
  uint64_t blocks[kSlots];
  uint32_t masks[2][kSlots];
};

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

// A thread's unit of work: one fine row, one choice of coarse coordinate on each axis but the last, and up to `each` of
// those on the last.
struct Units {
  int32_t lines, chunks, each;
};

template <int D>
__device__ Units units_of(const CoarseAxis (&axes)[D]) {
  const int32_t last = static_cast<int32_t>(axes[D - 1].most());
  Units units{1, 1, last < 8 ? last : 8};
  for (int d = 0; d < D - 1; ++d) units.lines *= static_cast<int32_t>(axes[d].most());
  units.chunks = (last + units.each - 1) / units.each;
  return units;
}

// Calls meet(key) for the coarse sites of a unit; kNoKey for those that exist but have no key.
template <int D, typename Meet>
__device__ void coarse_keys(const CoarseSitesArgs& a, const CoarseAxis (&axes)[D], const Units& units, int32_t unit,
                            Meet meet) {
  const int32_t of_row = units.lines * units.chunks;
  int32_t line = unit % of_row / units.chunks;
  const Site<D> site(a.coords, unit / of_row);
  bool exists = site.batch >= 0 && site.batch <= max_batch(D);
  for (int d = 0; d < D; ++d) exists = exists && axis_fits(site.coord[d], D);
  const auto is_inside = [&](int d, int64_t coarse) { return !a.bounded || (coarse >= 0 && coarse < a.bounds[d]); };
  Key of_line = batch_part<D>(site.batch);
  for (int d = D - 2; d >= 0; --d) {
    const int32_t most = static_cast<int32_t>(axes[d].most());
    int64_t coarse = 0;
    exists = exists && axes[d].coarse(site.coord[d], line % most, &coarse) && is_inside(d, coarse);
    of_line |= axis_part<D>(d, coarse);
    line /= most;
  }
  if (!exists) return;
  const int32_t first = unit % units.chunks * units.each;
  for (int32_t i = first; i < first + units.each; ++i) {
    int64_t coarse;
    if (!axes[D - 1].coarse(site.coord[D - 1], i, &coarse)) return;
    if (is_inside(D - 1, coarse)) meet(of_line | axis_part<D>(D - 1, coarse));
  }
}

// Lists the blocks of coarse sites that the rows reach, each once a round, with the mask of the sites reached.
template <int D>
__global__ void __launch_bounds__(kGridThreads) mark_kernel(CoarseSitesArgs a, Scratch s) {
  __shared__ Marks marks;
  __shared__ CoarseAxis axes[D];
  __shared__ int32_t first_entry;
  if (threadIdx.x == 0) {
    for (int d = 0; d < D; ++d) axes[d] = CoarseAxis(a.geometry, d);
  }
  __syncthreads();
  const Units units = units_of(axes);
  const int32_t round = kRound / units.each;
  HashMap map(marks.blocks, kSlots);
  uint64_t bits = 0;
  int32_t outside = 0;
  const int64_t end = real_rows(a) * units.lines * units.chunks;
  for (int64_t begin = int64_t{round} * blockIdx.x; begin < end; begin += int64_t{round} * gridDim.x) {
    for (int slot = threadIdx.x; slot < kSlots; slot += kGridThreads) {
      marks.blocks[slot] = kNoKey;
      marks.masks[0][slot] = marks.masks[1][slot] = 0;
    }
    __syncthreads();
    // Neighbouring units often meet the same block: a warp takes distant ones, so that its lanes rarely want one slot.
    const int scattered = threadIdx.x % kWarp * (kGridThreads / kWarp) + threadIdx.x / kWarp;
    for (int64_t unit = begin + scattered; unit < begin + round && unit < end; unit += kGridThreads) {
      coarse_keys(a, axes, units, static_cast<int32_t>(unit), [&](Key key) {
        outside += key == kNoKey;
        if (key == kNoKey) return;
        const int32_t slot = map.insert_if_absent(key & ~kInBlock);
        const int site = static_cast<int>(key & kInBlock);
        atomicOr(&marks.masks[site / 32][slot], 1u << (site % 32));
      });
    }
    __syncthreads();
    int32_t taken = 0, total;
    for (int slot = threadIdx.x; slot < kSlots; slot += kGridThreads) taken += marks.blocks[slot] != kNoKey;
    int32_t entry = block_exclusive_scan<kGridThreads>(taken, &total);
    if (threadIdx.x == 0) first_entry = atomicAdd(&s.found->entries, total);
    __syncthreads();
    entry += first_entry;
    for (int slot = threadIdx.x; slot < kSlots; slot += kGridThreads) {
      if (marks.blocks[slot] == kNoKey) continue;
      bits |= KeySpan<D>::bits_of(marks.blocks[slot]);
      s.sort.keys[entry] = marks.blocks[slot];
      s.masks[entry++] = static_cast<uint64_t>(marks.masks[1][slot]) << 32 | marks.masks[0][slot];
    }
    __syncthreads();
  }
  bits = block_or(bits);
  outside = block_sum(outside);
  if (threadIdx.x == 0) {
    atomicOr(&s.found->bits, static_cast<unsigned long long>(bits));
    atomicAdd(&s.found->outside, outside);
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
  const int64_t windows = windows_per_site(a.geometry), candidates = a.rows * windows;
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
  JAXSPARSE_TRY(launch(mark_kernel<D>, striding_blocks(candidates, kRound), {kGridThreads}, stream, a, s));
  return launch_grid(coarse_sites_kernel<D>, div_up(candidates, kRound), stream, a, s);
}

}  // namespace

cudaError_t coarse_sites(const CoarseSitesArgs& a, cudaStream_t stream) {
  return for_dims(a.geometry.dims, [&](auto dims) { return coarse_sites_in<decltype(dims)::value>(a, stream); });
}

}  // namespace jaxsparse::cuda
