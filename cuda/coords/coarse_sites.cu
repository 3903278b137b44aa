// Coarse sites of every geometry and order, but for those of shifted_sites.cu. It works on blocks of 64 coarse sites, a mask of
// 64 bits each, because there are few of them: neighbouring fine sites reach the same blocks over and over. Three kernels:
//
//     extent  how far from 0 the fine sites lie, which says how many bits the blocks' codes need
//     list    each block of threads gathers the masks that its rows reach in a hash map in shared memory, lists them with
//             their codes, and marks them in the top of the tree
//     tree    cooperative: puts the listed blocks in order, see tree.cuh, and writes their sites and the index that maps
//             from them need
//
// 111,028 sites of a scan, kernel 3^3, stride 2, reach 14,351 blocks; 256 rows at a time list 18 thousand.
//
// On an H200: 4, 11 and 14 us; of 32,650 sites 3, 6 and 12. Of the last 2 to 4 us are the index's, which as a call of its own
// takes 5 to 8.
//
// Tried and left:
//     a sort of the list by block: 60 us more, on an H100
//     blocks entered in the index by those who write the leaves, during the last barrier: as long, on an H200
//     one cooperative kernel for all, codes of as many bits on each axis as the longest needs: 42 us, 20 of 32,667 sites
#include "cuda/coords/coarse_sites.h"

#include <algorithm>

#include "cuda/coords/blocks.cuh"
#include "cuda/coords/padding.cuh"
#include "cuda/coords/site_index.cuh"
#include "cuda/coords/tree.cuh"

namespace jaxsparse::cuda {
namespace {

constexpr int kListThreads = 256;
constexpr int kListSlots = 1024;
constexpr int kExtentBlocks = kListThreads;  // at most, so that one thread can look at each one's result
constexpr int kSlotsAnEntry = 4;             // of the index, where it may have so many

// A block of coarse sites, and those of it that some rows reach.
struct alignas(16) Entry {
  uint64_t block;  // see blocks.cuh
  uint64_t sites;
};

struct Scratch {
  Entry* entries;     // [candidates]
  uint64_t* codes;    // [candidates], see BlockCodes
  Tree tree;          // of the entries
  uint32_t* highest;  // [1 + D, kExtentBlocks], of the rows of each block of threads: batch, distance from 0 on each axis
  int32_t* number;    // [1], of entries
  int32_t* bits;      // [1], of codes
};

template <int D>
struct CoarseAxes {
  CoarseAxis axis[D];
  int64_t stride[D], reach[D];  // a coarse coordinate times the stride is no farther from the fine one than this
  int32_t windows;              // that can hold one fine site
  // Two at most on each axis and found without a division or a number of 64 bits, as with kernel 3, stride 2. Then:
  bool are_simple;
  struct {
    int32_t padding, in_stride, shift, kernel;  // in_stride: the stride less 1
    int32_t lowest;                             // coordinate within the bounds
    uint32_t coords;                            // so many
  } simple[D];

  explicit CoarseAxes(const CoarseSitesArgs& a)
      : windows(static_cast<int32_t>(windows_per_site(a.geometry))), are_simple(true) {
    const Geometry& g = a.geometry;
    for (int d = 0; d < D; ++d) {
      axis[d] = CoarseAxis(g, d);
      stride[d] = g.stride[d];
      const int64_t below = g.dilation[d] * (g.kernel[d] - 1) - g.padding[d], above = g.padding[d];
      reach[d] = std::max(std::max(below, above), int64_t{0});
      constexpr int64_t most = int64_t{1} << 29;
      are_simple = are_simple && axis[d].most() <= 2 && axis[d].is_simple() && g.stride[d] <= most;
      are_simple = are_simple && g.padding[d] <= most && -g.padding[d] <= most;
      if (!are_simple) continue;
      simple[d] = {static_cast<int32_t>(g.padding[d]), static_cast<int32_t>(g.stride[d] - 1), axis[d].shift(),
                   static_cast<int32_t>(g.kernel[d]), a.bounded ? 0 : INT32_MIN,
                   a.bounded ? static_cast<uint32_t>(std::min(a.bounds[d], int64_t{UINT32_MAX})) : UINT32_MAX};
    }
  }
};

template <int D>
__device__ bool has_key(const Site<D>& site) {
  bool fits = site.batch >= 0 && site.batch <= max_batch(D);
  for (int d = 0; d < D; ++d) fits = fits && axis_fits(site.coord[d], D);
  return fits;
}

// Replaces each value by its maximum over the block of threads, all of which call it.
template <int N>
__device__ void block_max(uint32_t (&values)[N]) {
  __shared__ uint32_t highest[N];
  if (threadIdx.x < N) highest[threadIdx.x] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const uint32_t of_warp = __reduce_max_sync(kAllLanes, values[i]);
    if (threadIdx.x % kWarp == 0) atomicMax(&highest[i], of_warp);
  }
  __syncthreads();
  for (int i = 0; i < N; ++i) values[i] = highest[i];
}

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
  read(row);  // on their way together with the count
  clear_tree(s.tree);
  if (row == 0) *s.number = *a.outside = 0;
  if (row == 0 && a.index != nullptr) static_cast<BlockSlot*>(a.index)->key = kNoKey;  // the one that there is without entries
  const int32_t rows = real_rows(a.count, a.rows);
  uint32_t highest[1 + D] = {};
  while (row < rows) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const Site<D>& site = sites[i];
      if (row + i * all_threads() >= rows || !has_key(site)) continue;
      highest[0] = max(highest[0], static_cast<uint32_t>(site.batch));
      for (int d = 0; d < D; ++d) {
        const int32_t from_0 = site.coord[d] ^ site.coord[d] >> 31;  // -1 is as near as 0
        highest[1 + d] = max(highest[1 + d], static_cast<uint32_t>(from_0));
      }
    }
    row += kAtOnce * all_threads();
    read(row);
  }
  block_max(highest);
  for (int i = 0; i < 1 + D; ++i) s.highest[i * kExtentBlocks + blockIdx.x] = highest[i];
}

