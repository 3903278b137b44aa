// One cooperative kernel a builder, in three phases: clear the hash map, enter the input sites, look taps up.
//
// The table is written once, 108 bytes an output of a 3^3 kernel, and that is the floor: 10 MB for a scan. Searches hit
// L2; what bounds them is its latency and the arithmetic of keys, some 60 instructions each, so the builders differ in
// how many they make:
//
//     hash     one a tap. Sites may have any order.
//     blocks   one a block under the window: 3.4 on average for 3^3 taps over blocks of 4^3 sites, where the hash map
//              has a third of the entries. A block's mask then answers for all taps in it, and the number of its sites
//              before one says which row that is.
#include "cuda/coords/kernel_map.h"

#include "cuda/common/grid.cuh"
#include "cuda/coords/window.h"
#include "cuda/hash/hash_map.cuh"

namespace jaxsparse::cuda {
namespace {

__device__ int32_t real_rows(const int32_t* count, int32_t rows) {
  return count[0] < 0 ? 0 : count[0] < rows ? count[0] : rows;
}

template <int D>
__device__ Key key_of(const Site<D>& site) {
  int64_t coord[D];
  for (int d = 0; d < D; ++d) coord[d] = site.coord[d];
  return make_key<D>(site.batch, coord);
}

constexpr int kMapRows = 64;   // outputs a tile: two warps side by side, so that table writes are whole lines
constexpr int kMapWords = 16;  // mask words that a block of threads gathers at a time
constexpr int kTilesAcross = kMapRows / kWarp;
constexpr int kMapBlocks = 2;
constexpr int kTapShares = kGridThreads / kMapRows;  // warps that share the taps of 32 outputs

using TileMasks = uint32_t[kMapWords][kMapRows];

// The tile's row that this thread looks up taps for.
__device__ int own_row() { return threadIdx.x % kWarp + threadIdx.x / kWarp % kTilesAcross * kWarp; }

// Looks up taps 32 * word .. of kMapWords words for the tile of outputs at `first`, and writes table and masks.
// line(tap) is told all but the last axis of a tap, tap[D]; find(last) is then the input row under the tap, or -1.
template <int D, typename Line, typename Find>
__device__ void write_tile(const KernelMapArgs& a, int32_t first, int32_t rows, int32_t word, TileMasks& masks,
                           Line line, Find find) {
  for (int i = threadIdx.x; i < kMapWords * kMapRows; i += kGridThreads) masks[i / kMapRows][i % kMapRows] = 0;
  __syncthreads();
  const int r = own_row();
  const int32_t taps = min(a.taps, (word + kMapWords) * 32) - word * 32, my_share = threadIdx.x / kMapRows;
  const int32_t begin = word * 32 + taps * my_share / kTapShares, end = word * 32 + taps * (my_share + 1) / kTapShares;
  if (first + r < rows && begin < end) {
    int32_t tap[D];
    int32_t rest = begin;
    for (int d = D - 1; d >= 0; --d) {
      const int32_t size = static_cast<int32_t>(a.geometry.kernel[d]);
      tap[d] = rest % size;
      rest /= size;
    }
    line(tap);
    int32_t* entry = a.table + static_cast<int64_t>(begin) * a.out_rows + first + r;
    for (int32_t k = begin; k < end; ++k) {
      const int32_t row = find(tap[D - 1]);
      *entry = row;
      entry += a.out_rows;
      if (row >= 0) atomicOr(&masks[k / 32 - word][r], 1u << (k % 32));
      if (++tap[D - 1] < static_cast<int32_t>(a.geometry.kernel[D - 1])) continue;
      tap[D - 1] = 0;
      for (int d = D - 2; d >= 0; --d) {
        if (++tap[d] < static_cast<int32_t>(a.geometry.kernel[d])) break;
        tap[d] = 0;
      }
      line(tap);
    }
  }
  __syncthreads();
  const int32_t words = min(kMapWords, a.mask_words - word);
  for (int i = threadIdx.x; i < words * kMapRows; i += kGridThreads) {
    const int32_t m = first + i / words;
    if (m < rows) a.masks[static_cast<int64_t>(m) * a.mask_words + word + i % words] = masks[i % words][i / words];
  }
}

// --- hash ---

struct SiteTable {
  uint64_t* keys;
  int32_t* rows;
};

template <int D>
__global__ void __launch_bounds__(kGridThreads, 2) hash_map_kernel(KernelMapArgs a, SiteTable sites) {
  __shared__ TileMasks masks;
  const Grid grid = cooperative_groups::this_grid();
  const int32_t in_rows = real_rows(a.in_count, a.in_rows), out_rows = real_rows(a.out_count, a.out_rows);
  const int64_t slots = hash_slots(in_rows);
  HashMap map(sites.keys, slots);
  map.clear(global_thread(), grid_threads());
  for (int64_t slot = global_thread(); slot < slots; slot += grid_threads()) sites.rows[slot] = -1;
  grid.sync();
  for (int64_t row = global_thread(); row < in_rows; row += grid_threads()) {
    const Key key = key_of(Site<D>(a.in_coords, row));
    if (key == kNoKey) continue;
    const int64_t slot = map.insert_if_absent(key);
    // -1 is the largest unsigned number, so of equal sites the first row wins
    atomicMin(reinterpret_cast<unsigned*>(sites.rows + slot), static_cast<unsigned>(row));
  }
  grid.sync();
  const int32_t pieces = static_cast<int32_t>(div_up(a.mask_words, kMapWords));
  const int64_t tiles = div_up(out_rows, kMapRows);
  for (int64_t i = blockIdx.x; i < tiles * pieces; i += gridDim.x) {
    const int32_t first = static_cast<int32_t>(i / pieces) * kMapRows;
    const int32_t word = static_cast<int32_t>(i % pieces) * kMapWords;
    const Site<D> out(a.out_coords, min(first + own_row(), out_rows - 1));
    Key of_line = kNoKey;
    write_tile<D>(
        a, first, out_rows, word, masks,
        [&](const int32_t (&tap)[D]) {
          of_line = batch_part<D>(out.batch);
          for (int d = 0; d < D - 1; ++d) of_line |= axis_part<D>(d, a.geometry.fine(d, out.coord[d], tap[d]));
        },
        [&](int32_t last) {
          const Key key = of_line | axis_part<D>(D - 1, a.geometry.fine(D - 1, out.coord[D - 1], last));
          const int64_t slot = key == kNoKey ? -1 : map.find(key);
          return slot < 0 ? -1 : sites.rows[slot];
        });
    __syncthreads();
  }
}

// --- blocks ---

struct BlockTable {
  uint64_t* keys;   // of a block: that of its first site
  uint64_t* masks;  // which of its 64 sites exist
  int32_t* rows;    // row of the first that does
};

// Enters the blocks of sorted sites. The lanes of a warp that hold one block's are neighbours, and enter their bits
// together.
template <int D>
__device__ void enter_blocks(const KernelMapArgs& a, int32_t in_rows, HashMap map, const BlockTable& blocks) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t begin = global_thread() - lane; begin < in_rows; begin += grid_threads()) {
    const int64_t row = begin + lane;
    const Key key = row < in_rows ? key_of(Site<D>(a.in_coords, row)) : kNoKey;
    const Key block = key | kInBlock;
    Key block_below = __shfl_up_sync(kAllLanes, block, 1);
    const bool leads = lane == 0 || block_below != block;
    const unsigned leaders = __ballot_sync(kAllLanes, leads);
    const int leader = 31 - __clz(leaders & (0xffffffffu >> (31 - lane)));
    // OR over the lanes of the same leader: each adds what the lanes above it have gathered
    uint64_t bits = key == kNoKey ? 0 : uint64_t{1} << (key & kInBlock);
    for (int step = 1; step < kWarp; step *= 2) {
      const uint64_t above = __shfl_down_sync(kAllLanes, bits, step);
      const int leader_above = __shfl_down_sync(kAllLanes, leader, step);
      if (lane + step < kWarp && leader_above == leader) bits |= above;
    }
    if (key == kNoKey || !leads) continue;
    const int64_t slot = map.insert_if_absent(key & ~kInBlock);
    atomicOr(reinterpret_cast<unsigned long long*>(blocks.masks + slot), static_cast<unsigned long long>(bits));
    if (lane == 0 && row > 0) block_below = key_of(Site<D>(a.in_coords, row - 1)) | kInBlock;
    if (row == 0 || block_below != block) blocks.rows[slot] = static_cast<int32_t>(row);
  }
}

