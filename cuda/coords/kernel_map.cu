// One cooperative kernel a builder, in three phases: clear the hash map, enter the input sites, look taps up.
//
// The table is written once, 108 bytes an output of a 3^3 kernel, and that is the floor: 10 MB for a scan. Searches hit
// L2 and are bound by its latency and by address arithmetic, so the builders differ in how many they make:
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

constexpr int kMapWarps = kGridThreads / kWarp;
constexpr int kMapRows = 64;      // outputs a tile: two warps side by side, so that table writes are whole lines
constexpr int kMapWords = 16;     // mask words that a block of threads gathers at a time
constexpr int kTilesAcross = kMapRows / kWarp;

// Looks up taps 32 * word .. of kMapWords words for the tile of outputs at `first`, and writes table and masks.
// find(r, tap) is the input row under tap tap[D] of the tile's r-th output, or -1.
template <int D, typename Find>
__device__ void write_tile(const KernelMapArgs& a, int32_t first, int32_t rows, int32_t word, uint32_t (*masks)[kMapRows],
                           Find find) {
  for (int i = threadIdx.x; i < kMapWords * kMapRows; i += kGridThreads) masks[i / kMapRows][i % kMapRows] = 0;
  __syncthreads();
  const int warp = threadIdx.x / kWarp;
  const int r = threadIdx.x % kWarp + warp % kTilesAcross * kWarp;
  const int32_t end = min(a.taps, (word + kMapWords) * 32);
  if (first + r < rows) {
    for (int32_t k = word * 32 + warp / kTilesAcross; k < end; k += kMapWarps / kTilesAcross) {
      int32_t tap[D];
      int32_t rest = k;
      for (int d = D - 1; d >= 0; --d) {
        tap[d] = rest % static_cast<int32_t>(a.geometry.kernel[d]);
        rest /= static_cast<int32_t>(a.geometry.kernel[d]);
      }
      const int32_t row = find(r, tap);
      a.table[static_cast<int64_t>(k) * a.out_rows + first + r] = row;
      if (row >= 0) atomicOr(&masks[k / 32 - word][r], 1u << (k % 32));
    }
  }
  __syncthreads();
  const int32_t words = min(kMapWords, a.mask_words - word);
  for (int i = threadIdx.x; i < words * kMapRows; i += kGridThreads) {
    const int32_t m = first + i / words;
    if (m < rows) a.masks[static_cast<int64_t>(m) * a.mask_words + word + i % words] = masks[i % words][i / words];
  }
  __syncthreads();
}

// --- hash ---

struct SiteTable {
  uint64_t* keys;
  int32_t* rows;
};

template <int D>
__global__ void __launch_bounds__(kGridThreads, 2) hash_map_kernel(KernelMapArgs a, SiteTable sites) {
  __shared__ uint32_t masks[kMapWords][kMapRows];
  const Grid grid = cooperative_groups::this_grid();
  const int32_t in_rows = real_rows(a.in_count, a.in_rows), out_rows = real_rows(a.out_count, a.out_rows);
  const int64_t slots = hash_slots(in_rows);
  HashMap map(sites.keys, slots);
  map.clear(global_thread(), grid_threads());
  for (int64_t slot = global_thread(); slot < slots; slot += grid_threads()) sites.rows[slot] = -1;
  grid.sync();
  for (int64_t row = global_thread(); row < in_rows; row += grid_threads()) {
    const Key key = key_of_row<D>(a.in_coords + row * (1 + D));
    if (key == kNoKey) continue;
    const int64_t slot = map.insert_if_absent(key);
    // -1 is the largest unsigned number, so of equal sites the first row wins
    atomicMin(reinterpret_cast<unsigned*>(sites.rows + slot), static_cast<unsigned>(row));
  }
  grid.sync();
  const int64_t tiles = div_up(out_rows, kMapRows), pieces = div_up(a.mask_words, kMapWords);
  for (int64_t i = blockIdx.x; i < tiles * pieces; i += gridDim.x) {
    const int32_t first = static_cast<int32_t>(i / pieces) * kMapRows;
    const int32_t word = static_cast<int32_t>(i % pieces) * kMapWords;
    write_tile<D>(a, first, out_rows, word, masks, [&](int r, const int32_t (&tap)[D]) {
      const int32_t* out = a.out_coords + static_cast<int64_t>(first + r) * (1 + D);
      int64_t coord[D];
      for (int d = 0; d < D; ++d) coord[d] = a.geometry.fine(d, out[1 + d], tap[d]);
      const Key key = make_key<D>(out[0], coord);
      const int64_t slot = key == kNoKey ? -1 : map.find(key);
      return slot < 0 ? -1 : sites.rows[slot];
    });
  }
}

// --- blocks ---

struct BlockTable {
  uint64_t* keys;    // of a block: that of its first site
  uint64_t* masks;   // which of its 64 sites exist
  int32_t* rows;     // row of the first that does
};

