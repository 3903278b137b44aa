// site_index clears a hash map and enters the input sites, in two kernels; kernel_map looks taps up, in one.
//
// The table is written once, 108 bytes an output of a 3^3 kernel, and that is the floor: 10 MB for a scan. What bounds the
// look-up is the arithmetic of keys, some 60 instructions each, and chains of dependent reads from L2, so the builders
// differ in how many keys they look up:
//
//     hash     one a tap. Sites may have any order.
//     blocks   one a block under the window: 3.4 on average for 3^3 taps over blocks of 4^3 sites, where the hash map
//              has a third of the entries. A block's mask then answers for all taps in it, and the number of its sites
//              before one says which row that is.
//
// A block of threads has 32 outputs, a lane each; its warps share their taps, so that the chain of an output is short and
// table writes are whole lines.
//
// Tried and left, on an H200, 3^3 map of a scan of 91,767 sites unless said otherwise:
//     one cooperative kernel that clears, enters and looks up, with barriers of the grid in between: 38 us (now 32)
//     one warp for all taps of 32 outputs: 30 us, but 17 for 5,925 sites (now 10), the latency of its instructions
//     kernel 2, stride 2 by binary search in the sorted sites, no index: 18 us, 9 for 5,925 sites; by blocks, with the
//     index that the 3^3 map of the same sites needs anyway, 17 and 5
//     half of the taps looked up and mirrored: not built; blocks look up a third of a key a tap as it is
#include "cuda/coords/kernel_map.h"

#include "cuda/common/device.cuh"
#include "cuda/coords/window.h"
#include "cuda/hash/hash_map.cuh"

namespace jaxsparse::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTileWarps = 4;  // they share the taps of the tile's outputs
constexpr int kTileThreads = kTileWarps * kWarp;
constexpr int kTileWords = 16;  // mask words that a block of threads has at a time
constexpr int kAtOnce = 4;      // taps that a thread looks up together

template <int D>
__device__ Key key_of(const Site<D>& site) {
  int64_t coord[D];
  for (int d = 0; d < D; ++d) coord[d] = site.coord[d];
  return make_key<D>(site.batch, coord);
}

// Slots of an index: what a key stands for.
struct alignas(16) SiteSlot {
  uint64_t key;
  int32_t row;
  int32_t unused;

  static __device__ SiteSlot empty() { return {kNoKey, -1, 0}; }
  static __host__ __device__ int64_t number(int32_t rows) { return hash_slots(rows); }
};
struct alignas(32) BlockSlot {
  uint64_t key;   // that of the block's first site
  uint64_t mask;  // which of its 64 sites exist
  int32_t row;    // of the first that does
  int32_t unused[3];

  static __device__ BlockSlot empty() { return {kNoKey, 0, 0, {}}; }
  // There are far fewer blocks than sites, so the map may be small; were each site alone in its block it would still
  // leave a fifth empty.
  static __host__ __device__ int64_t number(int32_t rows) { return hash_slots(int64_t{5} * rows / 8 + 1); }
};

template <typename Slot>
__global__ void clear_kernel(SiteIndexArgs a, Slot* index) {
  const int64_t slots = Slot::number(real_rows(a.count, a.rows));
  for (int64_t slot = global_thread(); slot < slots; slot += all_threads()) index[slot] = Slot::empty();
}

template <int D>
__global__ void enter_kernel(SiteIndexArgs a, SiteSlot* index) {
  const int32_t rows = real_rows(a.count, a.rows);
  HashMap<SiteSlot> map(index, SiteSlot::number(rows));
  for (int64_t row = global_thread(); row < rows; row += all_threads()) {
    const Key key = key_of(Site<D>(a.coords, row));
    if (key == kNoKey) continue;
    // -1 is the largest unsigned number, so of equal sites the first row wins
    atomicMin(reinterpret_cast<unsigned*>(&map.insert_if_absent(key)->row), static_cast<unsigned>(row));
  }
}