constexpr int kMostParts = kMostUnderWindow + 2;  // the sum over the axes of as many numbers with a product of 27

struct UnderWindows {  // of a tile's outputs
  uint64_t parts[kMostParts][kMapRows];        // of the blocks' keys, an axis after the other
  uint64_t masks[kMostUnderWindow][kMapRows];  // of the blocks
  int32_t rows[kMostUnderWindow][kMapRows];
};

// Finds the blocks under the windows of the tile of outputs at `first`.
template <int D>
__device__ void look_under(const KernelMapArgs& a, int32_t first, int32_t out_rows, const int32_t (&across)[D],
                           int most_under, const HashMap& map, const BlockTable& blocks, UnderWindows& under) {
  int parts = 0;
  for (int d = 0; d < D; ++d) parts += across[d];
  for (int i = threadIdx.x; i < parts * kMapRows; i += kGridThreads) {
    const int r = i % kMapRows;
    if (first + r >= out_rows) continue;
    int axis = 0;
    int32_t block = i / kMapRows;
    for (int d = 0; d < D - 1; ++d) {
      if (axis < d || block < across[d]) break;
      block -= across[d];
      axis = d + 1;
    }
    const int32_t coarse = a.out_coords[static_cast<int64_t>(first + r) * (1 + D) + 1 + axis];
    const WindowAxis window = window_axis<D>(a.geometry, axis, coarse);
    const bool is_under = block < window.blocks;
    under.parts[i / kMapRows][r] = is_under ? axis_part<D>(axis, window.first_site<D>(axis, block)) : kNoKey;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < most_under * kMapRows; i += kGridThreads) {
    const int r = i % kMapRows;
    if (first + r >= out_rows) continue;
    Key key = batch_part<D>(a.out_coords[static_cast<int64_t>(first + r) * (1 + D)]);
    int32_t which = i / kMapRows, part = parts;
    for (int d = D - 1; d >= 0; --d) {
      part -= across[d];
      key |= under.parts[part + which % across[d]][r];
      which /= across[d];
    }
    const int64_t slot = key == kNoKey ? -1 : map.find(key);
    under.masks[i / kMapRows][r] = slot < 0 ? 0 : blocks.masks[slot];
    under.rows[i / kMapRows][r] = slot < 0 ? 0 : blocks.rows[slot];
  }
}

