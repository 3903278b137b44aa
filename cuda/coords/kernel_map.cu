// Three kernels a map: clear a hash map, enter the input sites, look taps up.
//
// The table is written once, 108 bytes an output of a 3^3 kernel, and that is the floor: 10 MB for a scan. What bounds the
// look-up is the arithmetic of keys, some 60 instructions each, and the latency of L2, so the builders differ in how
// many keys they look up:
//
//     hash     one a tap. Sites may have any order.
//     blocks   one a block under the window: 3.4 on average for 3^3 taps over blocks of 4^3 sites, where the hash map
//              has a third of the entries. A block's mask then answers for all taps in it, and the number of its sites
//              before one says which row that is.
//
// A warp has 32 outputs, a lane each, and walks their taps together: table writes are whole lines, masks stay in a
// register, and nothing waits for another warp. Tried before: one cooperative kernel with barriers of the grid in between,
// a block of threads for 64 outputs: 38 us for a scan where this takes TIME; every warp repeated what an output needs once.
#include "cuda/coords/kernel_map.h"

#include "cuda/common/device.cuh"
#include "cuda/coords/window.h"
#include "cuda/hash/hash_map.cuh"

namespace jaxsparse::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMapWarps = 2;  // a block of the look-up; their shared memory must fit 48 KiB
constexpr int kMapThreads = kMapWarps * kWarp;
constexpr int kAtOnce = 4;  // keys that a thread looks up together

__device__ int32_t real_rows(const int32_t* count, int32_t rows) {
  return count[0] < 0 ? 0 : count[0] < rows ? count[0] : rows;
}

template <int D>
__device__ Key key_of(const Site<D>& site) {
  int64_t coord[D];
  for (int d = 0; d < D; ++d) coord[d] = site.coord[d];
  return make_key<D>(site.batch, coord);
}

// What the hash map's keys stand for: a site's row, or a block of sites.
struct SiteTable {
  uint64_t* keys;
  int32_t* rows;
};
struct alignas(16) SiteBlock {
  uint64_t mask;  // which of its 64 sites exist
  int32_t row;    // of the first that does
};
struct BlockTable {
  uint64_t* keys;  // of a block: that of its first site
  SiteBlock* blocks;
};

__device__ void clear(const SiteTable& sites, int64_t slot) {
  sites.keys[slot] = kNoKey;
  sites.rows[slot] = -1;
}
__device__ void clear(const BlockTable& table, int64_t slot) {
  table.keys[slot] = kNoKey;
  table.blocks[slot] = {0, 0};
}

// Slots for so many sites. There are far fewer blocks, so a table of them may be small; were each site alone in its block
// it would still leave a fifth empty.
__host__ __device__ int64_t slots_for(const SiteTable&, int32_t in_rows) { return hash_slots(in_rows); }
__host__ __device__ int64_t slots_for(const BlockTable&, int32_t in_rows) {
  return hash_slots(int64_t{5} * in_rows / 8 + 1);
}

template <typename Table>
__global__ void clear_kernel(KernelMapArgs a, Table table) {
  const int64_t slots = slots_for(table, real_rows(a.in_count, a.in_rows));
  for (int64_t slot = global_thread(); slot < slots; slot += all_threads()) clear(table, slot);
}

template <int D>
__global__ void enter_kernel(KernelMapArgs a, SiteTable sites) {
  const int32_t in_rows = real_rows(a.in_count, a.in_rows);
  HashMap map(sites.keys, slots_for(sites, in_rows));
  for (int64_t row = global_thread(); row < in_rows; row += all_threads()) {
    const Key key = key_of(Site<D>(a.in_coords, row));
    if (key == kNoKey) continue;
    const int32_t slot = map.insert_if_absent(key);
    // -1 is the largest unsigned number, so of equal sites the first row wins
    atomicMin(reinterpret_cast<unsigned*>(sites.rows + slot), static_cast<unsigned>(row));
  }
}

