// A stable radix sort inside a cooperative kernel; the number of keys and of bits are known only on the device.
//
// Least significant digit first, 9 bits per pass: a scan's 33 bits take four. In a pass each block moves its share of the
// keys; then follows a barrier of the grid. A block's keys of a digit go behind all keys of smaller digits, behind those of
// that digit in earlier chunks (of eight or nine shares each), and in earlier shares of its chunk. The chunks' counts are
// made by the previous pass, as keys arrive. The earlier shares of its chunk a block counts itself, which saves a phase and
// a barrier. Only if shares are large, each block counts its own, and a barrier follows: on an H200 605 us instead of 705
// for all of unique_sites with 4 million points, 155 instead of 160 with 1 million. No block waits for a single other one.
//
// A block moves its share one tile at a time. A large tile is first ordered by digit in shared memory, so that warps write
// runs of neighbours: when introduced, on an H200, 204 us instead of 222 with 1 million points, 867 instead of 988 with
// 4 million, 57 instead of 61 with 271,156. In tiles of 945 keys (124,668 points) it took 2 us more.
//
// Up to some hundred thousand keys it is bound by latency: four dependent reads and a barrier per pass. Beyond, by memory
// traffic: 24 bytes per key and pass.
//
// Why not CUB: the host must tell its sort the number of keys and bits, so it would sort the whole capacity, by 64 bits
// where a scan has about 33 that differ.
#pragma once

#include "cuda/common/grid.cuh"
#include "cuda/sort/rank.cuh"
#include "cuda/sort/workspace.h"

namespace jaxsparse::cuda {

constexpr int kSortThreads = 768;  // one block per multiprocessor, since each reads all chunks' counts; 1024 would spill
constexpr int kSortWarps = kSortThreads / kWarp;
constexpr int kSortPerThread = 3;
constexpr int kSortTile = kSortPerThread * kSortThreads;

struct SortBuffers {
  uint64_t* keys;
  uint32_t* values;
  uint64_t* other_keys;  // written by a pass, then swapped with keys
  uint32_t* other_values;
  int32_t* counts;    // [kMostPasses, kSortChunks, kDigits], 0 when the kernel begins
  int32_t* of_share;  // [blocks, kDigits], used if shares are large
};

inline cudaError_t take_sort_buffers(Workspace& workspace, int64_t n, cudaStream_t stream, SortBuffers* b) {
  b->keys = workspace.take<uint64_t>(n);
  b->values = workspace.take<uint32_t>(n);
  b->other_keys = workspace.take<uint64_t>(n);
  b->other_values = workspace.take<uint32_t>(n);
  b->counts = workspace.take<int32_t>(kSortCounts);
  b->of_share = workspace.take<int32_t>(share_counts(n));
  return cudaMemsetAsync(b->counts, 0, 4 * kSortCounts, stream);
}

struct SortShared {
  union {
    Ranks<kSortWarps, kDigits> ranks;
    struct {
      uint64_t keys[kSortTile];
      uint32_t values[kSortTile];
    } tile;  // ordered by digit
  };
  uint32_t arrived[kSortChunks * kDigits / 2];  // [chunk][next pass's digit]: keys moved there, two 16-bit counts per word
  int32_t next[kDigits];                        // destination of this block's next key of each digit
  int32_t ahead[kDigits];                       // destination of a digit's keys less their place in the tile
};
constexpr int kTilesCounted = 65535 / kSortTile;  // tiles until a count in `arrived` could overflow

template <typename T>
__device__ void swap(T*& a, T*& b) {
  T* const held = a;
  a = b;
  b = held;
}

// How n keys are divided into shares, one per block, and shares into chunks.
struct SortShares {
  uint32_t in_chunk, keys;  // shares per chunk, keys per share
  int32_t chunk;            // this block's chunk
  Range own;

  __device__ explicit SortShares(int32_t n)
      : in_chunk((gridDim.x + kSortChunks - 1) / kSortChunks),
        keys(share_size(n, kWarp, gridDim.x)),
        chunk(static_cast<int32_t>(blockIdx.x / in_chunk)),
        own(share(n, kWarp, gridDim.x)) {}

