// Lists the pairs of each tap of a kernel map. count: from the masks, the pairs per tap in each share of the output rows,
// and within a share before each 32 rows. write: a block per tile of rows writes its pairs behind the earlier ones.
//
// Measured on an H200, 3^3 kernel on the levels of a LiDAR scan, 91,767 to 5,879 rows: 9.2, 7.1, 6.2, 5.0, 4.7 us with all taps
// listed, of which count 2.9 to 2.1; with 14 of 27 up to 1.1 us less. Slower, all listed: a block per share writes all its
// pairs, 15.5, 11.9, 9.7, 8.9, 8.4; two blocks per share, half of the taps each, 18.2, 14.2, 11.0, 9.7, 9.2; three kernels that
// read the whole table twice, 22.1, 15.8, 10.4, 7.6, 6.9.
#include "cuda/conv/pairs.h"

#include "cuda/conv/entries.cuh"

namespace jaxsparse::cuda {
namespace {

constexpr int kCountThreads = 1024;
constexpr int kTileRows = 2 * kWarp;
static_assert(kCountThreads / kWarp == kTapsOfWord && kTapsOfWord == kWarp, "a warp adds up a tap, a lane has one");

// Words of a mask with taps that are listed.
__host__ __device__ int32_t words_of(const PairsArgs& a) { return (a.listed + kTapsOfWord - 1) / kTapsOfWord; }

// Transposes a 32 x 32 bit matrix over a warp: bit i of lane k in the result is bit k of lane i.
__device__ uint32_t transposed(uint32_t bits) {
  const int lane = threadIdx.x % kWarp;
  uint32_t low = 0x0000ffffu;  // the bits kept by a lane whose number lacks the bit `step`
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, bits, step);
    bits = lane & step ? (bits & ~low) | (other >> step & low) : (bits & low) | (other << step & ~low);
    low ^= low << step / 2;
  }
  return bits;
}

__global__ void __launch_bounds__(kCountThreads) count_pairs_kernel(PairsArgs a, int32_t* counts, int32_t* starts) {
  __shared__ int32_t next[kTapsOfWord];                      // pairs of each tap in the share so far
  __shared__ int32_t before[kTapsOfWord][kTapsOfWord + 1];  // [warp][tap]: pairs in the warp's rows, then before them
  const int t = threadIdx.x, lane = t % kWarp, warp = t / kWarp, share = blockIdx.x;
  const Range own = rows_of_shares<kPairShares>(end_of_real_rows(a.out_rows), share, share + 1);
  const int64_t groups = div_up(a.out_rows.rows, kWarp);
  for (int32_t word = 0; word < words_of(a); ++word) {
    if (t < kTapsOfWord) next[t] = 0;
    for (int32_t begin = own.begin; begin < own.end; begin += kCountThreads) {
      const int32_t m = begin + t;
      const bool is_real = m < own.end && (a.out_rows.number == 1 || row_is_real(a.out_rows, m));
      before[warp][lane] = __popc(transposed(is_real ? a.masks[int64_t{m} * a.mask_words + word] : 0));
      __syncthreads();
      const int32_t count = before[lane][warp], earlier = next[warp];  // of tap `warp`, in the rows of warp `lane`
      const int32_t upto = warp_inclusive_scan(count);
      before[lane][warp] = earlier + upto - count;
      if (lane == kWarp - 1) next[warp] = earlier + upto;
      __syncthreads();
      if (m - lane < own.end) starts[(word * groups + m / kWarp) * kTapsOfWord + lane] = before[warp][lane];
    }
    if (t < kTapsOfWord) counts[(int64_t{word} * kPairShares + share) * kTapsOfWord + t] = next[t];
  }
}