// Sorted sites: the lanes of a warp that hold one block's are neighbours, and enter their bits together.
template <int D>
__global__ void enter_kernel(KernelMapArgs a, BlockTable table) {
  const int32_t in_rows = real_rows(a.in_count, a.in_rows);
  HashMap map(table.keys, slots_for(table, in_rows));
  const int lane = threadIdx.x % kWarp;
  for (int64_t begin = global_thread() - lane; begin < in_rows; begin += all_threads()) {
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
    SiteBlock* const entry = table.blocks + map.insert_if_absent(key & ~kInBlock);
    atomicOr(reinterpret_cast<unsigned long long*>(&entry->mask), static_cast<unsigned long long>(bits));
    if (lane == 0 && row > 0) block_below = key_of(Site<D>(a.in_coords, row - 1)) | kInBlock;
    if (row == 0 || block_below != block) entry->row = static_cast<int32_t>(row);
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

// Which outputs and which words of their masks a warp has: as many words at a time as leave work for every warp.
struct Piece {
  int32_t first, word, words;
};

__device__ Piece piece_of(int64_t i, int32_t words_each, int32_t mask_words) {
  const int32_t pieces = static_cast<int32_t>(div_up(mask_words, words_each));
  const int32_t word = static_cast<int32_t>(i % pieces) * words_each;
  return {static_cast<int32_t>(i / pieces) * kWarp, word, min(words_each, mask_words - word)};
}

__device__ int32_t words_each(int64_t tiles, int32_t mask_words) {
  const int64_t words = tiles * mask_words / 4096;
  return static_cast<int32_t>(words < 1 ? 1 : words < mask_words ? words : mask_words);
}

// Writes table and masks of an output for the piece's taps. A line is the taps that differ on the last axis alone:
// begin_line(tap) is told its others, then find(rows, first, n) says the input rows under n <= kAtOnce of its taps.
template <int D, typename BeginLine, typename Find>
__device__ void write_output(const KernelMapArgs& a, const Piece& piece, int32_t output, bool is_real,
                             BeginLine begin_line, Find find) {
  int32_t sizes[D];
  for (int d = 0; d < D; ++d) sizes[d] = static_cast<int32_t>(a.geometry.kernel[d]);
  const int32_t end = min(a.taps, (piece.word + piece.words) * 32);
  int32_t* entry = a.table + static_cast<int64_t>(piece.word) * 32 * a.out_rows + output;
  uint32_t* masks = a.masks + static_cast<int64_t>(output) * a.mask_words;
  uint64_t mask = 0;  // of words `word` and the next
  int32_t word = piece.word;
  int32_t k = piece.word * 32;
  Odometer<D> tap(sizes, k);
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
        if (is_real) masks[word] = static_cast<uint32_t>(mask);
        mask >>= 32;
        ++word;
      }
    }
    tap.at[D - 1] = 0;
    tap.next(sizes, D - 2);
  }
  if (is_real && k > word * 32) masks[word] = static_cast<uint32_t>(mask);
}

template <int D>
__global__ void __launch_bounds__(kMapThreads, 12) look_up_kernel(KernelMapArgs a, SiteTable sites) {
  const int32_t in_rows = real_rows(a.in_count, a.in_rows), out_rows = real_rows(a.out_count, a.out_rows);
  const HashMap map(sites.keys, slots_for(sites, in_rows));
  const int64_t tiles = div_up(out_rows, kWarp);
  const int32_t each = words_each(tiles, a.mask_words);
  for (int64_t i = global_thread() / kWarp; i < tiles * div_up(a.mask_words, each); i += all_threads() / kWarp) {
    const Piece piece = piece_of(i, each, a.mask_words);
    const int32_t output = piece.first + static_cast<int32_t>(threadIdx.x % kWarp);
    const bool is_real = output < out_rows;
    const Site<D> out(a.out_coords, is_real ? output : out_rows - 1);
    Key line = kNoKey;
    write_output<D>(
        a, piece, output, is_real,
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
          map.find(keys, rows);
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) rows[j] = rows[j] < 0 ? -1 : sites.rows[rows[j]];
        });
  }
}

// A warp's shared memory: for each of its outputs the parts of the keys of the blocks under the window, an axis after the
// other, and the blocks, in halves of 32 sites: which of them exist, and the row of the first that does.
__host__ __device__ constexpr int64_t under_bytes(int parts, int blocks) {
  return kWarp * (int64_t{8} * parts + 16 * blocks);
}

