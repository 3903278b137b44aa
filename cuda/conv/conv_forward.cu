// y[m] = sum_k x[table[k, m]] @ w[k] in float64, taps in increasing order, as an implicit GEMM.
//
// A block computes kRows output rows x 64 output columns, with sums in registers. It walks over the taps that any of its
// rows has, and over the input channels eight at a time. Each step copies gathered pieces of rows, A [kRows, 8], and
// weights, B [8, 64], to shared memory, through a ring buffer of three stages that is not drained between taps.
//
// If the weights are finite, a row's result is bitwise independent of the other rows in its tile. A tap that the row lacks
// but a tile mate has adds products 0 * w = +-0 to the row's sum s, and s + (+-0) = s for every s but one: (-0) + (+0) = +0.
// So only the sign of a zero can differ on the way; no later sum of non-zeros depends on it, and the last step, s + 0, turns
// -0 into +0. An infinite or NaN weight does reach the tile mates of a row that has its tap.
#include "cuda/conv/conv.h"
#include "cuda/conv/tile.cuh"

namespace jaxsparse::cuda {
namespace {

constexpr int kRows = 32;
using CopyA = Copy<kRows, kDepth>;
using CopyB = Copy<kDepth, kTileCols>;
static_assert(CopyA::kOwn == 1, "a thread copies a piece of one row of A");

// The position in the loop over the taps of one mask word and the channels, and the input row of the thread's piece of A.
struct Walk {
  uint32_t later;  // taps of the word after next_tap
  int32_t tap, next_tap;
  int32_t channel;
  uint32_t mask;  // the taps of the thread's row; for others the table is undefined
  int32_t row, next_row;

  __device__ void start(const ConvForwardArgs& a, int32_t first_row, int32_t word, uint32_t bits) {
    later = bits;
    channel = 0;
    const int64_t m = first_row + CopyA::row(0);
    mask = m < a.out_rows.rows ? a.masks[m * a.mask_words + word] : 0;
    fetch_next(a, first_row, word);
    step_to_next(a, first_row, word);
  }

  __device__ void advance(const ConvForwardArgs& a, int32_t first_row, int32_t word) {
    channel += kDepth;
    if (channel < a.in_channels) return;
    channel = 0;
    step_to_next(a, first_row, word);
  }

 private:
  __device__ void step_to_next(const ConvForwardArgs& a, int32_t first_row, int32_t word) {
    tap = next_tap;
    row = next_row;
    fetch_next(a, first_row, word);
  }

  // Reads the table one tap ahead of the copies that need it.
  __device__ void fetch_next(const ConvForwardArgs& a, int32_t first_row, int32_t word) {
    if (later == 0) return;
    const int bit = __ffs(static_cast<int>(later)) - 1;
    next_tap = word * kTapsOfWord + bit;
    later &= later - 1;
    const int32_t* entries = a.table + static_cast<int64_t>(next_tap) * a.out_rows.rows;
    const int32_t in_row = mask >> bit & 1 ? entries[first_row + CopyA::row(0)] : -1;
    next_row = in_row < a.in_rows ? in_row : -1;
  }
};

__global__ void __launch_bounds__(kTileThreads) conv_forward_kernel(ConvForwardArgs a) {
  constexpr int kElementsA = kRows * kStrideA;
  alignas(16) __shared__ double shared[kStages][kElementsA + kDepth * kStrideB];
  __shared__ uint32_t tile_masks[2];  // used in turn, since words without taps are skipped without a barrier

  const int32_t col_tiles = static_cast<int32_t>(div_up(a.out_channels, kTileCols));
  const int32_t first_row = static_cast<int32_t>(blockIdx.x / col_tiles) * kRows;
  const int32_t first_col = static_cast<int32_t>(blockIdx.x % col_tiles) * kTileCols;
  const int t = threadIdx.x;
  const bool own_row_is_real = t < kRows && row_is_real(a.out_rows, first_row + t);

  Tile64<kRows, kStrideA, 1> tile;
  const int32_t channel_steps = static_cast<int32_t>(div_up(a.in_channels, kDepth));
  for (int32_t word = 0; word < a.mask_words; ++word) {
    uint32_t& tile_mask = tile_masks[word % 2];
    if (t == 0) tile_mask = 0;
    __syncthreads();
    if (own_row_is_real) {
      const uint32_t mask = a.masks[static_cast<int64_t>(first_row + t) * a.mask_words + word];
      if (mask != 0) atomicOr(&tile_mask, mask);
    }
    __syncthreads();
    const uint32_t bits = tile_mask;
    if (bits == 0) continue;

    Walk walk;
    walk.start(a, first_row, word, bits);
    const int32_t steps = __popc(bits) * channel_steps;
    const auto copy_step = [&](int32_t step) {
      if (step < steps) {
        double* stage = shared[step % kStages];
        CopyA::begin(stage, kStrideA, a.x, a.in_channels, walk.channel, [&](int) { return walk.row; });
        const int64_t first_weight = static_cast<int64_t>(walk.tap) * a.in_channels + walk.channel;
        CopyB::begin(stage + kElementsA, kStrideB, a.w, a.out_channels, first_col, [&](int i) {
          const int d = CopyB::row(i);
          return walk.channel + d < a.in_channels ? first_weight + d : int64_t{-1};
        });
        walk.advance(a, first_row, word);
      }
      commit_copies();  // past the last step an empty group, so that the count of groups in flight holds
    };

    for (int32_t step = 0; step < kStages - 1; ++step) copy_step(step);
    for (int32_t step = 0; step < steps; ++step) {
      wait_for_copies<kStages - 2>();
      __syncthreads();  // this step's operands have arrived for all; the previous stage is free
      copy_step(step + kStages - 1);
      const double* stage = shared[step % kStages];
      tile.multiply(stage, stage + kElementsA);
    }
    wait_for_copies<0>();
    __syncthreads();  // the stages are free for the next word
  }

  tile.for_each([&](int row, int col, double sum) {
    const int32_t m = first_row + row, c = first_col + col;
    if (m >= a.out_rows.rows || c >= a.out_channels) return;
    a.y[static_cast<int64_t>(m) * a.out_channels + c] = row_is_real(a.out_rows, m) ? sum + 0.0 : 0.0;
  });
}

}  // namespace

cudaError_t conv_forward(const ConvForwardArgs& a, cudaStream_t stream) {
  const int64_t blocks = div_up(a.out_rows.rows, kRows) * div_up(a.out_channels, kTileCols);
  return launch(conv_forward_kernel, blocks, {kTileThreads}, stream, a);
}

}  // namespace jaxsparse::cuda