// A block writes a tile's pairs. Each warp has a slice of the taps, each lane two rows; all loads of entries are in flight.
template <int kSlices>
__global__ void __launch_bounds__(kSlices* kWarp, 36 / kSlices)
    write_pairs_kernel(PairsArgs a, const int32_t* counts, const int32_t* starts) {
  constexpr int kTapsOfSlice = kTapsOfWord / kSlices, kSharesOfSlice = kPairShares / kSlices;
  __shared__ int32_t sums[kSlices][kTapsOfWord];
  const int lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp;
  const int32_t first = static_cast<int32_t>(blockIdx.x) * kTileRows, n = end_of_real_rows(a.out_rows);
  const int share = first < n ? static_cast<int>(first / share_size(n, kTileRows, kPairShares)) : 0;
  const int64_t groups = div_up(a.out_rows.rows, kWarp);
  for (int32_t word = 0; word < words_of(a); ++word) {
    const int32_t unlisted = max((word + 1) * kTapsOfWord - a.listed, 0);
    int32_t row[2], place[2];  // place: pairs of tap `lane` in the share before these 32 rows
    uint32_t mask[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row[r] = first + r * kWarp + lane;
      const uint32_t of_row = row[r] < a.out_rows.rows ? a.masks[int64_t{row[r]} * a.mask_words + word] : 0;
      mask[r] = row_is_real(a.out_rows, row[r]) ? of_row & ~0u >> unlisted : 0;  // loaded before this is known
      place[r] = row[r] - lane < n ? starts[(word * groups + row[r] / kWarp) * kTapsOfWord + lane] : 0;
    }
    int32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kSharesOfSlice; ++i) {
      const int other = i * kSlices + slice;
      if (other < share || first == 0) sum += counts[(int64_t{word} * kPairShares + other) * kTapsOfWord + lane];
    }
    const uint32_t taps = taps_of_slice(__reduce_or_sync(kAllLanes, mask[0] | mask[1]), kSlices, slice);
    const int32_t* const from = a.table + int64_t{word} * kTapsOfWord * a.out_rows.rows;
    int32_t entries[kTapsOfSlice][2];
    for_taps<kTapsOfSlice>(taps, [&](int i, int tap) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (mask[r] >> tap & 1) entries[i][r] = from[int64_t{tap} * a.out_rows.rows + row[r]];
      }
    });
    if (word > 0) __syncthreads();
    sums[slice][lane] = sum;
    __syncthreads();
    sum = 0;
#pragma unroll
    for (int i = 0; i < kSlices; ++i) sum += sums[i][lane];
    if (first == 0) {  // this block has summed over all shares
      if (const int32_t tap = word * kTapsOfWord + lane; slice == 0 && tap < a.listed) {
        a.tap_pairs[tap] = sum;
        if (a.listed < a.taps) a.tap_pairs[a.taps - 1 - tap] = sum;
      }
      sum = 0;
    }
    Pair* const to = a.pairs + int64_t{word} * kTapsOfWord * a.out_rows.rows;
    for_taps<kTapsOfSlice>(taps, [&](int i, int tap) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const unsigned having = __ballot_sync(kAllLanes, mask[r] >> tap & 1);
        const int32_t at = __shfl_sync(kAllLanes, sum + place[r], tap) + __popc(having & ((1u << lane) - 1));
        if (mask[r] >> tap & 1) to[int64_t{tap} * a.out_rows.rows + at] = {entries[i][r], row[r]};
      }
    });
  }
}

}  // namespace

cudaError_t list_pairs(const PairsArgs& a, cudaStream_t stream) {
  Workspace workspace(a.workspace);
  int32_t* const counts = workspace.take<int32_t>(int64_t{words_of(a)} * kTapsOfWord * kPairShares);
  int32_t* const starts = workspace.take<int32_t>(words_of(a) * kTapsOfWord * div_up(a.out_rows.rows, kWarp));
  JAXSPARSE_TRY(launch(count_pairs_kernel, kPairShares, {kCountThreads}, stream, a, counts, starts));
  const int64_t tiles = div_up(a.out_rows.rows, kTileRows);
  if (tiles <= kFewTiles) return launch(write_pairs_kernel<8>, tiles, {8 * kWarp}, stream, a, counts, starts);
  return launch(write_pairs_kernel<4>, tiles, {4 * kWarp}, stream, a, counts, starts);
}

}  // namespace jaxsparse::cuda
