// Where rows keep their order, one kernel lays the table out. Where they are sorted, stably, there are two:
//
//     count   the key of each row: which groups of taps it has any of, a bit a group, as a place in the Gray sequence,
//             counted down. Rows next to each other in that sequence differ in few groups, and crowded rows come first, so
//             that the long tiles of the convolution begin first. A block counts the keys of a chunk of rows; others
//             meanwhile write -1 to all tiles.
//     place   a block for each share of a chunk: its rows go after those of lesser keys, in all chunks, and after equal ones,
//             in earlier chunks and in its own chunk, which it counts anew: that is cheaper than one more kernel that sums
//             up counts of shares, or reading them all. A row's entries go from the table straight to its tile.
//
// Measured on an H200, 3^3 kernel on the levels of a LiDAR scan, 91,767 to 5,925 rows: sorted 25.7, 20.3, 16.3, 13.6, 9.2 us,
// of which count 5.5 to 3.1; in the order of sites 5.0, 3.8, 2.7, 2.4, 2.3. Kernel 2, stride 2: 15.6 to 9.0, and 2.7 to 2.0.
// Bound by latency, two launches and some eight dependent reads, where rows are few; where they are many `place` takes most,
// 20.1 us of the 25.7, whose writes go each to a sector of its own.
//
// One cooperative kernel with the radix sort of cuda/sort took 32.5, 26.2, 28.6, 25.6, 23.4 us; the order of sites, by a warp
// a tile whose stores held back its loads, 15.5, 13.3, 12.4, 12.3, 12.1.
//
// Executed over useful products of a 3^3 kernel, tiles of 64 rows, on average over three levels of three scans: 3.4 in the
// order of sites; sorted by the 27-bit mask 1.95, by the mask with rare taps first and in Gray order 1.70, both in three
// passes of a radix sort; by nine groups, the planes above and below and seven columns beside, 1.60 in one.
#include "cuda/conv/schedule.h"

#include "cuda/conv/entries.cuh"
#include "cuda/sort/rank.cuh"

