// dw[k] = sum over pairs (i, m) of tap k, m real and i = table[k, m], of outer(x[i], g[m]).
//
//     list      the pairs (i, m) of each tap, in the order of m; see pairs.h
//     plan      how many pairs one slot takes, so that all pairs fill the fixed number of slots; first slot of a tap
//     partial   a block a slot and 64 x 64 piece of dw: one matrix product over the slot's pairs, as deep as there are
//               pairs, gathered to shared memory three steps in flight; the sum goes to the slot
//     reduce    dw[k] = the slots of tap k, added in order
//
// So work follows the number of pairs and is split evenly whatever the tap. The split depends on the pairs of the real
// rows and on channels and taps, never on capacity, and no float is added atomically: equal rows give equal bits.
// Bound by gathering: each pair moves (in_channels + out_channels) features for their product.
#include "cuda/common/device.cuh"
#include "cuda/conv/conv.h"
#include "cuda/conv/gather.cuh"

namespace jaxsparse::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int32_t kMinPairsInSlot = 256;  // fewer would spend more on writing and adding slots than on the products

struct Plan {
  Pair* pairs;             // [taps, out_rows], the first tap_pairs[k] of each tap written
  int32_t* tap_pairs;      // [taps]
  int32_t* first_slot;     // [taps + 1]
  int32_t* pairs_in_slot;  // [1]
  void* partials;          // [slots, in_channels, out_channels]
  int32_t slots;
};

// One block. With R = ceil(pairs / (slots - taps)) pairs in a slot, the taps need sum_k ceil(pairs_k / R)
// <= pairs / R + taps <= slots.
__global__ void plan_kernel(Plan plan, int32_t taps) {
  int64_t own = 0, pairs;
  for (int32_t k = static_cast<int32_t>(threadIdx.x); k < taps; k += kThreads) own += plan.tap_pairs[k];
  block_exclusive_scan<kThreads>(own, &pairs);
  const int64_t even = div_up(pairs, plan.slots - taps);
  const int32_t in_slot = even > kMinPairsInSlot ? static_cast<int32_t>(even) : kMinPairsInSlot;
  int32_t sum = 0;
  for (int32_t first = 0; first < taps; first += kThreads) {
    const int32_t k = first + static_cast<int32_t>(threadIdx.x);
    const int32_t own_slots = k < taps ? static_cast<int32_t>(div_up(plan.tap_pairs[k], in_slot)) : 0;
    int32_t total;
    const int32_t before = block_exclusive_scan<kThreads>(own_slots, &total);
    if (k < taps) plan.first_slot[k] = sum + before;
    sum += total;
  }
  if (threadIdx.x == 0) {
    plan.first_slot[taps] = sum;
    *plan.pairs_in_slot = in_slot;
  }
}

template <typename Tile>
__global__ void __launch_bounds__(kTileThreads) partial_kernel(ConvWgradArgs a, Plan plan) {
  using T = typename Tile::T;
  using Sum = typename Tile::Sum;
  using GatherPairs = Gather<T, kDepth<T>, kTileCols>;
  static_assert(Tile::kRows == kTileCols, "rows and columns of the piece are gathered alike");
  constexpr int kOperandElements = kElementsB<T>;
  constexpr int kStageElements = 2 * kOperandElements;
  constexpr int kStageBytes = kStages * kStageElements * static_cast<int>(sizeof(T));
  constexpr int kResultBytes = Tile::kRows * kStrideC * static_cast<int>(sizeof(Sum));
  alignas(128) __shared__ unsigned char shared[kStageBytes > kResultBytes ? kStageBytes : kResultBytes];

  const int32_t col_pieces = static_cast<int32_t>(div_up(a.out_channels, kTileCols));
  const int32_t pieces = static_cast<int32_t>(div_up(a.in_channels, kTileCols)) * col_pieces;
  const int32_t slot = static_cast<int32_t>(blockIdx.x / pieces);
  const int32_t piece = static_cast<int32_t>(blockIdx.x % pieces);
  if (slot >= plan.first_slot[a.taps]) return;
  const int32_t first_row = piece / col_pieces * kTileCols;
  const int32_t first_col = piece % col_pieces * kTileCols;
  const int32_t used_rows = min(kTileCols, a.in_channels - first_row);
  const int32_t used_cols = min(kTileCols, a.out_channels - first_col);

  int32_t k = 0, high = a.taps;  // k becomes the last tap whose first slot is not past this one: the tap that has it
  while (high - k > 1) {
    const int32_t middle = k + (high - k) / 2;
    if (plan.first_slot[middle] <= slot) {
      k = middle;
    } else {
      high = middle;
    }
  }
  const Pair* pairs = plan.pairs + static_cast<int64_t>(k) * a.out_rows.rows;
  const int32_t begin = (slot - plan.first_slot[k]) * *plan.pairs_in_slot;
  const int32_t end = min(begin + *plan.pairs_in_slot, plan.tap_pairs[k]);
  const int32_t steps = static_cast<int32_t>(div_up(end - begin, kDepth<T>));

  const T* x = static_cast<const T*>(a.x);
  const T* g = static_cast<const T*>(a.g);
  const bool x_vectors = rows_are_vectors<T>(x, a.in_channels);
  const bool g_vectors = rows_are_vectors<T>(g, a.out_channels);

  Pair next[GatherPairs::kOwn];  // read a step ahead of the copies that need them
  const auto fetch_pairs = [&](int32_t step) {
#pragma unroll
    for (int i = 0; i < GatherPairs::kOwn; ++i) {
      const int32_t p = begin + step * kDepth<T> + GatherPairs::own_row(i);
      next[i] = p < end ? pairs[p] : Pair{-1, -1};
    }
  };
  const auto copy_step = [&](int32_t step) {
    if (step < steps) {
      T* tile_a = reinterpret_cast<T*>(shared) + step % kStages * kStageElements;
      GatherPairs::copy(tile_a, kStrideB<T>, x, a.in_channels, first_row, x_vectors,
                        [&](int i) { return next[i].in_row; });
      GatherPairs::copy(tile_a + kOperandElements, kStrideB<T>, g, a.out_channels, first_col, g_vectors,
                        [&](int i) { return next[i].out_row; });
      fetch_pairs(step + 1);
    }
    __pipeline_commit();
  };

  Tile tile;
  tile.clear();
  fetch_pairs(0);
  for (int32_t step = 0; step < kStages - 1; ++step) copy_step(step);
  for (int32_t step = 0; step < steps; ++step) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();
    copy_step(step + kStages - 1);
    const T* tile_a = reinterpret_cast<const T*>(shared) + step % kStages * kStageElements;
    tile.multiply(tile_a, tile_a + kOperandElements, used_rows, used_cols);
  }
  __pipeline_wait_prior(0);
  __syncthreads();

  Sum* result = reinterpret_cast<Sum*>(shared);
  tile.store(result);
  __syncthreads();
  Sum* partial = static_cast<Sum*>(plan.partials) + static_cast<int64_t>(slot) * a.in_channels * a.out_channels;
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * kTileCols; i += kTileThreads) {
    const int r = i / kTileCols, c = i % kTileCols;
    if (r < used_rows && c < used_cols) {
      partial[static_cast<int64_t>(first_row + r) * a.out_channels + first_col + c] = result[r * kStrideC + c];
    }
  }
}

