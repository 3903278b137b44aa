// Builds the kernel map: one kernel looks up the taps of all outputs in an index of the input sites, see site_index.cu.
//
// The lower bound is one write of the table, 108 bytes per output of a 3^3 kernel: 10 MB for a scan. The look-up is bound by
// arithmetic (keys, places in blocks) and by chains of dependent reads from L2. The builders differ in how many keys they
// look up:
//
//     hash     one key per tap. Sites may have any order.
//     blocks   one key per block under the window: 3.4 on average for 3^3 taps over blocks of 4^3 sites, and there are a
//              third as many blocks as sites. A block's mask answers for all taps in it; the row of a site is the block's
//              first row plus the number of earlier sites in the block.
//
// Each lane has an output, so that table writes are whole lines. For small windows a thread looks up all taps of its output,
// by blocks, with some 30 instructions per tap in all; its stores leave L2 to the index (__stcs), and there are only as many
// thread blocks as are resident at once, both together 3 % of the look-up from 1 million sites on. For other windows the warps
// of a thread block share the taps of 32 outputs.
//
// On an H200, 3^3 map of a scan of 91,767 sites: 6.8 us to look up by blocks, 34 by hash; for 10,000 sites 4. What it takes to
// make the index stands in site_index.cu. Tried, not better, on the same scan unless said otherwise, mostly with an index of
// 32-byte slots that took 10 us to look up:
//     one cooperative kernel that clears, enters and looks up, with barriers of the grid in between: 6 us more
//     small windows treated like others, taps shared by four warps: 23 us to look up, five times the instructions
//     kernel 2, stride 2 by binary search in the sorted sites, no index: 18 us, 9 for 5,925 sites; by blocks, with the
//     index that the 3^3 map of the same sites needs anyway, 17 and 5
//     fewer thread blocks for small windows: 14 per multiprocessor 4 to 6 % more from 1 million sites on, 9 a fifth
//     eight blocks of the window looked up at once, not four: 7.1 us, and 2 % less for 4 million sites
//     half of the taps looked up, the rest mirrored: not built; blocks look up only a third of a key per tap
#include "cuda/coords/kernel_map.h"

#include <algorithm>

#include "cuda/coords/block_window.cuh"
#include "cuda/coords/site_index.cuh"

namespace jaxsparse::cuda {
namespace {

constexpr int kTileWarps = 3;  // warps of a thread block, which share the taps of its 32 outputs (a tile)
constexpr int kTileThreads = kTileWarps * kWarp;
constexpr int kTileWords = 16;  // mask words that a thread block handles at a time
constexpr int kAtOnce = 3;      // taps that a thread looks up together

// Division by a number known on the host, as a multiplication. Exact for 0 <= n < 2^16 and a size of at most 2^16.
struct Divisor {
  int32_t size;
  uint64_t inverse;

  Divisor() = default;
  explicit Divisor(int64_t by) : size(static_cast<int32_t>(by)), inverse(((uint64_t{1} << 32) + by - 1) / by) {}

  __device__ int32_t divide(int32_t n) const {
    return static_cast<int32_t>(static_cast<uint32_t>(n) * inverse >> 32);
  }
};

// The convolution kernel's size on each axis.
template <int D>
struct TapSizes {
  Divisor on[D];

  explicit TapSizes(const Geometry& g) {
    for (int d = 0; d < D; ++d) on[d] = Divisor(g.kernel[d]);
  }
};

// A tap as one coordinate per axis. The last axis is the fastest.
template <int D>
struct Tap {
  int32_t at[D];

  __device__ Tap(const TapSizes<D>& sizes, int32_t flat) {
#pragma unroll
    for (int d = D - 1; d >= 0; --d) {
      const int32_t rest = sizes.on[d].divide(flat);
      at[d] = flat - rest * sizes.on[d].size;
      flat = rest;
    }
  }

