// Order first, layout second:
//
//     count   the key of each row: which groups of taps it has any of, a bit a group, as a place in the Gray sequence,
//             counted down. Rows next to each other in that sequence differ in few groups, and crowded rows come first, so
//             that the long tiles of the convolution begin first. A block counts the keys of a chunk of rows.
//     order   a block for each share of a chunk: its rows go after those of lesser keys, in all chunks, and after equal ones,
//             in earlier chunks and in its own chunk, which it counts anew: that is cheaper than one more kernel that sums
//             up counts of shares, or reading them all.
//     lay out a block a tile: the masks of its rows, and under the taps that any has, their entries, gathered from the table
//             and written a whole tile's line at a time. Rows of one key keep their order, so that gathers share sectors.
//
// Rows that are not sorted keep their order, and are laid out at once.
//
// Measured on an H200, 3^3 kernel on the levels of a LiDAR scan, 91,767 to 5,879 rows: sorted 14.5, 13.2, 11.1, 10.1, 9.0 us
// (count 4.0 to 2.0, order 6.0 to 4.5, lay out 4.6 to 2.4); in the order of sites 4.6, 4.0, 2.9, 2.5, 2.2. Kernel 2, stride 2,
// 60,107 to 14,474 rows: 11.6, 10.1, 9.4, and 2.8, 2.3, 1.9. Where rows are few, launches and dependent reads are all of it.
// These are of an order_kernel that had a path of its own for few rows, each block finding all keys without a count: 0.4 us
// less at 5,879 rows for twice the code, left out since.
//
// Slower: entries written as their rows were placed, each to a sector of its own, 25.7, 20.3, 16.3, 13.6, 9.2 (level 4 then
// had 5,925 rows); 32 chunks, 1.0 to 1.3 more for order, 0.3 less for count at 91,767 rows; one cooperative kernel with the
// radix sort of cuda/sort, 32.5, 26.2, 28.6, 25.6, 23.4.
//
// Executed over useful products of a 3^3 kernel, tiles of 64 rows, on average over three levels of three scans: 3.4 in the
// order of sites; sorted by the 27-bit mask 1.95, by the mask with rare taps first and in Gray order 1.70, both in three
// passes of a radix sort; by nine groups, the planes above and below and seven columns beside, 1.60 in one.
#include "cuda/conv/schedule.h"

#include "cuda/conv/entries.cuh"
#include "cuda/sort/rank.cuh"

namespace jaxsparse::cuda {
namespace {

constexpr int kShares = 128;  // of rows, however many there are: about one block a multiprocessor
constexpr int kShareThreads = 1024;
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
      if (row + i * kShareThreads >= end) break;  // bound by instructions: none for rows that are not there
#pragma unroll
      for (int g = 0; g < kMostGroups; ++g) {
        if (masks[i] & a.group[g][word]) bits[i] |= 1u << (kMostGroups - 1 - g);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRowsInFlight; ++i) {
    if (row + i * kShareThreads >= end) break;
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
      if (row + i * kShareThreads >= rows.end) break;
      atomicAdd(&counts[keys[i]], 1);
    }
  }
}

__global__ void __launch_bounds__(kShareThreads) count_kernel(ScheduleArgs a, int32_t* counts, uint16_t* keys) {
  __shared__ int32_t own[kScheduleKeys];
  const int t = threadIdx.x, chunk = blockIdx.x;
  if (t < kScheduleKeys) own[t] = 0;
  __syncthreads();
  const Range rows = rows_of_shares<kShares>(end_of_real_rows(a.rows), chunk * kSharesInChunk, (chunk + 1) * kSharesInChunk);
  count_keys(rows, own, [&](int32_t row, int32_t end, int32_t(&found)[kRowsInFlight]) {
    find_keys(a, row, end, found);
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      if (row + i * kShareThreads >= end) break;
      keys[row + i * kShareThreads] = static_cast<uint16_t>(found[i]);
    }
  });
  __syncthreads();
  if (t < kScheduleKeys) counts[chunk * kScheduleKeys + t] = own[t];
}

struct OrderShared {
  int32_t next[kScheduleKeys];  // where the block's next row of each key goes
  Ranks<kWarps, kScheduleKeys> ranks;
};

// Adds to next, which is 0, where the block's rows of each key begin, one a thread.
__device__ void begin_keys(const int32_t* counts, const uint16_t* keys, int32_t n, OrderShared& s) {
  const int t = threadIdx.x, share = blockIdx.x, chunk = share / kSharesInChunk;
  int32_t of_chunk[kScheduleChunks];
#pragma unroll
  for (int c = 0; c < kScheduleChunks; ++c) of_chunk[c] = t < kScheduleKeys ? counts[c * kScheduleKeys + t] : 0;
  count_keys(rows_of_shares<kShares>(n, chunk * kSharesInChunk, share), s.next,
             [&](int32_t row, int32_t end, int32_t(&found)[kRowsInFlight]) {
#pragma unroll
               for (int i = 0; i < kRowsInFlight; ++i) {
                 found[i] = row + i * kShareThreads < end ? keys[row + i * kShareThreads] : 0;
               }
             });
  int32_t before = 0, all = 0;
#pragma unroll
  for (int c = 0; c < kScheduleChunks; ++c) {
    before += c < chunk ? of_chunk[c] : 0;
    all += of_chunk[c];
  }
  int32_t total;
  const int32_t start = block_exclusive_scan<kShareThreads>(all, &total);
  if (t < kScheduleKeys) s.next[t] += start + before;
}