  __device__ uint32_t chunk_keys() const { return in_chunk * keys; }
};

// Calls use(i, read(i)) for all i in the range, with kAtOnce reads of each thread in flight.
template <int kAtOnce, typename Read, typename Use>
__device__ void for_keys(Range range, Read read, Use use) {
  for (int32_t begin = range.begin + threadIdx.x; begin < range.end; begin += kAtOnce * kSortThreads) {
    uint64_t keys[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (begin + i * kSortThreads < range.end) keys[i] = read(begin + i * kSortThreads);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (begin + i * kSortThreads < range.end) use(begin + i * kSortThreads, keys[i]);
    }
  }
}

// Stores key_of(i), i = 0 .. n - 1, as radix_sort's input and counts the digits of the first pass. All blocks call it; a
// barrier of the grid must follow.
template <typename KeyOf>
__device__ void put_keys(const SortBuffers& b, int32_t n, SortShared& shared, KeyOf key_of) {
  const SortShares shares(n);
  int32_t* const histogram = shared.next;
  if (threadIdx.x < kDigits) histogram[threadIdx.x] = 0;
  __syncthreads();
  for_keys<kSortPerThread>(shares.own, key_of, [&](int32_t i, uint64_t key) {
    b.keys[i] = key;
    atomicAdd(&histogram[key % kDigits], 1);
  });
  __syncthreads();
  if (threadIdx.x < kDigits && histogram[threadIdx.x] != 0) {
    atomicAdd(&b.counts[shares.chunk * kDigits + threadIdx.x], histogram[threadIdx.x]);
  }
}

// Moves the keys and values at [tile.begin, tile.end), at most kSortTile, to the other buffers, a digit's from
// shared.next[digit] on. If counts_next, counts the next pass's digits in shared.arrived. In the first pass keys are
// replaced by their codes, and values are the keys' positions. *in_tile: see Ranks.
template <typename Digit, typename ToCodes>
__device__ void scatter_tile(const SortBuffers& b, bool is_first, Range tile, uint32_t chunk_keys, bool counts_next,
                             uint32_t* in_tile, SortShared& shared, Digit digit_of, ToCodes to_codes) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int each = (tile.end - tile.begin + kSortThreads - 1) / kSortThreads;  // sets of 32 keys per warp
  const int32_t first = tile.begin + warp * each * kWarp + lane;
  const int32_t end = min(tile.end, first - lane + each * kWarp);
  uint64_t keys[kSortPerThread];
  uint32_t values[kSortPerThread];
  int32_t places[kSortPerThread];  // first the rank among the warp's keys of the same digit, later the destination
#pragma unroll
  for (int i = 0; i < kSortPerThread; ++i) {
    const int32_t at = first + i * kWarp;
    keys[i] = at < end ? b.keys[at] : 0;
    values[i] = is_first ? static_cast<uint32_t>(at) : at < end ? b.values[at] : 0;
  }
  if (is_first) to_codes(keys);
  shared.ranks.clear();
#pragma unroll
  for (int i = 0; i < kSortPerThread; ++i) {
    if (first - lane + i * kWarp >= end) continue;
    places[i] = shared.ranks.template add<kDigitBits>(digit_of(keys[i], 0), first + i * kWarp < end);
  }
  __syncthreads();
  shared.ranks.sum_up(kSortWarps, shared.next, in_tile);
  const bool by_digit = each == kSortPerThread;  // not worth it with few keys per digit
  if (by_digit) {
    const int t = threadIdx.x;
    const int32_t low = *in_tile & 0xffff, high = *in_tile >> 16;  // counts of two digits
    int32_t total;
    const int32_t before = block_exclusive_scan<kSortThreads>(low + high, &total);
    if (t < kDigits / 2) {
      shared.ahead[2 * t] = shared.next[2 * t] - before;
      shared.ahead[2 * t + 1] = shared.next[2 * t + 1] - before - low;
    }
  }
  __syncthreads();
  const auto put = [&](uint64_t key, uint32_t value, int32_t place) {
    b.other_keys[place] = key;
    b.other_values[place] = value;
    if (!counts_next) return;
    const uint32_t count = static_cast<uint32_t>(place) / chunk_keys * kDigits + digit_of(key, 1);
    atomicAdd(&shared.arrived[count / 2], 1u << count % 2 * 16);
  };
#pragma unroll
  for (int i = 0; i < kSortPerThread; ++i) {
    if (first + i * kWarp >= end) continue;
    const int digit = digit_of(keys[i], 0);
    places[i] += shared.next[digit] + shared.ranks.before[warp][digit];
    if (by_digit) {
      places[i] -= shared.ahead[digit];
    } else {
      put(keys[i], values[i], places[i]);
    }
  }
  __syncthreads();
  if (!by_digit) return;
#pragma unroll
  for (int i = 0; i < kSortPerThread; ++i) {
    if (first + i * kWarp >= end) continue;
    shared.tile.keys[places[i]] = keys[i];
    shared.tile.values[places[i]] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSortPerThread; ++i) {
    const int32_t at = threadIdx.x + i * kSortThreads;
    if (at >= tile.end - tile.begin) continue;
    const uint64_t key = shared.tile.keys[at];
    put(key, shared.tile.values[at], shared.ahead[digit_of(key, 0)] + at);
  }
  __syncthreads();
}