  // Advances by one on an axis, with carry to the axes before it.
  __device__ void next(const TapSizes<D>& sizes, int axis) {
#pragma unroll
    for (int d = D - 1; d >= 0; --d) {
      if (d > axis) continue;
      if (++at[d] < sizes.on[d].size) return;
      at[d] = 0;
    }
  }
};

// The work of a thread block: 32 outputs from `first` on, and `words` words of their masks from `word` on.
struct Piece {
  int32_t first, word, words;
};

// 32 bits, which divide much faster than 64, hold the number of pieces: fewer than 2^30 outputs are fewer than 2^25 tiles,
// and kernels below 2^16 taps have at most 128 pieces per tile.
__device__ uint32_t pieces_of(int32_t out_rows, int32_t mask_words) {
  return static_cast<uint32_t>(out_rows + kWarp - 1) / kWarp * ((mask_words + kTileWords - 1) / kTileWords);
}

__device__ Piece piece_of(uint32_t i, int32_t mask_words) {
  if (mask_words <= kTileWords) return {static_cast<int32_t>(i) * kWarp, 0, mask_words};
  const uint32_t pieces = static_cast<uint32_t>(mask_words + kTileWords - 1) / kTileWords;
  const int32_t word = static_cast<int32_t>(i % pieces) * kTileWords;
  return {static_cast<int32_t>(i / pieces) * kWarp, word, min(kTileWords, mask_words - word)};
}

using TileMasks = uint32_t[kTileWords][kWarp];

// Each warp clears every kTileWarps-th word.
__device__ void clear_masks(const Piece& piece, TileMasks& masks) {
  for (int w = threadIdx.x / kWarp; w < piece.words; w += kTileWarps) masks[w][threadIdx.x % kWarp] = 0;
}

// Writes table and masks of a tile of outputs, one per lane, for the piece's taps. A line is a set of taps that differ on
// the last axis only. begin_line(tap) starts a line; then find(rows, first, n) returns the input rows of its taps first ..
// first + n - 1, n <= kAtOnce. The masks must be zero, with a barrier since; afterwards they may be cleared without a
// barrier.
template <int D, typename BeginLine, typename Find>
__device__ void write_tile(const KernelMapArgs& a, const TapSizes<D>& sizes, const Piece& piece, int32_t out_rows,
                           TileMasks& masks, BeginLine begin_line, Find find) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int32_t output = piece.first + lane;
  const bool is_real = output < out_rows;
  const int32_t first_tap = piece.word * 32, taps = min(a.taps - first_tap, piece.words * 32);
  const int32_t end = taps * (warp + 1) / kTileWarps;
  int32_t k = taps * warp / kTileWarps;  // counted from the piece's first tap
  int32_t* entry = a.table + static_cast<int64_t>(first_tap + k) * a.out_rows + output;
  uint64_t mask = 0;  // bits of words `word` and `word` + 1
  int32_t word = k / 32;
  Tap<D> tap(sizes, first_tap + k);
  while (k < end) {
    begin_line(tap.at);
    const int32_t line_end = min(sizes.on[D - 1].size, tap.at[D - 1] + end - k);
    for (int32_t last = tap.at[D - 1]; last < line_end; last += kAtOnce) {
      const int32_t n = min(kAtOnce, line_end - last);
      int32_t rows[kAtOnce];
      find(rows, last, n);
      uint32_t found = 0;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (i < n) {
          if (is_real) *entry = rows[i];
          entry += a.out_rows;
          found |= static_cast<uint32_t>(rows[i] >= 0) << i;
        }
      }
      mask |= static_cast<uint64_t>(found) << (k - word * 32);
      k += n;
      if (k - word * 32 >= 32) {
        atomicOr(&masks[word++][lane], static_cast<uint32_t>(mask));
        mask >>= 32;
      }
    }
    tap.at[D - 1] = 0;
    tap.next(sizes, D - 2);
  }
  if (mask != 0) atomicOr(&masks[word][lane], static_cast<uint32_t>(mask));
  __syncthreads();
  for (int w = warp; w < piece.words; w += kTileWarps) {
    if (is_real) a.masks[static_cast<int64_t>(output) * a.mask_words + piece.word + w] = masks[w][lane];
  }
}