__global__ void __launch_bounds__(kShareThreads, 1) order_kernel(ScheduleArgs a, const int32_t* counts, const uint16_t* keys) {
  __shared__ OrderShared s;
  const int t = threadIdx.x, warp = t / kWarp;
  if (t < kScheduleKeys) s.next[t] = 0;
  __syncthreads();
  const int32_t n = end_of_real_rows(a.rows);
  const Range own = rows_of_shares<kShares>(n, blockIdx.x, blockIdx.x + 1);
  if (own.begin == own.end) return;
  uint32_t in_tile = 0;
  for (int32_t begin = own.begin; begin < own.end; begin += kShareThreads) {
    const int32_t row = begin + t, warps = (min(kShareThreads, own.end - begin) + kWarp - 1) / kWarp;
    const int32_t key = row < own.end ? keys[row] : 0;
    if (begin == own.begin) begin_keys(counts, keys, n, s);  // while the first keys are on their way
    int32_t rank = 0;
    if (warp < warps) {
      s.ranks.clear();
      rank = s.ranks.add<kMostGroups + 1>(key, row < own.end);
    }
    __syncthreads();
    s.ranks.sum_up(warps, s.next, &in_tile);
    __syncthreads();
    if (row < own.end) a.order[s.next[key] + s.ranks.before[warp][key] + rank] = row;
    __syncthreads();
  }
}

// A block has a tile. Each of its warps has a slice of the taps, two rows a lane, and all their entries in flight at once.
template <int kSlices>
__global__ void __launch_bounds__(kSlices* kWarp, 40 / kSlices) lay_out_kernel(ScheduleArgs a) {
  constexpr int kTapsOfSlice = kWarp / kSlices;
  __shared__ int32_t rows[kScheduleRows];
  __shared__ uint32_t masks[kScheduleRows];
  const int t = threadIdx.x, lane = t % kWarp, slice = t / kWarp;
  const int64_t tile = blockIdx.x;
  if (tile * kScheduleRows >= a.rows.rows) return;
  bool is_real = false;
  if (t < kScheduleRows) {
    const int32_t place = static_cast<int32_t>(tile) * kScheduleRows + t;
    int32_t row = place;
    if (place < a.rows.rows) {
      if (a.groups > 0) row = a.order[place];  // anything where rows are not real
      if (a.groups == 0 || place >= end_of_real_rows(a.rows)) a.order[place] = row = place;
    }
    rows[t] = row;
    is_real = row_is_real(a.rows, row);
  }
  for (int32_t word = 0; word < a.mask_words; ++word) {
    if (word > 0) __syncthreads();
    if (t < kScheduleRows) {
      const uint32_t mask = rows[t] < a.rows.rows ? a.masks[int64_t{rows[t]} * a.mask_words + word] : 0;
      masks[t] = is_real ? mask : 0;  // read before it is known
    }
    __syncthreads();
    int32_t row[2];
    uint32_t mask[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row[r] = rows[r * kWarp + lane];
      mask[r] = masks[r * kWarp + lane];
    }
    const uint32_t any = __reduce_or_sync(kAllLanes, mask[0] | mask[1]);
    if (t == 0) a.tile_masks[tile * a.mask_words + word] = any;
    const int32_t* from = a.table + int64_t{word} * 32 * a.rows.rows;
    int32_t* to = a.tile_table + (tile * a.taps + word * 32) * kScheduleRows + lane;
    const uint32_t taps = taps_of_slice(any, kSlices, slice);
    int32_t entries[kTapsOfSlice][2];
    for_taps<kTapsOfSlice>(taps, [&](int i, int tap) {
#pragma unroll
      for (int r = 0; r < 2; ++r) entries[i][r] = mask[r] >> tap & 1 ? from[int64_t{tap} * a.rows.rows + row[r]] : -1;
    });
    for_taps<kTapsOfSlice>(taps, [&](int i, int tap) {
#pragma unroll
      for (int r = 0; r < 2; ++r) to[tap * kScheduleRows + r * kWarp] = entries[i][r];
    });
  }
}

}  // namespace

cudaError_t schedule(const ScheduleArgs& a, cudaStream_t stream) {
  const int64_t tiles = div_up(a.rows.rows, kScheduleRows);
  if (a.groups > 0) {
    Workspace workspace(a.workspace);
    int32_t* const counts = workspace.take<int32_t>(kScheduleChunks * kScheduleKeys);
    uint16_t* const keys = workspace.take<uint16_t>(a.rows.rows);
    JAXSPARSE_TRY(launch(count_kernel, kScheduleChunks, {kShareThreads}, stream, a, counts, keys));
    JAXSPARSE_TRY(launch(order_kernel, tiles < kShares ? tiles : kShares, {kShareThreads}, stream, a, counts, keys));
  }
  if (tiles <= kFewTiles) return launch(lay_out_kernel<8>, tiles, {8 * kWarp}, stream, a);
  return launch(lay_out_kernel<4>, tiles, {4 * kWarp}, stream, a);
}

}  // namespace jaxsparse::cuda