// Adds shared.arrived to the counts of the next pass and clears it.
__device__ inline void hand_over(int32_t* next_counts, SortShared& shared) {
  for (int i = threadIdx.x; i < kSortChunks * kDigits / 2; i += kSortThreads) {
    const uint64_t pair = shared.arrived[i];
    if (pair == 0) continue;
    shared.arrived[i] = 0;
    atomicAdd(reinterpret_cast<unsigned long long*>(next_counts) + i,
              static_cast<unsigned long long>(pair >> 16 << 32 | (pair & 0xffff)));
  }
}

// Replaces the n keys in b.keys by their codes, to_codes(keys of a thread), and sorts these by their low `bits` bits. A
// code's last digit must be that of its key. The values become the keys' original positions. All blocks call it, after
// put_keys and a barrier of the grid; it ends with one.
template <typename ToCodes>
__device__ void radix_sort(Grid grid, SortBuffers& b, int32_t n, int bits, SortShared& shared, ToCodes to_codes) {
  const SortShares shares(n);
  const int passes = bits > 0 ? (bits + kDigitBits - 1) / kDigitBits : 1;
  const int t = threadIdx.x;
  for (int i = t; i < kSortChunks * kDigits / 2; i += kSortThreads) shared.arrived[i] = 0;
  for (int pass = 0; pass < passes; ++pass) {
    const auto digit_of = [&](uint64_t key, int later) {  // later = 0: in this pass, 1: in the next
      return static_cast<int>((key >> ((pass + later) * kDigitBits)) % kDigits);
    };
    if (t < kDigits) shared.next[t] = 0;
    __syncthreads();
    const auto count = [&](Range range) {
      for_keys<8>(
          range, [&](int32_t i) { return b.keys[i]; },
          [&](int32_t, uint64_t key) { atomicAdd(&shared.next[digit_of(key, 0)], 1); });
    };
    const uint32_t first_share = shares.chunk * shares.in_chunk;
    if (shares.keys < kLargeShare) {
      count({static_cast<int32_t>(first_share * shares.keys), shares.own.begin});
    } else {
      count(shares.own);
      __syncthreads();
      if (t < kDigits && shares.own.begin < shares.own.end) b.of_share[blockIdx.x * kDigits + t] = shared.next[t];
      grid.sync();
      if (t < kDigits && shares.own.begin < shares.own.end) {
        int32_t earlier = 0;
        for (uint32_t i = first_share; i < blockIdx.x; ++i) earlier += b.of_share[i * kDigits + t];
        shared.next[t] = earlier;
      }
    }
    int32_t before = 0, all = 0;  // keys of digit t in the chunks before this one, and in all
    int32_t* const counts = b.counts + pass * kSortChunks * kDigits;
    if (t < kDigits) {
#pragma unroll
      for (int chunk = 0; chunk < kSortChunks; ++chunk) {
        const int32_t count = counts[chunk * kDigits + t];
        before += chunk < shares.chunk ? count : 0;
        all += count;
      }
    }
    int32_t total;
    const int32_t start = block_exclusive_scan<kSortThreads>(all, &total);
    if (t < kDigits) shared.next[t] += start + before;
    __syncthreads();
    uint32_t in_tile = 0;
    const bool counts_next = pass + 1 < passes;
    int tiles = 0;
    for (int32_t begin = shares.own.begin; begin < shares.own.end; begin += kSortTile) {
      const Range tile{begin, min(begin + kSortTile, shares.own.end)};
      scatter_tile(b, pass == 0, tile, shares.chunk_keys(), counts_next, &in_tile, shared, digit_of, to_codes);
      if (counts_next && (++tiles % kTilesCounted == 0 || tile.end == shares.own.end)) {
        hand_over(counts + kSortChunks * kDigits, shared);
      }
    }
    grid.sync();
    swap(b.keys, b.other_keys);
    swap(b.values, b.other_values);
  }
}

}  // namespace jaxsparse::cuda