template <int D>
__global__ void __launch_bounds__(kTileThreads, 768 / kTileThreads) hash_kernel(KernelMapArgs a, TapSizes<D> sizes) {
  __shared__ TileMasks masks;
  const int32_t in_rows = real_rows(a.in_count, a.in_rows), out_rows = real_rows(a.out_count, a.out_rows);
  const HashMap<SiteSlot> map(static_cast<SiteSlot*>(a.index), SiteSlot::number(in_rows));
  const uint32_t pieces = pieces_of(out_rows, a.mask_words);
  for (uint32_t i = blockIdx.x; i < pieces; i += gridDim.x) {
    const Piece piece = piece_of(i, a.mask_words);
    clear_masks(piece, masks);
    const int32_t output = piece.first + static_cast<int32_t>(threadIdx.x % kWarp);
    const Site<D> out(a.out_coords, min(output, out_rows - 1));
    Key line = kNoKey;
    __syncthreads();
    write_tile<D>(
        a, sizes, piece, out_rows, masks,
        [&](const int32_t (&tap)[D]) {
          line = batch_part<D>(out.batch);
          for (int d = 0; d < D - 1; ++d) line |= axis_part<D>(d, a.geometry.fine(d, out.coord[d], tap[d]));
        },
        [&](int32_t (&rows)[kAtOnce], int32_t first, int32_t n) {
          Key keys[kAtOnce];
          bool wanted[kAtOnce], is_site[kAtOnce];
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            const int64_t coord = a.geometry.fine(D - 1, out.coord[D - 1], first + j);
            keys[j] = line | axis_part<D>(D - 1, coord);
            wanted[j] = j < n && keys[j] != kNoKey;
          }
          uint32_t slots[kAtOnce];
          map.find(keys, wanted, slots, is_site);
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) rows[j] = is_site[j] ? map[slots[j]].row : -1;
        });
  }
}

// For most layers: kernels of at most 32 taps, at most 3 on the last two axes, with windows over at most two blocks on each
// axis. A thread handles an output, without barriers. kLast: the kernel's size on the last axis.
constexpr int kSmallThreads = 64;

// From so many rows on, small windows have all thread blocks that fit: 14 per multiprocessor take 4 to 6 % more for 1 million
// sites. With fewer rows it is 14, since rows to spare then cost less: 400,000, of them 100,000 real, take 7.9 us where they
// took 8.7, and 100,000 take 7.7. An empty thread block costs nothing by itself, so it may be L1, of which the shared memory
// of more than 14 leaves less.
constexpr int32_t kManyRows = 1 << 19;

template <int D>
bool is_small(const Geometry& g) {
  int32_t across[D];
  bool small = blocks_under_window<D>(g, across) <= kMostUnderWindow && g.volume() <= 32;
  for (int d = 0; d < D; ++d) small = small && across[d] <= 2 && (d < D - 2 || g.kernel[d] <= 3);
  return small;
}