// Sorted sites: the lanes of a warp that hold one block's are neighbours, and enter their bits together.
template <int D>
__global__ void enter_kernel(SiteIndexArgs a, BlockSlot* index) {
  const int32_t rows = real_rows(a.count, a.rows);
  HashMap<BlockSlot> map(index, BlockSlot::number(rows));
  const int lane = threadIdx.x % kWarp;
  for (int64_t begin = global_thread() - lane; begin < rows; begin += all_threads()) {
    const int64_t row = begin + lane;
    const Key key = row < rows ? key_of(Site<D>(a.coords, row)) : kNoKey;
    const Key block = key | kInBlock;
    Key block_below = __shfl_up_sync(kAllLanes, block, 1);
    if (lane == 0) block_below = row > 0 ? key_of(Site<D>(a.coords, row - 1)) | kInBlock : kNoKey;
    const bool leads = lane == 0 || block_below != block;
    const uint64_t bits = or_of_run(key == kNoKey ? 0 : uint64_t{1} << (key & kInBlock), leads);
    if (key == kNoKey || !leads) continue;
    BlockSlot* const slot = map.insert_if_absent(key & ~kInBlock);
    atomicOr(reinterpret_cast<unsigned long long*>(&slot->mask), static_cast<unsigned long long>(bits));
    if (block_below != block) slot->row = static_cast<int32_t>(row);
  }
}

// A number in a mixed radix, a digit an axis: a tap, or a block under the window. The last axis is the fastest.
template <int D>
struct Odometer {
  int32_t at[D];

  __device__ Odometer(const int32_t (&sizes)[D], int32_t flat) {
    for (int d = D - 1; d >= 0; --d) {
      at[d] = flat % sizes[d];
      flat /= sizes[d];
    }
  }

  // Adds one at an axis.
  __device__ void next(const int32_t (&sizes)[D], int axis) {
    for (int d = axis; d >= 0; --d) {
      if (++at[d] < sizes[d]) return;
      at[d] = 0;
    }
  }
};

// Which outputs and which words of their masks a block of threads has.
struct Piece {
  int32_t first, word, words;
};

// 32 bits hold the number of pieces, and divide much faster than 64: outputs are below 2^30, so tiles below 2^25, and
// kernels below 2^16 taps have 128 pieces a tile at most.
__device__ uint32_t pieces_of(int32_t out_rows, int32_t mask_words) {
  return static_cast<uint32_t>(out_rows + kWarp - 1) / kWarp * ((mask_words + kTileWords - 1) / kTileWords);
}

__device__ Piece piece_of(uint32_t i, int32_t mask_words) {
  const uint32_t pieces = static_cast<uint32_t>(mask_words + kTileWords - 1) / kTileWords;
  const int32_t word = static_cast<int32_t>(i % pieces) * kTileWords;
  return {static_cast<int32_t>(i / pieces) * kWarp, word, min(kTileWords, mask_words - word)};
}

using TileMasks = uint32_t[kTileWords][kWarp];

