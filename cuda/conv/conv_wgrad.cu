// dw[k] = sum over pairs (i, m) of tap k, m real and i = table[k, m], of outer(x[i], g[m]), in float64.
//
//     list      the pairs (i, m) of each tap, in the order of m; see pairs.h
//     partial   a block per slot (see slots.cuh) and 64 x 64 piece of dw: a matrix product whose depth is the slot's pairs,
//               gathered through a ring buffer of three stages; the sum goes to the slot's partial
//     reduce    dw[k] = the slots of tap k, added in order
//
// Bound by gathering: (in_channels + out_channels) features per pair.
#include "cuda/conv/conv.h"
#include "cuda/conv/slots.cuh"
#include "cuda/conv/tile.cuh"

namespace jaxsparse::cuda {
namespace {

struct Plan {
  Pair* pairs;         // [taps, out_rows], of which the first tap_pairs[k] of tap k are written
  int32_t* tap_pairs;  // [taps]
  double* partials;    // [slots, in_channels, out_channels]
  int32_t slots;
};

__global__ void __launch_bounds__(kTileThreads) partial_kernel(ConvWgradArgs a, Plan plan) {
  using CopyPairs = Copy<kDepth, kTileCols>;
  constexpr int kElements = kDepth * kStrideB;  // per operand
  alignas(16) __shared__ double shared[kStages][2 * kElements];

  const int32_t col_pieces = static_cast<int32_t>(div_up(a.out_channels, kTileCols));
  const int32_t pieces = static_cast<int32_t>(div_up(a.in_channels, kTileCols)) * col_pieces;
  const int32_t slot_number = static_cast<int32_t>(blockIdx.x / pieces);
  const int32_t piece = static_cast<int32_t>(blockIdx.x % pieces);
  const int32_t first_row = piece / col_pieces * kTileCols;
  const int32_t first_col = piece % col_pieces * kTileCols;
  const Slot slot = find_slot(plan.tap_pairs, a.taps, plan.slots, slot_number);
  if (slot.tap < 0) return;
  const Pair* pairs = plan.pairs + static_cast<int64_t>(slot.tap) * a.out_rows.rows;
  const int32_t steps = static_cast<int32_t>(div_up(slot.end - slot.begin, kDepth));

  Pair next[CopyPairs::kOwn];  // read a step ahead of the copies that need them
  const auto fetch_pairs = [&](int32_t step) {
#pragma unroll
    for (int i = 0; i < CopyPairs::kOwn; ++i) {
      const int32_t p = slot.begin + step * kDepth + CopyPairs::row(i);
      next[i] = p < slot.end ? pairs[p] : Pair{-1, -1};
    }
  };
  const auto copy_step = [&](int32_t step) {
    if (step < steps) {
      double* stage = shared[step % kStages];
      CopyPairs::begin(stage, kStrideB, a.x, a.in_channels, first_row, [&](int i) { return next[i].in_row; });
      CopyPairs::begin(stage + kElements, kStrideB, a.g, a.out_channels, first_col,
                       [&](int i) { return next[i].out_row; });
      fetch_pairs(step + 1);
    }
    commit_copies();
  };

  Tile64<kTileCols, 1, kStrideB> tile;
  fetch_pairs(0);
  for (int32_t step = 0; step < kStages - 1; ++step) copy_step(step);
  for (int32_t step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    copy_step(step + kStages - 1);
    const double* stage = shared[step % kStages];
    tile.multiply(stage, stage + kElements);
  }

  double* partial = plan.partials + static_cast<int64_t>(slot_number) * a.in_channels * a.out_channels;
  tile.for_each([&](int row, int col, double sum) {
    if (first_row + row >= a.in_channels || first_col + col >= a.out_channels) return;
    partial[static_cast<int64_t>(first_row + row) * a.out_channels + first_col + col] = sum;
  });
}

constexpr int kThreads = 256;

// A block sums 256 weights of one tap.
__global__ void reduce_kernel(ConvWgradArgs a, Plan plan, int32_t tap_blocks) {
  const int32_t tap = static_cast<int32_t>(blockIdx.x) / tap_blocks;
  const Range slots = slots_of_tap(plan.tap_pairs, a.taps, plan.slots, tap);
  const int64_t weights = static_cast<int64_t>(a.in_channels) * a.out_channels;  // per tap
  const int64_t i = int64_t{blockIdx.x} % tap_blocks * kThreads + threadIdx.x;
  if (i >= weights) return;
  double sum = 0;
#pragma unroll 4
  for (int32_t slot = slots.begin; slot < slots.end; ++slot) sum += plan.partials[slot * weights + i];
  a.dw[tap * weights + i] = sum;
}

}  // namespace

cudaError_t conv_wgrad(const ConvWgradArgs& a, cudaStream_t stream) {
  Plan plan;
  plan.slots = static_cast<int32_t>(wgrad_slots(a.taps, a.in_channels, a.out_channels));
  Workspace workspace(a.workspace);
  plan.pairs = workspace.take<Pair>(static_cast<int64_t>(a.taps) * a.out_rows.rows);
  plan.tap_pairs = workspace.take<int32_t>(a.taps);
  void* const of_pairs = workspace.take<char>(pairs_workspace(a.taps, a.out_rows.rows));
  const PairsArgs list{a.table, a.masks, a.out_rows, a.taps, a.mask_words, a.taps, plan.pairs, plan.tap_pairs, of_pairs};
  plan.partials = workspace.take<double>(0);

  const int64_t pieces = div_up(a.in_channels, kTileCols) * div_up(a.out_channels, kTileCols);
  const int32_t tap_blocks = static_cast<int32_t>(div_up(int64_t{a.in_channels} * a.out_channels, kThreads));
  JAXSPARSE_TRY(list_pairs(list, stream));
  JAXSPARSE_TRY(launch(partial_kernel, plan.slots * pieces, {kTileThreads}, stream, a, plan));
  return launch(reduce_kernel, int64_t{a.taps} * tap_blocks, {kThreads}, stream, a, plan, tap_blocks);
}

}  // namespace jaxsparse::cuda