template <int D>
__global__ void __launch_bounds__(kGridThreads, kMapBlocks) block_map_kernel(KernelMapArgs a, BlockTable blocks) {
  __shared__ TileMasks masks;
  __shared__ UnderWindows under;
  const Grid grid = cooperative_groups::this_grid();
  const int32_t in_rows = real_rows(a.in_count, a.in_rows), out_rows = real_rows(a.out_count, a.out_rows);
  const int64_t slots = hash_slots(in_rows);
  HashMap map(blocks.keys, slots);
  map.clear(global_thread(), grid_threads());
  for (int64_t slot = global_thread(); slot < slots; slot += grid_threads()) blocks.masks[slot] = 0;
  grid.sync();
  enter_blocks<D>(a, in_rows, map, blocks);
  grid.sync();

  int32_t across[D], dilation[D];
  const int most_under = blocks_under_window<D>(a.geometry, across);
  for (int d = 0; d < D; ++d) dilation[d] = static_cast<int32_t>(a.geometry.dilation[d]);
  const int32_t tiles = static_cast<int32_t>(div_up(out_rows, kMapRows));
  for (int32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int32_t first = tile * kMapRows;
    look_under<D>(a, first, out_rows, across, most_under, map, blocks, under);
    const Site<D> out(a.out_coords, min(first + own_row(), out_rows - 1));
    int32_t offset[D];
    for (int d = 0; d < D; ++d) offset[d] = window_axis<D>(a.geometry, d, out.coord[d]).offset;
    int32_t which_of_line = 0, site_of_line = 0;
    for (int32_t word = 0; word < a.mask_words; word += kMapWords) {
      write_tile<D>(
          a, first, out_rows, word, masks,
          [&](const int32_t (&tap)[D]) {
            which_of_line = site_of_line = 0;
            for (int d = 0; d < D - 1; ++d) {
              const int32_t at = offset[d] + dilation[d] * tap[d];
              which_of_line = which_of_line * across[d] + (at >> block_axis_bits(D, d));
              site_of_line |= bits_in_block<D>(d, at);
            }
            which_of_line *= across[D - 1];
          },
          [&](int32_t last) {
            const int32_t at = offset[D - 1] + dilation[D - 1] * last;
            const int32_t which = which_of_line + (at >> block_axis_bits(D, D - 1));
            const uint64_t bit = uint64_t{1} << (site_of_line | bits_in_block<D>(D - 1, at));
            const uint64_t mask = under.masks[which][own_row()];
            if ((mask & bit) == 0) return -1;
            const int32_t row = under.rows[which][own_row()] + __popcll(mask & (bit - 1));
            return row < in_rows ? row : -1;  // false only where the sites are not sorted after all
          });
      __syncthreads();
    }
  }
}