// Writes table and masks of a tile of outputs for the piece's taps, a lane an output. A line is the taps that differ on the
// last axis alone: begin_line(tap) is told its others, then find(rows, first, n) says the input rows under n <= kAtOnce of
// its taps. The masks must be zero, and a barrier must have passed since.
template <int D, typename BeginLine, typename Find>
__device__ void write_tile(const KernelMapArgs& a, const Piece& piece, int32_t out_rows, TileMasks& masks,
                           BeginLine begin_line, Find find) {
  int32_t sizes[D];
  for (int d = 0; d < D; ++d) sizes[d] = static_cast<int32_t>(a.geometry.kernel[d]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int32_t output = piece.first + lane;
  const bool is_real = output < out_rows;
  const int32_t first_tap = piece.word * 32, taps = min(a.taps - first_tap, piece.words * 32);
  const int32_t end = taps * (warp + 1) / kTileWarps;
  int32_t k = taps * warp / kTileWarps;  // counted from the piece's first tap
  int32_t* entry = a.table + static_cast<int64_t>(first_tap + k) * a.out_rows + output;
  uint64_t mask = 0;  // of words `word` and the next
  int32_t word = k / 32;
  Odometer<D> tap(sizes, first_tap + k);
  while (k < end) {
    begin_line(tap.at);
    const int32_t line_end = min(sizes[D - 1], tap.at[D - 1] + end - k);
    for (int32_t last = tap.at[D - 1]; last < line_end; last += kAtOnce) {
      const int32_t n = min(kAtOnce, line_end - last);
      int32_t rows[kAtOnce];
      find(rows, last, n);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (i < n) {
          if (is_real) entry[i * static_cast<int64_t>(a.out_rows)] = rows[i];
          mask |= static_cast<uint64_t>(rows[i] >= 0) << (k - word * 32 + i);
        }
      }
      entry += n * static_cast<int64_t>(a.out_rows);
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
  for (int i = threadIdx.x; i < piece.words * kWarp; i += kTileThreads) {
    const int32_t m = piece.first + i / piece.words, w = i % piece.words;
    if (m < out_rows) a.masks[static_cast<int64_t>(m) * a.mask_words + piece.word + w] = masks[w][i / piece.words];
  }
}

__device__ void clear_masks(const Piece& piece, TileMasks& masks) {
  for (int i = threadIdx.x; i < piece.words * kWarp; i += kTileThreads) masks[i / kWarp][i % kWarp] = 0;
}

template <int D>
__global__ void __launch_bounds__(kTileThreads, 768 / kTileThreads) hash_kernel(KernelMapArgs a, SiteSlot* index) {
  __shared__ TileMasks masks;
  const int32_t in_rows = real_rows(a.in_count, a.in_rows), out_rows = real_rows(a.out_count, a.out_rows);
  const HashMap<SiteSlot> map(index, SiteSlot::number(in_rows));
  const uint32_t pieces = pieces_of(out_rows, a.mask_words);
  for (uint32_t i = blockIdx.x; i < pieces; i += gridDim.x) {
    const Piece piece = piece_of(i, a.mask_words);
    clear_masks(piece, masks);
    const int32_t output = piece.first + static_cast<int32_t>(threadIdx.x % kWarp);
    const Site<D> out(a.out_coords, min(output, out_rows - 1));
    Key line = kNoKey;
    __syncthreads();
    write_tile<D>(
        a, piece, out_rows, masks,
        [&](const int32_t (&tap)[D]) {
          line = batch_part<D>(out.batch);
          for (int d = 0; d < D - 1; ++d) line |= axis_part<D>(d, a.geometry.fine(d, out.coord[d], tap[d]));
        },
        [&](int32_t (&rows)[kAtOnce], int32_t first, int32_t n) {
          Key keys[kAtOnce];
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            const int64_t coord = a.geometry.fine(D - 1, out.coord[D - 1], first + j);
            keys[j] = j < n ? line | axis_part<D>(D - 1, coord) : kNoKey;
          }
          SiteSlot found[kAtOnce];
          map.find(keys, found);
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) rows[j] = found[j].key == kNoKey ? -1 : found[j].row;
        });
    __syncthreads();
  }
}

constexpr int kMostParts = kMostUnderWindow + 2;  // no more is the sum of numbers, one an axis, with a product of 27

// For each of a tile's outputs: the parts of the keys of the blocks under the window, an axis after the other, and those
// blocks in halves of 32 sites: which of them exist, and the row of the first that does.
struct UnderWindows {
  Key parts[kMostParts][kWarp];
  uint32_t masks[2 * kMostUnderWindow][kWarp];
  int32_t rows[2 * kMostUnderWindow][kWarp];
};

// What of a geometry is the same for all outputs.
template <int D>
struct WindowShape {
  int32_t across[D];      // blocks under a window on each axis, at most
  int32_t blocks;         // in all
  int32_t block_step[D];  // what a block more on an axis adds to a site's number under the window, see place()
  int32_t dilation[D];

  explicit WindowShape(const Geometry& g) {
    blocks = blocks_under_window<D>(g, across);
    for (int d = D - 1, step = 1 << kBlockBits; d >= 0; step *= across[d--]) block_step[d] = step;
    for (int d = 0; d < D; ++d) dilation[d] = static_cast<int32_t>(g.dilation[d]);
  }

  // The share of a coordinate on one axis in a site's number under the window: 64 times the number of its block, plus its
  // last key bits. The axes' shares add up.
  __device__ int32_t place(int d, int32_t at) const {
    return (at >> block_axis_bits(D, d)) * block_step[d] + bits_in_block<D>(d, at);
  }
};