template <int D, int kLast>
__global__ void __launch_bounds__(kSmallThreads, (D < 4 ? 1152 : 640) / kSmallThreads)
    small_window_kernel(KernelMapArgs a, TapSizes<D> sizes, WindowShape<D> shape) {
  constexpr int kBlocks = 1 << D, kMostLines = 3;
  constexpr int kBlocksAtOnce = kBlocks < 4 ? kBlocks : 4;
  constexpr BlockNumbers<D> numbers;
  __shared__ HalfBlock halves[kSmallThreads / kWarp][2 * kBlocks][kWarp];
  HalfBlock* const under = &halves[threadIdx.x / kWarp][0][threadIdx.x % kWarp];
  int64_t output = global_thread();
  Site<D> site(a.out_coords, min(output, int64_t{a.out_rows} - 1));
  const BlockIndex index(a.index, a.in_rows);
  __syncwarp();  // keeps the compiler from moving these loads below the branches that wait for the counts
  const int32_t in_rows = real_rows(a.in_count, a.in_rows), out_rows = real_rows(a.out_count, a.out_rows);
  const int32_t lines = D > 1 ? sizes.on[D - 2 < 0 ? 0 : D - 2].size : 1;  // lines per plane
  while (output < out_rows) {
    const Window<D> window(shape, site);
#pragma unroll
    for (int first = 0; first < kBlocks; first += kBlocksAtOnce) {
      uint64_t keys[kBlocksAtOnce];
      bool wanted[kBlocksAtOnce], is_any = false;
#pragma unroll
      for (int j = 0; j < kBlocksAtOnce; ++j) {
        keys[j] = window.first_key;
        uint32_t exists = 1;
#pragma unroll
        for (int d = 0; d < D; ++d) {
          const int at = (first + j) >> (D - 1 - d) & 1;
          keys[j] += static_cast<uint64_t>(at) << numbers.shift[d];
          exists &= window.exists[d] >> at;
        }
        wanted[j] = (exists & 1) != 0;
        is_any |= wanted[j];
      }
      BlockIndex::Probe probes[kBlocksAtOnce] = {};
      BlockIndex::Block found[kBlocksAtOnce] = {};
      if (kLast == 3 || is_any) {  // windows of kLast < 3 seldom reach the last blocks
        index.probe(keys, wanted, probes);
        index.read(keys, probes, found);
      }
#pragma unroll
      for (int j = 0; j < kBlocksAtOnce; ++j) put_block(under, first + j, found[j].sites, probes[j].row);
    }
    const auto share = [&](int d, int32_t tap) {
      return place_share<D>(d, window.offset[d] + shape.dilation[d] * tap, 1 << (kBlockBits + D - 1 - d));
    };
    int32_t in_line[kLast], of_line[kMostLines];
#pragma unroll
    for (int i = 0; i < kLast; ++i) in_line[i] = share(D - 1, i);
#pragma unroll
    for (int i = 0; i < kMostLines; ++i) of_line[i] = D > 1 ? share(D > 1 ? D - 2 : 0, i) : 0;
    int32_t* entry = a.table + output;
    uint32_t mask = 0;
    int32_t k = 0;
    Tap<D> tap(sizes, 0);
#pragma unroll 1
    while (k < a.taps) {  // once per plane, the taps that differ on the last two axes only
      int32_t plane = 0;
#pragma unroll
      for (int d = 0; d < D - 2; ++d) plane += share(d, tap.at[d]);
#pragma unroll
      for (int line = 0; line < kMostLines; ++line) {
        if (line >= lines) break;
        uint32_t found = 0;
#pragma unroll
        for (int i = 0; i < kLast; ++i) {
          const int32_t row = row_at(under, plane + of_line[line] + in_line[i], in_rows);
          __stcs(entry + i * static_cast<int64_t>(a.out_rows), row);
          found |= static_cast<uint32_t>(row >= 0) << i;
        }
        mask |= found << k;
        k += kLast;
        entry += kLast * static_cast<int64_t>(a.out_rows);
      }
      tap.next(sizes, D - 3);
    }
    __stcs(a.masks + output, mask);
    output += all_threads();
    site = Site<D>(a.out_coords, min(output, int64_t{a.out_rows} - 1));
  }
}