// --- reverse ---

constexpr int kThreads = 256;

__global__ void reverse_table_kernel(ReverseTableArgs a, int64_t entries) {
  const int64_t i = global_thread();
  if (i >= entries) return;
  const int32_t k = static_cast<int32_t>(i / a.out_rows.rows);
  const int32_t m = static_cast<int32_t>(i % a.out_rows.rows);
  if (!row_is_real(a.out_rows, m)) return;
  const int32_t row = a.table[i];
  if (row < 0 || row >= a.in_rows) return;
  a.reverse[static_cast<int64_t>(k) * a.in_rows + row] = m;
  atomicOr(&a.masks[static_cast<int64_t>(row) * a.mask_words + k / 32], 1u << (k % 32));
}

template <int D>
cudaError_t kernel_map_in(const KernelMapArgs& a, cudaStream_t stream) {
  Workspace workspace(a.workspace);
  const int64_t slots = hash_slots(a.in_rows);
  const int64_t rows = a.in_rows > a.out_rows ? a.in_rows : a.out_rows;
  int32_t across[D];
  if (a.builder == MapBuilder::kBlocks && blocks_under_window<D>(a.geometry, across) <= kMostUnderWindow) {
    const BlockTable blocks{workspace.take<uint64_t>(slots), workspace.take<uint64_t>(slots),
                            workspace.take<int32_t>(slots)};
    return launch_grid(block_map_kernel<D>, div_up(rows, kMapRows), stream, a, blocks);
  }
  const SiteTable sites{workspace.take<uint64_t>(slots), workspace.take<int32_t>(slots)};
  return launch_grid(hash_map_kernel<D>, div_up(rows, kMapRows), stream, a, sites);
}

}  // namespace

cudaError_t kernel_map(const KernelMapArgs& a, cudaStream_t stream) {
  return for_dims(a.geometry.dims, [&](auto dims) { return kernel_map_in<decltype(dims)::value>(a, stream); });
}

cudaError_t reverse_table(const ReverseTableArgs& a, cudaStream_t stream) {
  const size_t reverse_bytes = sizeof(int32_t) * a.taps * a.in_rows;
  const size_t mask_bytes = sizeof(uint32_t) * a.in_rows * a.mask_words;
  const int64_t entries = static_cast<int64_t>(a.taps) * a.out_rows.rows;
  JAXSPARSE_TRY(cudaMemsetAsync(a.reverse, 0xff, reverse_bytes, stream));  // -1
  JAXSPARSE_TRY(cudaMemsetAsync(a.masks, 0, mask_bytes, stream));
  return launch(reverse_table_kernel, div_up(entries, kThreads), kThreads, stream, a, entries);
}

}  // namespace jaxsparse::cuda