// Finds the blocks under the windows of the tile's outputs.
template <int D>
__device__ void look_under(const KernelMapArgs& a, int32_t first, int32_t out_rows, const WindowShape<D>& shape,
                           const HashMap<BlockSlot>& map, UnderWindows& under) {
  const int32_t(&across)[D] = shape.across;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Site<D> out(a.out_coords, min(first + lane, out_rows - 1));
  int first_part = 0;
  for (int d = 0; d < D; ++d) {
    for (int block = (warp + kTileWarps - first_part % kTileWarps) % kTileWarps; block < across[d]; block += kTileWarps) {
      const WindowAxis window = window_axis<D>(a.geometry, d, out.coord[d]);
      const bool is_under = block < window.blocks;
      under.parts[first_part + block][lane] = is_under ? axis_part<D>(d, window.first_site<D>(d, block)) : kNoKey;
    }
    first_part += across[d];
  }
  const Key batch = batch_part<D>(out.batch);
  __syncthreads();
  constexpr int kBlocks = 8 / kTileWarps;  // looked up together
  for (int u = warp * kBlocks; u < shape.blocks; u += kTileWarps * kBlocks) {
    Key keys[kBlocks];
    BlockSlot found[kBlocks];
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      keys[j] = batch;
      int32_t rest = u + j, part = first_part;
      for (int d = D - 1; d >= 0; --d) {
        part -= across[d];
        keys[j] |= under.parts[part + rest % across[d]][lane];
        rest /= across[d];
      }
      if (u + j >= shape.blocks) keys[j] = kNoKey;
    }
    map.find(keys, found);
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      if (u + j >= shape.blocks) break;
      const uint64_t mask = found[j].key == kNoKey ? 0 : found[j].mask;
      const uint32_t low = static_cast<uint32_t>(mask), high = static_cast<uint32_t>(mask >> 32);
      under.masks[2 * (u + j)][lane] = low;
      under.masks[2 * (u + j) + 1][lane] = high;
      under.rows[2 * (u + j)][lane] = found[j].row;
      under.rows[2 * (u + j) + 1][lane] = found[j].row + __popc(low);
    }
  }
}

template <int D>
__global__ void __launch_bounds__(kTileThreads, 1024 / kTileThreads)
    block_kernel(KernelMapArgs a, WindowShape<D> shape, BlockSlot* index) {
  __shared__ TileMasks masks;
  __shared__ UnderWindows under;
  const int32_t in_rows = real_rows(a.in_count, a.in_rows), out_rows = real_rows(a.out_count, a.out_rows);
  const HashMap<BlockSlot> map(index, BlockSlot::number(in_rows));
  const int lane = threadIdx.x % kWarp;
  const uint32_t pieces = pieces_of(out_rows, a.mask_words);
  for (uint32_t i = blockIdx.x; i < pieces; i += gridDim.x) {
    const Piece piece = piece_of(i, a.mask_words);
    clear_masks(piece, masks);
    look_under<D>(a, piece.first, out_rows, shape, map, under);
    const Site<D> out(a.out_coords, min(piece.first + lane, out_rows - 1));
    int32_t offset[D];
    for (int d = 0; d < D; ++d) offset[d] = window_offset<D>(a.geometry, d, out.coord[d]);
    __syncthreads();
    int32_t line = 0, first_place = -1, places[kAtOnce];  // of the line's others, and of taps first_place .. on the last
    write_tile<D>(
        a, piece, out_rows, masks,
        [&](const int32_t (&tap)[D]) {
          line = 0;
          for (int d = 0; d < D - 1; ++d) line += shape.place(d, offset[d] + shape.dilation[d] * tap[d]);
        },
        [&](int32_t (&rows)[kAtOnce], int32_t first, int32_t n) {
          if (first != first_place) {
            first_place = first;
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
              places[j] = shape.place(D - 1, offset[D - 1] + shape.dilation[D - 1] * (first + j));
            }
          }
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            const int32_t half = (line + places[j]) / 32, site = (line + places[j]) % 32;
            const uint32_t mask = j < n ? under.masks[half][lane] : 0;
            rows[j] = -1;
            if ((mask >> site & 1) != 0) {
              const int32_t row = under.rows[half][lane] + __popc(mask & ((1u << site) - 1));
              if (row < in_rows) rows[j] = row;  // false only where the sites are not sorted after all
            }
          }
        });
    __syncthreads();
  }
}

