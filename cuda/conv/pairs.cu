// count   the pairs of each tap in each share of the output rows, from the masks
// write   a block a share: the pairs of each tap go behind those of earlier shares, and of the warps before in its own
//
// Bound by latency, and by reading the table under present taps, a sector of 32 bytes for each eight rows that have any.
// Three kernels that read the whole table twice took 22.1, 15.8, 10.4, 7.6, 6.9 us on the levels of a LiDAR scan, 91,767 to
// 5,925 rows, on an H200.
#include "cuda/conv/pairs.h"

#include "cuda/conv/entries.cuh"

namespace jaxsparse::cuda {
namespace {

constexpr int kWarps = kShareThreads / kWarp;
constexpr int kTapsOfWord = 32;
constexpr int kPairTapsInFlight = 16;
static_assert(kWarps == kTapsOfWord, "a warp adds up a tap");
static_assert(kPairShares == kShares && kShares == 4 * kWarp, "four counts a lane");

// The mask's word of a row, 0 where it is not a real one of the share's.
__device__ uint32_t mask_of(const PairsArgs& a, Range share, int32_t m, int32_t word) {
  const bool is_real = m < share.end && (a.out_rows.number == 1 || row_is_real(a.out_rows, m));
  return is_real ? a.masks[int64_t{m} * a.mask_words + word] : 0;
}

// How many lanes have the tap that is this lane's number.
__device__ int32_t count_taps(uint32_t mask) {
  const int lane = threadIdx.x % kWarp;
  int32_t count = 0;
  for (uint32_t taps = __reduce_or_sync(kAllLanes, mask); taps != 0; taps &= taps - 1) {
    const int tap = __ffs(static_cast<int>(taps)) - 1;
    const unsigned having = __ballot_sync(kAllLanes, mask >> tap & 1);
    if (lane == tap) count = __popc(having);
  }
  return count;
}

__device__ int32_t warp_sum(int32_t value) {
  for (int step = 1; step < kWarp; step *= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

__global__ void __launch_bounds__(kShareThreads) count_pairs_kernel(PairsArgs a, int32_t* counts) {
  __shared__ int32_t of_share[kTapsOfWord];
  const int t = threadIdx.x, lane = t % kWarp;
  const Range own = rows_of_shares(end_of_real_rows(a.out_rows), blockIdx.x, blockIdx.x + 1);
  for (int32_t word = 0; word < a.mask_words; ++word) {
    if (t < kTapsOfWord) of_share[t] = 0;
    __syncthreads();
    for (int32_t begin = own.begin + t - lane; begin < own.end; begin += kShareThreads) {
      const int32_t count = count_taps(mask_of(a, own, begin + lane, word));
      if (count != 0) atomicAdd(&of_share[lane], count);
    }
    __syncthreads();
    const int32_t tap = word * kTapsOfWord + t;
    if (t < kTapsOfWord && tap < a.taps) counts[int64_t{tap} * kShares + blockIdx.x] = of_share[t];
  }
}

// Where the share's pairs of the warp's tap begin, of whose pairs the lane has those of four shares.
__device__ void begin_taps(int4 of_shares, int share, int32_t tap, const PairsArgs& a, int32_t* next) {
  const int lane = threadIdx.x % kWarp;
  const int32_t each[4] = {of_shares.x, of_shares.y, of_shares.z, of_shares.w};
  int32_t before = 0, all = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    before += 4 * lane + i < share ? each[i] : 0;
    all += each[i];
  }
  before = warp_sum(before);
  all = warp_sum(all);
  if (lane != 0) return;
  next[tap % kTapsOfWord] = before;
  if (share == 0 && tap < a.taps) a.tap_pairs[tap] = all;
}

using OfWarps = int32_t[kWarps][kTapsOfWord + 1];

// From how many pairs of each tap the warps' rows have to where they go; next goes on behind them. A warp a tap.
__device__ void sum_up(OfWarps& first, int32_t* next) {
  const int lane = threadIdx.x % kWarp, tap = threadIdx.x / kWarp;
  const int32_t count = first[lane][tap];
  int32_t upto = count;
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t below = __shfl_up_sync(kAllLanes, upto, step);
    if (lane >= step) upto += below;
  }
  const int32_t before = next[tap];
  first[lane][tap] = before + upto - count;
  __syncwarp();
  if (lane == kWarp - 1) next[tap] = before + upto;
}

__global__ void __launch_bounds__(kShareThreads, 1) write_pairs_kernel(PairsArgs a, const int32_t* counts) {
  __shared__ int32_t next[kTapsOfWord];  // where the share's next pair of each tap goes
  __shared__ OfWarps first;              // pairs of each tap in a warp's rows; then where they go
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, share = blockIdx.x;
  const Range own = rows_of_shares(end_of_real_rows(a.out_rows), share, share + 1);
  if (own.begin == own.end && share > 0) return;
  for (int32_t word = 0; word < a.mask_words; ++word) {
    const int32_t own_tap = word * kTapsOfWord + warp;
    int4 of = {};  // the warp's tap in the lane's four shares
    if (own_tap < a.taps) of = reinterpret_cast<const int4*>(counts + int64_t{own_tap} * kShares)[lane];
    for (int32_t begin = own.begin; begin == own.begin || begin < own.end; begin += kShareThreads) {
      const int32_t groups = max(1, (min(kShareThreads, own.end - begin) + kWarp - 1) / kWarp);
      const uint32_t to_count = warp < groups ? mask_of(a, own, begin + warp * kWarp + lane, word) : 0;
      // Again each warp has 32 rows, and a slice of the taps; it reads the first entries before it knows where they go.
      const int slices = tap_slices(groups), group = warp / slices, slice = warp % slices;
      const int32_t m = begin + group * kWarp + lane;
      const uint32_t mask = group < groups ? mask_of(a, own, m, word) : 0;
      const int32_t* from = a.table + int64_t{word} * kTapsOfWord * a.out_rows.rows + m;
      Pair* const to = a.pairs + int64_t{word} * kTapsOfWord * a.out_rows.rows;
      uint32_t taps = taps_of_slice(__reduce_or_sync(kAllLanes, mask), slices, slice);
      int32_t place = 0;  // of the tap that is this lane's number
      bool is_placed = false;
      do {
        int32_t rows[kPairTapsInFlight];
        const uint32_t rest = for_taps<kPairTapsInFlight>(taps, [&](int i, int tap) {
          if (mask >> tap & 1) rows[i] = from[int64_t{tap} * a.out_rows.rows];
        });
        if (!is_placed) {
          if (begin == own.begin) begin_taps(of, share, own_tap, a, next);
          first[warp][lane] = count_taps(to_count);
          __syncthreads();
          sum_up(first, next);
          __syncthreads();
          place = group < groups ? first[group][lane] : 0;
          is_placed = true;
        }
        for_taps<kPairTapsInFlight>(taps, [&](int i, int tap) {
          const unsigned having = __ballot_sync(kAllLanes, mask >> tap & 1);
          const int32_t at = __shfl_sync(kAllLanes, place, tap) + __popc(having & ((1u << lane) - 1));
          if (mask >> tap & 1) to[int64_t{tap} * a.out_rows.rows + at] = {rows[i], m};
        });
        taps = rest;
      } while (taps != 0);
      __syncthreads();
    }
  }
}

}  // namespace

cudaError_t list_pairs(const PairsArgs& a, cudaStream_t stream) {
  int32_t* const counts = static_cast<int32_t*>(a.workspace);
  JAXSPARSE_TRY(launch(count_pairs_kernel, kShares, {kShareThreads}, stream, a, counts));
  return launch(write_pairs_kernel, kShares, {kShareThreads}, stream, a, static_cast<const int32_t*>(counts));
}

}  // namespace jaxsparse::cuda