template <int D>
__global__ void __launch_bounds__(kTileThreads, 1152 / kTileThreads)
    block_kernel(KernelMapArgs a, TapSizes<D> sizes, WindowShape<D> shape, BlocksUnder<D> blocks) {
  __shared__ TileMasks masks;
  __shared__ HalfBlock halves[2 * kMostUnderWindow][kWarp];
  const BlockIndex index(a.index, a.in_rows);
  const int32_t in_rows = real_rows(a.in_count, a.in_rows), out_rows = real_rows(a.out_count, a.out_rows);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  HalfBlock* const under = &halves[0][lane];
  const uint32_t pieces = pieces_of(out_rows, a.mask_words);
  for (uint32_t i = blockIdx.x; i < pieces; i += gridDim.x) {
    const Piece piece = piece_of(i, a.mask_words);
    const Window<D> window(shape, Site<D>(a.out_coords, min(piece.first + lane, out_rows - 1)));
    clear_masks(piece, masks);
    constexpr int kBlocksAtOnce = 3;
    for (int32_t first = warp * kBlocksAtOnce; first < blocks.number; first += kTileWarps * kBlocksAtOnce) {
      uint64_t keys[kBlocksAtOnce];
      bool wanted[kBlocksAtOnce];
      BlockIndex::Probe probes[kBlocksAtOnce];
#pragma unroll
      for (int j = 0; j < kBlocksAtOnce; ++j) {
        const auto& block = blocks.block[min(first + j, kMostUnderWindow - 1)];
        uint32_t exists = first + j < blocks.number;
#pragma unroll
        for (int d = 0; d < D; ++d) exists &= window.exists[d] >> block.at[d];
        wanted[j] = (exists & 1) != 0;
        keys[j] = window.first_key + block.step;
      }
      index.probe(keys, wanted, probes);
      BlockIndex::Block found[kBlocksAtOnce];
      index.read(keys, probes, found);
#pragma unroll
      for (int j = 0; j < kBlocksAtOnce; ++j) {
        if (first + j < blocks.number) put_block(under, first + j, found[j].sites, probes[j].row);
      }
    }
    __syncthreads();
    const auto share = [&](int d, int32_t tap) {
      return place_share<D>(d, window.offset[d] + shape.dilation[d] * tap, blocks.step[d]);
    };
    int32_t line = 0, first_place = -1, places[kAtOnce];  // shares of the other axes; of taps first_place .. on the last
    write_tile<D>(
        a, sizes, piece, out_rows, masks,
        [&](const int32_t (&tap)[D]) {
          line = 0;
          for (int d = 0; d < D - 1; ++d) line += share(d, tap[d]);
        },
        [&](int32_t (&rows)[kAtOnce], int32_t first, int32_t n) {
          if (first != first_place) {
            first_place = first;
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) places[j] = share(D - 1, first + j);
          }
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) rows[j] = j < n ? row_at(under, line + places[j], in_rows) : -1;
        });
  }
}

}  // namespace

cudaError_t kernel_map(const KernelMapArgs& a, cudaStream_t stream) {
  return for_dims(a.geometry.dims, [&](auto dims) {
    constexpr int D = decltype(dims)::value;
    const TapSizes<D> sizes(a.geometry);
    const int64_t tiles = striding_blocks(div_up(a.out_rows, kWarp) * div_up(a.mask_words, kTileWords), 1);
    switch (a.builder) {
      case MapBuilder::kHash:
        return launch(hash_kernel<D>, tiles, {kTileThreads}, stream, a, sizes);
      case MapBuilder::kBlocks: {
        const WindowShape<D> shape(a.geometry);
        if (!is_small<D>(a.geometry)) {
          return launch(block_kernel<D>, tiles, {kTileThreads}, stream, a, sizes, shape, BlocksUnder<D>(a.geometry));
        }
        constexpr void (*small[])(KernelMapArgs, TapSizes<D>, WindowShape<D>) = {
            small_window_kernel<D, 1>, small_window_kernel<D, 2>, small_window_kernel<D, 3>};
        const auto kernel = small[a.geometry.kernel[D - 1] - 1];
        int resident = 0;
        JAXSPARSE_TRY(blocks_at_once(kernel, {kSmallThreads}, INT32_MAX, &resident));
        const int64_t most = a.out_rows < kManyRows ? resident * 7 / 9 : resident;  // 14 or 18 per multiprocessor
        return launch(kernel, std::min(div_up(a.out_rows, kSmallThreads), most), {kSmallThreads}, stream, a, sizes, shape);
      }
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace jaxsparse::cuda
