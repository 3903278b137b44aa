// Sorts the output rows of a convolution so that rows with similar tap masks share a tile, and lays the kernel map out in
// tiles. The sort is a stable counting sort. Three kernels:
//
//     count   finds the key of each row and counts the keys of each chunk of rows. A key has a bit per group of taps, set
//             if the row has any of them; it is read as a Gray code and counted down, so rows with neighbouring keys differ
//             in few groups, and rows without taps come last: the long tiles of the convolution tend to begin first.
//     order   a block per share of a chunk places its rows: behind all smaller keys, and behind equal keys of earlier chunks
//             and of earlier shares of its own chunk. It recounts the latter, which is cheaper than another kernel that sums
//             counts of shares, or than reading the counts of all shares.
//     lay out a block per tile ORs its rows' masks and copies the table entries of the taps in them, a whole line of the
//             tile at a time. Rows with equal keys keep their order, so that these gathers share sectors.
//
// Without sorting only the last kernel runs, and rows keep their order.
//
// Measured on an H200, 3^3 kernel on the levels of a LiDAR scan, 91,767 to 5,879 rows: sorted 14.5, 13.2, 11.1, 10.1, 9.0 us
// (count 4.0 to 2.0, order 6.0 to 4.5, lay out 4.6 to 2.4); in the order of sites 4.6, 4.0, 2.9, 2.5, 2.2. Kernel 2, stride
// 2, 60,107 to 14,474 rows: 11.6, 10.1, 9.4, and 2.8, 2.3, 1.9. With few rows, launches and dependent reads take all the
// time. When measured, order_kernel had a separate path for few rows, where each block found all keys without the count: 0.4
// us less at 5,879 rows for twice the code, since removed. Slower:
//     entries scattered as rows were placed, each to its own sector: 25.7, 20.3, 16.3, 13.6, 9.2 (level 4 had 5,925 rows)
//     32 chunks: 1.0 to 1.3 more for order, 0.3 less for count at 91,767 rows
//     one cooperative kernel with the radix sort of cuda/sort: 32.5, 26.2, 28.6, 25.6, 23.4
// Executed per useful product, 3^3 kernel, tiles of 64 rows, mean of three levels of three scans: 3.4 in the order of sites;
// sorted by the 27-bit mask 1.95, by the mask with rare taps first in Gray order 1.70, both in three passes of a radix sort;
// by nine groups (the planes above and below, seven columns beside) 1.60, in one pass.
#include "cuda/conv/schedule.h"

#include "cuda/conv/entries.cuh"
#include "cuda/sort/rank.cuh"

namespace jaxsparse::cuda {
namespace {

constexpr int kShares = 128;  // shares of the rows, whatever their number: about one block per multiprocessor
constexpr int kShareThreads = 1024;
constexpr int kWarps = kShareThreads / kWarp;
constexpr int kSharesInChunk = kShares / kScheduleChunks;
constexpr int32_t kNotReal = kScheduleKeys - 1;  // the key of padding rows, larger than all others
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
      if (row + i * kShareThreads >= end) break;  // instruction-bound, so skip rows that do not exist
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
    for (int shift = 1; shift < kMostGroups; shift *= 2) bits[i] ^= bits[i] >> shift;  // from a Gray code to its rank
    keys[i] = static_cast<int32_t>(~bits[i] & ((1u << kMostGroups) - 1));
    if (a.rows.number > 1 && !row_is_real(a.rows, row + i * kShareThreads)) keys[i] = kNotReal;
  }
}

// Counts the keys of a range of rows in shared memory. find(row, end, keys) yields the keys of kRowsInFlight rows.
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
  int32_t next[kScheduleKeys];  // the place of the block's next row of each key
  Ranks<kWarps, kScheduleKeys> ranks;
};

// Sets s.next, which must be 0, to the place of the block's first row of each key; a thread per key.
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

__global__ void __launch_bounds__(kShareThreads, 1)
    order_kernel(ScheduleArgs a, const int32_t* counts, const uint16_t* keys) {
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
    if (begin == own.begin) begin_keys(counts, keys, n, s);  // overlaps the loads of the first keys
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

// A block lays out one tile. Each warp handles a slice of the taps, each lane the two rows of two places that follow each
// other, with all loads of entries in flight.
template <int kSlices>
__global__ void __launch_bounds__(kSlices* kWarp, 40 / kSlices) lay_out_kernel(ScheduleArgs a) {
  constexpr int kTapsOfSlice = kTapsOfWord / kSlices;
  __shared__ int32_t rows[kScheduleRows];
  __shared__ uint32_t masks[kScheduleRows];
  const int t = threadIdx.x, lane = t % kWarp, slice = t / kWarp;
  const int64_t tile = blockIdx.x;
  if (tile * kScheduleRows >= a.rows.rows) return;
  const int32_t place = static_cast<int32_t>(tile) * kScheduleRows + t;
  if (begins_late(1024) && tile * kScheduleRows >= end_of_real_rows(a.rows)) {
    if (t < kScheduleRows && place < a.rows.rows) a.order[place] = place;
    for (int32_t word = t; word < a.mask_words; word += kSlices * kWarp) a.tile_masks[tile * a.mask_words + word] = 0;
    return;
  }
  bool is_real = false;
  if (t < kScheduleRows) {
    int32_t row = place;
    if (place < a.rows.rows) {
      if (a.groups > 0) row = a.order[place];  // undefined for padding rows
      if (a.groups == 0 || place >= end_of_real_rows(a.rows)) a.order[place] = row = place;
    }
    rows[t] = row;
    is_real = row_is_real(a.rows, row);
  }
  for (int32_t word = 0; word < a.mask_words; ++word) {
    if (word > 0) __syncthreads();
    if (t < kScheduleRows) {
      const uint32_t mask = rows[t] < a.rows.rows ? a.masks[int64_t{rows[t]} * a.mask_words + word] : 0;
      masks[t] = is_real ? mask : 0;  // mask is loaded before is_real is known
    }
    __syncthreads();
    int32_t row[2];
    uint32_t mask[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row[r] = rows[row_at_place(2 * lane + r)];
      mask[r] = masks[row_at_place(2 * lane + r)];
    }
    const uint32_t any = __reduce_or_sync(kAllLanes, mask[0] | mask[1]);
    if (t == 0) a.tile_masks[tile * a.mask_words + word] = any;
    const int32_t* from = a.table + int64_t{word} * kTapsOfWord * a.rows.rows;
    int32_t* to = a.tile_table + (tile * a.taps + word * kTapsOfWord) * kScheduleRows + 2 * lane;
    const uint32_t taps = taps_of_slice(any, kSlices, slice);
    int32_t entries[kTapsOfSlice][2];
    for_taps<kTapsOfSlice>(taps, [&](int i, int tap) {
#pragma unroll
      for (int r = 0; r < 2; ++r) entries[i][r] = mask[r] >> tap & 1 ? from[int64_t{tap} * a.rows.rows + row[r]] : -1;
    });
    for_taps<kTapsOfSlice>(taps, [&](int i, int tap) {
      *reinterpret_cast<int2*>(to + tap * kScheduleRows) = make_int2(entries[i][0], entries[i][1]);
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