// Blocks as numbers in (batch, Morton) order, in shared memory. Coordinates far from the ends of their range leave the bits
// above them equal to the sign's complement, and those say nothing: a scan's blocks have 22 bits.
template <int D>
struct BlockCodes {
  static constexpr int kPart = 4;  // bits of a block's number that are looked up together
  static constexpr int kParts = (axis_bits(D) - 1 - block_axis_bits(D, 0) + kPart - 1) / kPart;
  static constexpr int kEntries = D * kParts << kPart;
  static_assert(kEntries <= kListThreads, "an entry a thread");

  uint64_t parts[kEntries];  // what a part of an axis's number adds to the code
  int low_bits[D];           // of a coordinate on each axis, below the sign's
  int batch_bits;

  // `highest`: the results of extent_kernel in one of its blocks. All threads of the block call it; a barrier must follow.
  __device__ void fill(const CoarseAxes<D>& axes, uint32_t (&highest)[1 + D]) {
    block_max(highest);
    if (threadIdx.x == 0) batch_bits = 32 - __clz(highest[0]);
#pragma unroll
    for (int d = 0; d < D; ++d) {
      if (static_cast<int>(threadIdx.x) != 1 + d) continue;
      const uint64_t most = highest[1 + d] + uint64_t{1} + axes.reach[d];
      const int bits = __clzll(axes.stride[d]) + 1 - __clzll(most);  // at least as many as most / stride has
      low_bits[d] = min(max(bits, 0), axis_bits(D) - 1);
    }
    __syncthreads();
    if (threadIdx.x >= kEntries) return;
    const int axis = threadIdx.x / (kParts << kPart), first = threadIdx.x / (1 << kPart) % kParts * kPart;
    uint64_t code = 0;
    for (int b = 0; b < kPart; ++b) {
      const int bit = first + b + block_axis_bits(D, axis);  // of a coordinate
      if ((threadIdx.x >> b & 1) == 0 || bit >= low_bits[axis]) continue;
      int place = 0;
      for (int d = 0; d < D; ++d) {
        place += max(min(bit + (d > axis), low_bits[d]) - block_axis_bits(D, d), 0);
      }
      code |= uint64_t{1} << place;
    }
    parts[threadIdx.x] = code;
  }

  __device__ int bits_below_sign() const {
    int bits = 0;
    for (int d = 0; d < D; ++d) bits += max(low_bits[d] - block_axis_bits(D, d), 0);
    return bits;
  }

  __device__ int bits() const { return batch_bits + D + bits_below_sign(); }

  __device__ uint64_t code(uint64_t block) const {
    constexpr BlockNumbers<D> numbers;
    uint64_t top = block >> numbers.batch_shift, code = 0;
#pragma unroll
    for (int d = 0; d < D; ++d) {
      const uint32_t number = static_cast<uint32_t>(block >> numbers.shift[d]);
      top = top << 1 | (number >> (numbers.bits[d] - 1) & 1);
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        code |= parts[(d * kParts + i) << kPart | (number >> i * kPart & ((1 << kPart) - 1))];
      }
    }
    return top << bits_below_sign() | code;
  }
};

// The sites of a block whose coordinate on an axis is the lowest; shifted by bits_in_block(), those with another.
template <int D>
struct LowestSites {
  uint64_t on[D];