template <int D>
__global__ void __launch_bounds__(kGridThreads, 2) block_map_kernel(KernelMapArgs a, BlockTable blocks) {
  __shared__ uint32_t masks[kMapWords][kMapRows];
  __shared__ uint64_t under_masks[kMostUnderWindow][kMapRows];  // of the blocks under each output's window
  __shared__ int32_t under_rows[kMostUnderWindow][kMapRows];
  const Grid grid = cooperative_groups::this_grid();
  const int32_t in_rows = real_rows(a.in_count, a.in_rows), out_rows = real_rows(a.out_count, a.out_rows);
  const int64_t slots = hash_slots(in_rows);
  HashMap map(blocks.keys, slots);
  map.clear(global_thread(), grid_threads());
  for (int64_t slot = global_thread(); slot < slots; slot += grid_threads()) blocks.masks[slot] = 0;
  grid.sync();

  // Sorted sites: the lanes of a warp that hold one block's are neighbours, and enter their bits together.
  const int lane = threadIdx.x % kWarp;
  for (int64_t begin = global_thread() - lane; begin < in_rows; begin += grid_threads()) {
    const int64_t row = begin + lane;
    const Key key = row < in_rows ? key_of_row<D>(a.in_coords + row * (1 + D)) : kNoKey;
    const Key block = key | kInBlock;
    uint64_t bits = key == kNoKey ? 0 : uint64_t{1} << (key & kInBlock);
    for (int step = 1; step < kWarp; step *= 2) {
      const uint64_t above = __shfl_down_sync(kAllLanes, bits, step);
      const Key block_above = __shfl_down_sync(kAllLanes, block, step);
      if (lane + step < kWarp && block_above == block) bits |= above;
    }
    const Key block_below = __shfl_up_sync(kAllLanes, block, 1);
    if (key == kNoKey || (lane > 0 && block_below == block)) continue;
    const int64_t slot = map.insert_if_absent(key & ~kInBlock);
    atomicOr(reinterpret_cast<unsigned long long*>(blocks.masks + slot), static_cast<unsigned long long>(bits));
    const bool is_first = row == 0 || (key_of_row<D>(a.in_coords + (row - 1) * (1 + D)) | kInBlock) != block;
    if (is_first) blocks.rows[slot] = static_cast<int32_t>(row);
  }
  grid.sync();

  int32_t across[D];
  const int most_under = blocks_under_window<D>(a.geometry, across);
  const int32_t tiles = static_cast<int32_t>(div_up(out_rows, kMapRows));
  for (int32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int32_t first = tile * kMapRows;
    for (int i = threadIdx.x; i < most_under * kMapRows; i += kGridThreads) {
      const int r = i % kMapRows;
      int32_t which = i / kMapRows;
      if (first + r >= out_rows) continue;
      const int32_t* out = a.out_coords + static_cast<int64_t>(first + r) * (1 + D);
      int64_t coord[D];
      bool is_under = true;
      for (int d = D - 1; d >= 0; --d) {
        const WindowAxis window = window_axis<D>(a.geometry, d, out[1 + d]);
        const int32_t block = which % across[d];
        which /= across[d];
        is_under = is_under && block < window.blocks;
        coord[d] = window.first_site<D>(d, block);
      }
      const Key key = is_under ? make_key<D>(out[0], coord) : kNoKey;
      const int64_t slot = key == kNoKey ? -1 : map.find(key);
      under_masks[i / kMapRows][r] = slot < 0 ? 0 : blocks.masks[slot];
      under_rows[i / kMapRows][r] = slot < 0 ? 0 : blocks.rows[slot];
    }
    for (int32_t word = 0; word < a.mask_words; word += kMapWords) {
      int32_t offset[D];  // of the thread's output, which is the same for every tap
      const int own = threadIdx.x % kWarp + threadIdx.x / kWarp % kTilesAcross * kWarp;
      if (first + own < out_rows) {
        const int32_t* out = a.out_coords + static_cast<int64_t>(first + own) * (1 + D);
        for (int d = 0; d < D; ++d) offset[d] = window_axis<D>(a.geometry, d, out[1 + d]).offset;
      }
      write_tile<D>(a, first, out_rows, word, masks, [&](int r, const int32_t (&tap)[D]) {
        int32_t which = 0;
        uint64_t site = 0;
        for (int d = 0; d < D; ++d) {
          const int32_t at = offset[d] + static_cast<int32_t>(a.geometry.dilation[d]) * tap[d];
          which = which * across[d] + (at >> block_axis_bits(D, d));
          site |= bits_in_block<D>(d, at);
        }
        const uint64_t mask = under_masks[which][r], bit = uint64_t{1} << site;
        const int32_t row = mask & bit ? under_rows[which][r] + __popcll(mask & (bit - 1)) : -1;
        return row < in_rows ? row : -1;  // false only where the sites are not sorted after all
      });
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