// --- reverse ---

// On an H200, 3^3 stride 2 map of 128,053 outputs and 375,575 pairs: 9.8 us and 1.0 to clear the masks; one entry a thread,
// found by a 64-bit division, took 18.8, and 4.8 to clear masks and table.
constexpr int kReversedAtOnce = 4;  // outputs that a thread looks at under one tap
constexpr int kReverseTile = kReversedAtOnce * kThreads;

__global__ void reverse_table_kernel(ReverseTableArgs a) {
  const uint32_t tiles = static_cast<uint32_t>(div_up(a.out_rows.rows, kReverseTile));
  const int32_t k = static_cast<int32_t>(blockIdx.x / tiles);
  const int32_t first = static_cast<int32_t>(blockIdx.x % tiles) * kReverseTile + static_cast<int32_t>(threadIdx.x);
  int32_t rows[kReversedAtOnce];
#pragma unroll
  for (int i = 0; i < kReversedAtOnce; ++i) {
    const int32_t m = first + i * kThreads;
    rows[i] = row_is_real(a.out_rows, m) ? a.table[static_cast<int64_t>(k) * a.out_rows.rows + m] : -1;
  }
#pragma unroll
  for (int i = 0; i < kReversedAtOnce; ++i) {
    if (rows[i] < 0 || rows[i] >= a.in_rows) continue;
    a.reverse[static_cast<int64_t>(k) * a.in_rows + rows[i]] = first + i * kThreads;
    atomicOr(&a.masks[static_cast<int64_t>(rows[i]) * a.mask_words + k / 32], 1u << (k % 32));
  }
}

template <int D, typename Slot>
cudaError_t enter_sites(const SiteIndexArgs& a, cudaStream_t stream) {
  void (*const enter)(SiteIndexArgs, Slot*) = enter_kernel<D>;
  Slot* const index = static_cast<Slot*>(a.index);
  JAXSPARSE_TRY(launch(clear_kernel<Slot>, striding_blocks(Slot::number(a.rows), kThreads), {kThreads}, stream, a, index));
  return launch(enter, striding_blocks(a.rows, kThreads), {kThreads}, stream, a, index);
}

}  // namespace

cudaError_t site_index(const SiteIndexArgs& a, cudaStream_t stream) {
  return for_dims(a.dims, [&](auto dims) {
    constexpr int D = decltype(dims)::value;
    return a.of_blocks ? enter_sites<D, BlockSlot>(a, stream) : enter_sites<D, SiteSlot>(a, stream);
  });
}

cudaError_t kernel_map(const KernelMapArgs& a, cudaStream_t stream) {
  return for_dims(a.geometry.dims, [&](auto dims) {
    constexpr int D = decltype(dims)::value;
    void* const index = const_cast<void*>(a.index);
    const int64_t tiles = striding_blocks(div_up(a.out_rows, kWarp) * div_up(a.mask_words, kTileWords), 1);
    switch (a.builder) {
      case MapBuilder::kHash:
        return launch(hash_kernel<D>, tiles, {kTileThreads}, stream, a, static_cast<SiteSlot*>(index));
      case MapBuilder::kBlocks:
        return launch(block_kernel<D>, tiles, {kTileThreads}, stream, a, WindowShape<D>(a.geometry),
                      static_cast<BlockSlot*>(index));
    }
    return cudaErrorInvalidValue;
  });
}

cudaError_t reverse_table(const ReverseTableArgs& a, cudaStream_t stream) {
  const size_t mask_bytes = sizeof(uint32_t) * a.in_rows * a.mask_words;
  JAXSPARSE_TRY(cudaMemsetAsync(a.masks, 0, mask_bytes, stream));
  const int64_t blocks = a.taps * div_up(a.out_rows.rows, kReverseTile);
  return blocks > 0 ? launch(reverse_table_kernel, blocks, {kThreads}, stream, a) : cudaSuccess;
}

}  // namespace jaxsparse::cuda