  constexpr LowestSites() : on() {
    for (int d = 0; d < D; ++d) {
      for (int bit = 0; bit < 64; ++bit) {
        bool lowest = true;
        for (int b = 0; b < block_axis_bits(D, d); ++b) lowest = lowest && (bit >> (b * D + D - 1 - d) & 1) == 0;
        if (lowest) on[d] |= uint64_t{1} << bit;
      }
    }
  }
};

// A coarse coordinate on one axis.
struct OnAxis {
  bool exists, has_key;
  uint32_t number;  // of its block
  int32_t bits;     // its share of the bits in that
};

template <int D>
__device__ OnAxis on_axis(const CoarseSitesArgs& a, int d, bool exists, int64_t coord) {
  exists = exists && (!a.bounded || (coord >= 0 && coord < a.bounds[d]));
  const uint32_t at = static_cast<uint32_t>(coord) + (uint32_t{1} << (axis_bits(D) - 1));
  return {exists, exists && axis_fits(coord, D), at >> block_axis_bits(D, d), bits_in_block<D>(d, static_cast<int32_t>(at))};
}

// The coarse sites that a fine one reaches, by blocks: on simple axes, where each is looked at once.
template <int D>
struct Reached {
  uint64_t batch;
  uint64_t sites[D][2];  // on each axis, in the block of the first and in that of the second where it is another
  uint32_t number[D][2];
  int32_t seconds;  // axes with a second block, a bit each
  int32_t outside;  // those without a key

  __device__ Reached(const CoarseAxes<D>& axes, const Site<D>& site)
      : batch(static_cast<uint64_t>(site.batch) << BlockNumbers<D>().batch_shift), seconds(0) {
    constexpr LowestSites<D> lowest;
    constexpr uint32_t all_coords = uint32_t{1} << axis_bits(D);
    int32_t all = 1, with_key = 1;
#pragma unroll
    for (int d = 0; d < D; ++d) {
      const auto& axis = axes.simple[d];
      const int32_t padded = site.coord[d] + axis.padding, tap = padded & axis.in_stride, coarse = padded >> axis.shift;
      bool has_key[2];
      int exist = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t coord = static_cast<uint32_t>(coarse) - i, at = coord + all_coords / 2;
        const bool exists = tap + (i == 0 ? 0 : axis.in_stride + 1) < axis.kernel && coord - axis.lowest < axis.coords;
        has_key[i] = exists && at < all_coords;
        exist += exists;
        sites[d][i] = has_key[i] ? lowest.on[d] << bits_in_block<D>(d, static_cast<int32_t>(at)) : 0;
        number[d][i] = at >> block_axis_bits(D, d);
      }
      if (has_key[0] && number[d][0] == number[d][1]) {
        sites[d][0] |= sites[d][1];
      } else if (has_key[1]) {
        seconds |= 1 << d;
      }
      all *= exist;
      with_key *= has_key[0] + has_key[1];
    }
    outside = all - with_key;
  }

  // Those in the block that is the second on the axes whose bits are set.
  __device__ uint64_t in_block(int32_t which, uint64_t* block) const {
    constexpr BlockNumbers<D> numbers;
    uint64_t reached = ~uint64_t{0};
    *block = batch;
#pragma unroll
    for (int d = 0; d < D; ++d) {
      const bool second = (which >> d & 1) != 0;
      *block |= static_cast<uint64_t>(second ? number[d][1] : number[d][0]) << numbers.shift[d];
      reached &= second ? sites[d][1] : sites[d][0];
    }
    return reached;
  }
};

// The coarse site of one window in which a fine one may lie, numbered by places on the axes, the last the fastest.
template <int D>
__device__ uint64_t reached_by(const CoarseSitesArgs& a, const CoarseAxes<D>& axes, const Site<D>& site, int32_t window,
                               uint64_t* block, int32_t* outside) {
  constexpr BlockNumbers<D> numbers;
  int32_t bit = 0;
  bool exists = true, has_key = true;
  *block = static_cast<uint64_t>(site.batch) << numbers.batch_shift;
  for (int d = D - 1; d >= 0; --d) {
    const int32_t most = static_cast<int32_t>(axes.axis[d].most());
    int64_t coord = 0;
    const bool is_one = axes.axis[d].coarse(site.coord[d], window % most, &coord);
    const OnAxis on = on_axis<D>(a, d, is_one, coord);
    exists = exists && on.exists;
    has_key = has_key && on.has_key;
    *block |= static_cast<uint64_t>(on.number) << numbers.shift[d];
    bit |= on.bits;
    window /= most;
  }
  *outside += exists && !has_key;
  return has_key ? uint64_t{1} << bit : 0;
}