namespace jaxsparse::cuda {
namespace {

constexpr int kWarps = kShareThreads / kWarp;
constexpr int kSharesInChunk = kShares / kScheduleChunks;
constexpr int32_t kNotReal = kScheduleKeys - 1;  // the key of rows that are not real, behind those of others
static_assert(kScheduleKeys <= kShareThreads, "a thread a key");

constexpr int kRowsInFlight = 8;

// The keys of rows row, row + kShareThreads, ... that lie before `end`.
__device__ void find_keys(const ScheduleArgs& a, int32_t row, int32_t end, int32_t (&keys)[kRowsInFlight]) {
  uint32_t bits[kRowsInFlight] = {};
  for (int32_t word = 0; word < a.mask_words; ++word) {
    uint32_t masks[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int64_t m = row + i * kShareThreads;
      masks[i] = m < end ? a.masks[m * a.mask_words + word] : 0;
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
#pragma unroll
      for (int g = 0; g < kMostGroups; ++g) {
        bits[i] |= static_cast<uint32_t>((masks[i] & a.group[g][word]) != 0) << (kMostGroups - 1 - g);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRowsInFlight; ++i) {
#pragma unroll
    for (int shift = 1; shift < kMostGroups; shift *= 2) bits[i] ^= bits[i] >> shift;  // from Gray code to its place
    keys[i] = static_cast<int32_t>(~bits[i] & ((1u << kMostGroups) - 1));
    if (a.rows.number > 1 && !row_is_real(a.rows, row + i * kShareThreads)) keys[i] = kNotReal;
  }
}

// Adds the keys of rows, which find(row, end, keys) finds, to counts in shared memory.
template <typename Find>
__device__ void count_keys(Range rows, int32_t* counts, Find find) {
  for (int32_t row = rows.begin + threadIdx.x; row < rows.end; row += kRowsInFlight * kShareThreads) {
    int32_t keys[kRowsInFlight];
    find(row, rows.end, keys);
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      if (row + i * kShareThreads < rows.end) atomicAdd(&counts[keys[i]], 1);
    }
  }
}

__global__ void __launch_bounds__(kShareThreads) count_kernel(ScheduleArgs a, int32_t* counts, uint16_t* keys) {
  __shared__ int32_t own[kScheduleKeys];
  const int t = threadIdx.x, block = blockIdx.x;
  const int32_t n = end_of_real_rows(a.rows);
  if (block < kScheduleChunks) {
    if (t < kScheduleKeys) own[t] = 0;
    __syncthreads();
    count_keys(
        rows_of_shares(n, block * kSharesInChunk, (block + 1) * kSharesInChunk), own,
        [&](int32_t row, int32_t end, int32_t(&found)[kRowsInFlight]) {
          find_keys(a, row, end, found);
#pragma unroll
          for (int i = 0; i < kRowsInFlight; ++i) {
            if (row + i * kShareThreads < end) keys[row + i * kShareThreads] = static_cast<uint16_t>(found[i]);
          }
        });
    __syncthreads();
    if (t < kScheduleKeys) counts[block * kScheduleKeys + t] = own[t];
    return;
  }
  const int64_t first = static_cast<int64_t>(block - kScheduleChunks) * kShareThreads + t;
  const int64_t step = static_cast<int64_t>(gridDim.x - kScheduleChunks) * kShareThreads;
  const int64_t pieces = div_up(n, kScheduleRows) * a.taps * (kScheduleRows / 4);
  for (int64_t i = first; i < pieces; i += step) reinterpret_cast<int4*>(a.tile_table)[i] = make_int4(-1, -1, -1, -1);
  const int64_t words = div_up(a.rows.rows, kScheduleRows) * a.mask_words;
  for (int64_t i = first; i < words; i += step) a.tile_masks[i] = 0;
  for (int64_t row = n + first; row < a.rows.rows; row += step) a.order[row] = static_cast<int32_t>(row);
}

struct PlaceShared {
  int32_t next[kScheduleKeys];  // where the block's next row of each key goes
  Ranks<kWarps, kScheduleKeys> ranks;
  int32_t places[kShareThreads];
};

// Where the block's rows of each key begin, one a thread.
__device__ void begin_keys(const int32_t* counts, const uint16_t* keys, int32_t n, PlaceShared& s) {
  const int t = threadIdx.x, share = blockIdx.x, chunk = share / kSharesInChunk;
  if (t < kScheduleKeys) s.next[t] = 0;
  __syncthreads();
  count_keys(rows_of_shares(n, chunk * kSharesInChunk, share), s.next,
             [&](int32_t row, int32_t end, int32_t(&found)[kRowsInFlight]) {
#pragma unroll
               for (int i = 0; i < kRowsInFlight; ++i) {
                 found[i] = row + i * kShareThreads < end ? keys[row + i * kShareThreads] : 0;
               }
             });
  int32_t before = 0, all = 0;
  if (t < kScheduleKeys) {
#pragma unroll
    for (int c = 0; c < kScheduleChunks; ++c) {
      const int32_t count = counts[c * kScheduleKeys + t];
      before += c < chunk ? count : 0;
      all += count;
    }
  }
  int32_t total;
  const int32_t start = block_exclusive_scan<kShareThreads>(all, &total);
  if (t < kScheduleKeys) s.next[t] += start + before;
}

// Where the row of the tile goes whose key the thread has. *in_tile: see Ranks.
__device__ int32_t place_of(int32_t key, int32_t rows, uint32_t* in_tile, PlaceShared& s) {
  const int t = threadIdx.x, warp = t / kWarp, warps = (rows + kWarp - 1) / kWarp;
  const bool exists = t < rows;
  int32_t rank = 0;
  if (warp < warps) {
    s.ranks.clear();
    rank = s.ranks.add<kMostGroups + 1>(key, exists);
  }
  __syncthreads();
  s.ranks.sum_up(warps, s.next, in_tile);
  __syncthreads();
  return exists ? s.next[key] + s.ranks.before[warp][key] + rank : 0;
}

__global__ void __launch_bounds__(kShareThreads, 1) place_kernel(ScheduleArgs a, const int32_t* counts, const uint16_t* keys) {
  __shared__ PlaceShared shared;
  const int t = threadIdx.x, lane = t % kWarp, warp = t / kWarp;
  const int32_t n = end_of_real_rows(a.rows);
  const Range own = rows_of_shares(n, blockIdx.x, blockIdx.x + 1);
  if (own.begin == own.end) return;
  begin_keys(counts, keys, n, shared);
  uint32_t in_tile = 0;
  for (int32_t begin = own.begin; begin < own.end; begin += kShareThreads) {
    const int32_t rows = min(kShareThreads, own.end - begin), groups = (rows + kWarp - 1) / kWarp;
    // A warp has 32 rows and a slice of the taps; it reads the first entries before it knows where they go.
    const int slices = tap_slices(groups), group = warp / slices, slice = warp % slices;
    const int32_t m = begin + group * kWarp + lane;
    const bool is_real = group < groups && m < own.end && (a.rows.number == 1 || row_is_real(a.rows, m));
    int32_t entries[kTapsInFlight];
    uint32_t mask, taps, rest;
    const auto begin_word = [&](int32_t word) {
      mask = is_real ? a.masks[int64_t{m} * a.mask_words + word] : 0;
      taps = taps_of_slice(__reduce_or_sync(kAllLanes, mask), slices, slice);
    };
    const auto read_entries = [&](int32_t word) {
      const int32_t* from = a.table + int64_t{word} * 32 * a.rows.rows + m;
      rest = for_taps(taps, [&](int i, int tap) {
        if (mask >> tap & 1) entries[i] = from[int64_t{tap} * a.rows.rows];
      });
    };
    begin_word(0);
    read_entries(0);

    const int32_t place = place_of(t < rows ? keys[begin + t] : 0, rows, &in_tile, shared);
    if (t < rows) {
      shared.places[t] = place;
      a.order[place] = begin + t;
    }
    __syncthreads();
    const int32_t to_place = is_real ? shared.places[m - begin] : 0, tile = to_place / kScheduleRows;
    int32_t* const to_row = a.tile_table + int64_t{tile} * a.taps * kScheduleRows + to_place % kScheduleRows;
    for (int32_t word = 0; word < a.mask_words; ++word) {
      if (word > 0) {
        begin_word(word);
        read_entries(word);
      }
      if (slice == 0 && mask != 0) atomicOr(&a.tile_masks[int64_t{tile} * a.mask_words + word], mask);
      while (taps != 0) {
        for_taps(taps, [&](int i, int tap) {
          if (mask >> tap & 1) to_row[(word * 32 + tap) * kScheduleRows] = entries[i];
        });
        taps = rest;
        read_entries(word);
      }
    }
  }
}

constexpr int kLayOutThreads = 256;
constexpr int kLayOutSlices = 4;  // of taps, a warp each, two rows a lane

__global__ void __launch_bounds__(kLayOutThreads) lay_out_kernel(ScheduleArgs a) {
  const int64_t warp = global_thread() / kWarp;
  const int lane = threadIdx.x % kWarp, slice = static_cast<int>(warp % kLayOutSlices);
  const int64_t tile = warp / kLayOutSlices;
  if (tile >= div_up(a.rows.rows, kScheduleRows)) return;
  int32_t row[2];
  bool is_real[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    row[r] = static_cast<int32_t>(tile) * kScheduleRows + r * kWarp + lane;
    is_real[r] = row_is_real(a.rows, row[r]);
    if (slice == 0 && row[r] < a.rows.rows) a.order[row[r]] = row[r];
  }
  for (int32_t word = 0; word < a.mask_words; ++word) {
    uint32_t mask[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) mask[r] = is_real[r] ? a.masks[int64_t{row[r]} * a.mask_words + word] : 0;
    const uint32_t any = __reduce_or_sync(kAllLanes, mask[0] | mask[1]);
    if (slice == 0 && lane == 0) a.tile_masks[tile * a.mask_words + word] = any;
    const int32_t* from = a.table + int64_t{word} * 32 * a.rows.rows;
    int32_t* to = a.tile_table + (tile * a.taps + word * 32) * kScheduleRows + lane;
    for (uint32_t taps = taps_of_slice(any, kLayOutSlices, slice), rest; taps != 0; taps = rest) {
      int32_t entries[kTapsInFlight][2];
      rest = for_taps(taps, [&](int i, int tap) {
#pragma unroll
        for (int r = 0; r < 2; ++r) entries[i][r] = mask[r] >> tap & 1 ? from[int64_t{tap} * a.rows.rows + row[r]] : -1;
      });
      for_taps(taps, [&](int i, int tap) {
#pragma unroll
        for (int r = 0; r < 2; ++r) to[tap * kScheduleRows + r * kWarp] = entries[i][r];
      });
    }
  }
}

}  // namespace

cudaError_t schedule(const ScheduleArgs& a, cudaStream_t stream) {
  const int64_t tiles = div_up(a.rows.rows, kScheduleRows);
  if (a.groups == 0) {
    return launch(lay_out_kernel, div_up(tiles * kLayOutSlices * kWarp, kLayOutThreads), {kLayOutThreads}, stream, a);
  }
  Workspace workspace(a.workspace);
  int32_t* const counts = workspace.take<int32_t>(kScheduleChunks * kScheduleKeys);
  uint16_t* const keys = workspace.take<uint16_t>(a.rows.rows);
  const int64_t clearing = striding_blocks(tiles * a.taps * kScheduleRows / 4, 4 * kShareThreads);
  JAXSPARSE_TRY(launch(count_kernel, kScheduleChunks + clearing, {kShareThreads}, stream, a, counts, keys));
  return launch(place_kernel, tiles < kShares ? tiles : kShares, {kShareThreads}, stream, a, counts, keys);
}

}  // namespace jaxsparse::cuda