template <typename T>
__global__ void reduce_kernel(ConvWgradArgs a, Plan plan) {
  const int64_t weights = static_cast<int64_t>(a.in_channels) * a.out_channels;  // of a tap
  const int64_t i = global_thread();
  if (i >= weights * a.taps) return;
  const int32_t k = static_cast<int32_t>(i / weights);
  const Accumulator<T>* partial = static_cast<const Accumulator<T>*>(plan.partials) + i % weights;
  Accumulator<T> sum = 0;
#pragma unroll 4
  for (int32_t slot = plan.first_slot[k]; slot < plan.first_slot[k + 1]; ++slot) sum += partial[slot * weights];
  if (a.out_dtype == a.dtype) {
    static_cast<T*>(a.dw)[i] = narrow<T>(sum);
  } else {
    static_cast<float*>(a.dw)[i] = static_cast<float>(sum);
  }
}

template <template <typename, int, LayoutA> class Tile, typename T>
cudaError_t run(const ConvWgradArgs& a, cudaStream_t stream) {
  const int64_t sum_bytes = sizeof(Accumulator<T>);
  Plan plan;
  plan.slots = static_cast<int32_t>(wgrad_slots(a.taps, a.in_channels, a.out_channels, sum_bytes));
  Workspace workspace(a.workspace);
  plan.pairs = workspace.take<Pair>(static_cast<int64_t>(a.taps) * a.out_rows.rows);
  plan.tap_pairs = workspace.take<int32_t>(a.taps);
  void* const of_pairs = workspace.take<char>(pairs_workspace(a.taps, a.out_rows.rows));
  const PairsArgs list{a.table, a.masks, a.out_rows, a.taps, a.mask_words, plan.pairs, plan.tap_pairs, of_pairs};
  plan.first_slot = workspace.take<int32_t>(a.taps + 1);
  plan.pairs_in_slot = workspace.take<int32_t>(1);
  plan.partials = workspace.take<Accumulator<T>>(0);

  const int64_t pieces = div_up(a.in_channels, kTileCols) * div_up(a.out_channels, kTileCols);
  const int64_t weights = static_cast<int64_t>(a.taps) * a.in_channels * a.out_channels;
  JAXSPARSE_TRY(list_pairs(list, stream));
  JAXSPARSE_TRY(launch(plan_kernel, 1, {kThreads}, stream, plan, a.taps));
  using PieceTile = Tile<T, kTileCols, LayoutA::kDepthMajor>;
  JAXSPARSE_TRY(launch(partial_kernel<PieceTile>, plan.slots * pieces, {kTileThreads}, stream, a, plan));
  return launch(reduce_kernel<T>, div_up(weights, kThreads), {kThreads}, stream, a, plan);
}

}  // namespace

cudaError_t conv_wgrad(const ConvWgradArgs& a, cudaStream_t stream) {
  switch (a.dtype) {
    case Dtype::kF16: return run<TensorTile, __half>(a, stream);
    case Dtype::kBF16: return run<TensorTile, __nv_bfloat16>(a, stream);
    case Dtype::kF32: return run<FmaTile, float>(a, stream);
    case Dtype::kF64: return run<FmaTile, double>(a, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jaxsparse::cuda