// The blocks that the rows of a block of threads reach: a hash map in shared memory.
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

  // Whether the sites found a place.
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
    list_kernel(CoarseSitesArgs a, CoarseAxes<D> axes, Scratch s, int extent_blocks) {
  __shared__ BlockList list;
  __shared__ BlockCodes<D> codes;
  __shared__ int32_t first_entry;
  const auto site_at = [&](int64_t row) { return Site<D>(a.coords, min(row, int64_t{a.rows} - 1)); };
  Site<D> site = site_at(global_thread());  // on its way together with the count and the extent
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
  int32_t outside = 0;
  for (int64_t begin = int64_t{blockIdx.x} * kListThreads; begin < rows; begin += all_threads()) {
    bool more = begin + threadIdx.x < rows && has_key(site);
    int32_t step = 0;      // which of the blocks or windows is next
    bool goes_on = false;  // where the list was full
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
          step = (step - reached.seconds) & reached.seconds;  // the next part of that set, the empty one after the last
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
      // Marks take as long, and the last warp seldom has any.
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
        mark_children<kListThreads>(top_marks(s.tree), exists, shape.top_node(code), shape.digit(code, 0));
        if (exists) {
          s.entries[first_entry + i] = {block, sites};
          s.codes[first_entry + i] = code;
          s.tree.level(1).children[first_entry + i] = 0;
        }
        if (a.index != nullptr) {
          const int64_t begin = first_entry + next, end = first_entry + min(next + kListThreads, list.number);
          clear_slots(static_cast<BlockSlot*>(a.index), kSlotsAnEntry * begin,
                      min(kSlotsAnEntry * end, int64_t{BlockSlot::number(a.capacity)}), threadIdx.x, kListThreads);
        }
      }
      __syncthreads();  // the list is no longer read
    } while (goes_on);
    site = site_at(begin + all_threads() + threadIdx.x);
  }
  if (outside != 0) atomicAdd(a.outside, outside);
}

// What the tree's leaves become: sites, and an index of their blocks where it is wanted, in slots that list_kernel cleared.
template <int D>
struct Output {
  const CoarseSitesArgs& a;
  BlockSlot* const index;
  const uint32_t slots;
  const bool late;  // whether all listed blocks might not fit the index: then only those of kept sites enter it

  __device__ Output(const CoarseSitesArgs& a, int32_t entries)
      : a(a),
        index(static_cast<BlockSlot*>(a.index)),
        slots(static_cast<uint32_t>(
            max(min(int64_t{kSlotsAnEntry} * entries, int64_t{BlockSlot::number(a.capacity)}), int64_t{1}))),
        late(slots <= static_cast<uint32_t>(entries)) {
    if (index != nullptr && global_thread() == 0) index->slots = slots;
  }

  // The slot.
  __device__ int32_t enter(uint64_t block) const {
    return index != nullptr ? static_cast<int32_t>(HashMap<BlockSlot>(index, slots).insert_if_absent(block) - index) : 0;
  }

  // A leaf has a site at least, so from the capacity on none is kept.
  __device__ int32_t enter_leaf(int32_t leaf, uint64_t block) const { return leaf < a.capacity ? enter(block) : 0; }

  __device__ void hold(int64_t leaf, int32_t slot, int32_t first_row, uint64_t sites) const {
    if (index != nullptr && leaf < a.capacity) index[slot].hold(sites, first_row);
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
      },
      output);
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
  constexpr int64_t least = 128;  // few sites too have the tree's top to clear and to number
  const int extent_blocks = static_cast<int>(std::min<int64_t>(std::max(blocks, least), kExtentBlocks));
  int tree_blocks = 0;
  JAXSPARSE_TRY(blocks_at_once(tree_kernel<D>, std::max(blocks, least), &tree_blocks));
  JAXSPARSE_TRY(launch(extent_kernel<D>, extent_blocks, {kGridThreads}, stream, a, s));
  JAXSPARSE_TRY(launch(list_kernel<D>, striding_blocks(a.rows, kListThreads), {kListThreads}, stream, a, axes, s,
                       extent_blocks));
  return launch_grid(tree_kernel<D>, tree_blocks, stream, a, s);
}

}  // namespace

cudaError_t coarse_sites(const CoarseSitesArgs& a, cudaStream_t stream) {
  if (a.sorted && coarse_shift(a.geometry) > 0) return shifted_sites(a, stream);
  return for_dims(a.geometry.dims, [&](auto dims) { return coarse_sites_in<decltype(dims)::value>(a, stream); });
}

}  // namespace jaxsparse::cuda