template <int D>
__global__ void __launch_bounds__(kMapThreads, 12) look_up_kernel(KernelMapArgs a, BlockTable table) {
  const int32_t in_rows = real_rows(a.in_count, a.in_rows), out_rows = real_rows(a.out_count, a.out_rows);
  const HashMap map(table.keys, slots_for(table, in_rows));
  int32_t across[D], dilation[D];
  const int most_under = blocks_under_window<D>(a.geometry, across);
  int parts = 0;
  for (int d = 0; d < D; ++d) {
    parts += across[d];
    dilation[d] = static_cast<int32_t>(a.geometry.dilation[d]);
  }
  const int lane = threadIdx.x % kWarp;
  char* const shared = dynamic_shared() + threadIdx.x / kWarp * under_bytes(parts, most_under);
  Key* const under_parts = reinterpret_cast<Key*>(shared) + lane;  // stride kWarp, as the others
  uint32_t* const under_masks = reinterpret_cast<uint32_t*>(under_parts - lane + parts * kWarp) + lane;
  int32_t* const under_rows = reinterpret_cast<int32_t*>(under_masks + 2 * most_under * kWarp);

  // A site under the window: 64 times the number of its block, plus its last key bits. The axes' shares add up.
  int32_t block_step[D];
  for (int d = D - 1, step = 64; d >= 0; step *= across[d--]) block_step[d] = step;
  const auto place = [&](int d, int32_t at) {
    return (at >> block_axis_bits(D, d)) * block_step[d] + bits_in_block<D>(d, at);
  };

  const int64_t tiles = div_up(out_rows, kWarp);
  const int32_t each = words_each(tiles, a.mask_words);
  for (int64_t i = global_thread() / kWarp; i < tiles * div_up(a.mask_words, each); i += all_threads() / kWarp) {
    const Piece piece = piece_of(i, each, a.mask_words);
    const int32_t output = piece.first + lane;
    const bool is_real = output < out_rows;
    const Site<D> out(a.out_coords, is_real ? output : out_rows - 1);

    int32_t offset[D], part = 0;
    for (int d = 0; d < D; ++d) {
      const WindowAxis window = window_axis<D>(a.geometry, d, out.coord[d]);
      offset[d] = window.offset;
      for (int32_t block = 0; block < across[d]; ++block) {
        const bool is_under = block < window.blocks;
        under_parts[part++ * kWarp] = is_under ? axis_part<D>(d, window.first_site<D>(d, block)) : kNoKey;
      }
    }
    const Key batch = batch_part<D>(out.batch);
    Odometer<D> block(across, 0);
    for (int u = 0; u < most_under; u += kAtOnce) {
      Key keys[kAtOnce];
      int32_t slots[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        keys[j] = batch;
        int32_t first_part = 0;
        for (int d = 0; d < D; ++d) {
          keys[j] |= under_parts[(first_part + block.at[d]) * kWarp];
          first_part += across[d];
        }
        if (u + j >= most_under) keys[j] = kNoKey;
        block.next(across, D - 1);
      }
      map.find(keys, slots);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (u + j >= most_under) break;
        const SiteBlock found = slots[j] < 0 ? SiteBlock{0, 0} : table.blocks[slots[j]];
        const uint32_t low = static_cast<uint32_t>(found.mask), high = static_cast<uint32_t>(found.mask >> 32);
        under_masks[2 * (u + j) * kWarp] = low;
        under_masks[(2 * (u + j) + 1) * kWarp] = high;
        under_rows[2 * (u + j) * kWarp] = found.row;
        under_rows[(2 * (u + j) + 1) * kWarp] = found.row + __popc(low);
      }
    }

    int32_t line = 0, first_place = -1, places[kAtOnce];  // of the line's others, and of taps first_place .. on the last
    write_output<D>(
        a, piece, output, is_real,
        [&](const int32_t (&tap)[D]) {
          line = 0;
          for (int d = 0; d < D - 1; ++d) line += place(d, offset[d] + dilation[d] * tap[d]);
        },
        [&](int32_t (&rows)[kAtOnce], int32_t first, int32_t n) {
          if (first != first_place) {
            first_place = first;
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) places[j] = place(D - 1, offset[D - 1] + dilation[D - 1] * (first + j));
          }
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            const int32_t half = (line + places[j]) / 32 * kWarp, site = (line + places[j]) % 32;
            const uint32_t mask = j < n ? under_masks[half] : 0;
            rows[j] = -1;
            if ((mask >> site & 1) != 0) {
              const int32_t row = under_rows[half] + __popc(mask & ((1u << site) - 1));
              if (row < in_rows) rows[j] = row;  // false only where the sites are not sorted after all
            }
          }
        });
  }
}

// --- reverse ---

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

// The three kernels of a builder.
template <int D, typename Table>
cudaError_t build(const KernelMapArgs& a, const Table& table, int64_t shared_bytes, cudaStream_t stream) {
  void (*const enter)(KernelMapArgs, Table) = enter_kernel<D>;
  void (*const look_up)(KernelMapArgs, Table) = look_up_kernel<D>;
  const int64_t pieces = div_up(a.out_rows, kWarp) * a.mask_words;
  JAXSPARSE_TRY(launch(clear_kernel<Table>, striding_blocks(slots_for(table, a.in_rows), kThreads), {kThreads}, stream, a,
                       table));
  JAXSPARSE_TRY(launch(enter, striding_blocks(a.in_rows, kThreads), {kThreads}, stream, a, table));
  return launch(look_up, striding_blocks(pieces, kMapWarps), {kMapThreads, shared_bytes}, stream, a, table);
}

template <int D>
cudaError_t kernel_map_in(const KernelMapArgs& a, cudaStream_t stream) {
  Workspace workspace(a.workspace);
  const int64_t slots = hash_slots(a.in_rows);  // enough for either table
  int32_t across[D];
  const int under = blocks_under_window<D>(a.geometry, across);
  if (a.builder == MapBuilder::kBlocks && under <= kMostUnderWindow) {
    int parts = 0;
    for (int d = 0; d < D; ++d) parts += across[d];
    const BlockTable table{workspace.take<uint64_t>(slots), workspace.take<SiteBlock>(slots)};
    return build<D>(a, table, kMapWarps * under_bytes(parts, under), stream);
  }
  return build<D>(a, SiteTable{workspace.take<uint64_t>(slots), workspace.take<int32_t>(slots)}, 0, stream);
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
  return launch(reverse_table_kernel, div_up(entries, kThreads), {kThreads}, stream, a, entries);
}

}  // namespace jaxsparse::cuda
