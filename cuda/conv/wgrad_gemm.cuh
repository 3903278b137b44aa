// dw[k] = sum over pairs (i, m) of tap k of outer(x[i], g[m]), on tensor cores except for exact float32. Two kernels:
//
//     partial   a block multiplies one slot (see slots.cuh) for a [64 kGroups, kCols] piece of dw. The depth is the slot's
//               pairs, 64 per step (32 in float32). cp.async gathers rows of x and g to shared memory, a row per depth,
//               through a ring buffer of kStages that is never drained
//     reduce    dw[k] = the slots of tap k, added in a fixed order
//
// Bound by gathering, (in_channels + out_channels) features per pair, and with few channels by the latency of a step, so
// more blocks share a multiprocessor there: with 2, 3 and 4, partial and reduce took 66, 57 and 54 us (2.4 million pairs of
// 32 and 32 channels), 87, 80 and 115 (of 48 and 48), 89, 86 and 115 (of 64 and 64); 19.1 and 19.8 (363,123 of 64 and 64).
// All in float16; in float32 the numbers of blocks are the same. Rows that are short together, copied as one: 346,221 pairs
// of 32 and 32 channels 20.5 us to 18.5, 375,575 of 16 and 32 17.7 to 15.7; the first layer of SparseResNet21D, 172,663 rows
// of 4 and 16 channels, 36.5 to 30.6. Copies that skip absent channels, for all widths, cost 3 to 11 % at 64 and 256.
#pragma once

#include "cuda/conv/gemm.h"
#include "cuda/conv/product32.cuh"
#include "cuda/conv/slots.cuh"

namespace jaxsparse::cuda {

// Compile-time parameters of one kernel.
template <typename Arithmetic, int kRows_, int kCols_, int kStages_>
struct WgradGemm {
  using Product = cuda::Product<Arithmetic, kCols_, LayoutOfA::kDepthMajor>;
  using T = typename Product::T;
  static constexpr int kRows = kRows_, kCols = kCols_, kStages = kStages_;
  static constexpr int kGroups = kRows / kGroupRows, kThreads = kWarpgroup * kGroups;
  static constexpr int kBlocksAtLeast = Product::kThreadsAtLeast / kThreads;
  static constexpr int kStageBytes = kGroups * kBytesA + Product::kBytesB;
  static_assert(kGroups * Product::kFinishBytes <= kStages * kStageBytes);
  static constexpr int kPairSteps = 8;  // steps whose pairs fit the ring buffer of pairs
  static_assert(kPairSteps >= 2 * kStages);
  static constexpr int kPairBytes = kPairSteps * Product::kDepth * static_cast<int>(sizeof(Pair));
  static constexpr int kSharedBytes = kStages * kStageBytes + kPairBytes;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr int kRowsUnrolled = 4;  // unrolling of a thread's row copies
#else
constexpr int kRowsUnrolled = 2;  // with four, the products of mma.sync spill
#endif

template <class P>
__global__ void __launch_bounds__(P::kThreads, P::kBlocksAtLeast) wgrad_partial_kernel(WgradGemmArgs a) {
  using T = typename P::T;
  using Product = typename P::Product;
  constexpr int kCols = P::kCols, kGroups = P::kGroups, kStages = P::kStages, kThreads = P::kThreads;
  constexpr int kDepth = Product::kDepth, kInPiece = 16 / sizeof(T);
  char* const stages = dynamic_shared();
  Pair* const ring = reinterpret_cast<Pair*>(stages + kStages * P::kStageBytes);  // [kPairSteps, kDepth]

  const int t = threadIdx.x, lane = t % kWarp, group = own_warpgroup<kGroups>();
  const int32_t col_pieces = static_cast<int32_t>(div_up(a.out_channels, kCols));
  const int32_t pieces = static_cast<int32_t>(div_up(a.in_channels, P::kRows)) * col_pieces;
  const int32_t slot_number = static_cast<int32_t>(blockIdx.x) / pieces, piece = static_cast<int32_t>(blockIdx.x) % pieces;
  const int32_t first_row = piece / col_pieces * P::kRows, first_col = piece % col_pieces * kCols;
  const Slot slot = find_slot(a.tap_pairs, a.taps, a.slots, slot_number);
  if (slot.tap < 0) return;
  const int32_t count = slot.end - slot.begin, steps = (count + kDepth - 1) / kDepth;
  const bool reversed = slot.tap >= a.listed;  // the pairs are those of the opposite tap, reversed
  const Pair* pairs = a.pairs + int64_t{reversed ? a.taps - 1 - slot.tap : slot.tap} * a.out_rows + slot.begin;
  // Eight threads copy 128 bytes (a block of channels) of a row, then its other blocks, then further rows.
  constexpr int kInBlock = 8 * kInPiece, kBlocksA = P::kRows / kInBlock, kBlocksB = (kCols + kInBlock - 1) / kInBlock;
  constexpr int kRowsAtOnce = kThreads / 8, kRowsA = kRowsAtOnce * 128, kRowsB = kRowsAtOnce * Product::kRowBytesB;
  static_assert(kRowsAtOnce % 8 == 0, "rows at once lie alike in the swizzle");
  const int part = t % 8, first_depth = t / 8;
  const uint32_t a_to = Product::place_in_a(first_depth, part);
  const uint32_t b_to = kGroups * kBytesA + Product::place_in_b(first_depth, part);
  const char* x = reinterpret_cast<const char*>(static_cast<const T*>(a.x) + first_row + part * kInPiece);
  const char* g = reinterpret_cast<const char*>(static_cast<const T*>(a.g) + first_col + part * kInPiece);
  const uint32_t x_row_bytes = a.in_channels * sizeof(T), g_row_bytes = a.out_channels * sizeof(T);
  const int32_t x_there = a.in_channels - first_row - part * kInPiece;  // channels from the thread's first one on
  const int32_t g_there = min(a.out_channels - first_col, kCols) - part * kInPiece;
  const bool x_has_whole_pieces = a.in_channels % kInPiece == 0;
  // If a row of x and a row of g together fit 128 bytes, the eight threads divide both: each copies a piece of x or of g.
  // The other channels of the stage hold stale data, which affects only sums that are not stored.
  constexpr bool kMayBeShort = kGroups == 1 && kCols < kInBlock;
  const int32_t x_pieces = static_cast<int32_t>(div_up(a.in_channels, kInPiece));
  const bool are_short = kMayBeShort && x_pieces * kInPiece + a.out_channels <= kInBlock && pieces == 1;
  const bool copies_x = part < x_pieces;

  const auto copy_pairs = [&](int32_t step) {  // two pairs per thread; past the end of the slot zeros
    const int32_t at = step * kDepth + t * 2;
    if (t < kDepth / 2 && step < steps) {
      char* to = reinterpret_cast<char*>(ring + step % P::kPairSteps * kDepth + t * 2);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Pair* const from = pairs + at + i;
        if (reversed) {
          copy_piece<4>(to + 8 * i, &from->out_row, at + i < count);
          copy_piece<4>(to + 8 * i + 4, &from->in_row, at + i < count);
        } else {
          copy_piece<8>(to + 8 * i, from, at + i < count);
        }
      }
    }
  };
  const auto copy_rows = [&](int32_t step, int stage, auto whole_pieces) {
    char* const to = stages + stage;
    const Pair* from = ring + step % P::kPairSteps * kDepth + first_depth;
    const int32_t rows_there = count - step * kDepth - first_depth;
#pragma unroll kRowsUnrolled
    for (int i = 0; i < kDepth / kRowsAtOnce; ++i) {
      const Pair pair = from[i * kRowsAtOnce];
      const bool exists = rows_there > i * kRowsAtOnce;
      const char* from_x = x + wide(pair.in_row, x_row_bytes);
      const char* from_g = g + wide(pair.out_row, g_row_bytes);
#pragma unroll
      for (int block = 0; block < kBlocksA; ++block) {
        char* const to_a = to + a_to + i * kRowsA + block * Product::kBlockBytesA;
        const int32_t there = x_there - block * kInBlock;
        if constexpr (whole_pieces) {
          copy_piece<16>(to_a, from_x + block * 128, exists && there > 0);
        } else {
          copy_piece<8>(to_a, from_x + block * 128, exists && there > 0);
          copy_piece<8>(to_a + 8, from_x + block * 128 + 8, exists && there > kInPiece / 2);
        }
      }
#pragma unroll
      for (int block = 0; block < kBlocksB; ++block) {
        if (part * kInPiece + block * kInBlock >= kCols) continue;
        copy_piece<16>(to + b_to + i * kRowsB + block * Product::kBlockBytesB, from_g + block * 128,
                       exists && g_there > block * kInBlock);
      }
    }
  };
  const auto copy_short_rows = [&](int32_t step, int stage, auto whole_pieces) {
    const int piece = copies_x ? part : part - x_pieces;
    if (!copies_x && piece * kInPiece >= a.out_channels) return;
    const uint32_t place = copies_x ? Product::place_in_a(first_depth, piece)
                                    : kGroups * kBytesA + Product::place_in_b(first_depth, piece);
    char* const to = stages + stage + place;
    const char* const from = static_cast<const char*>(copies_x ? a.x : a.g) + piece * 16;
    const Pair* pairs_of_step = ring + step % P::kPairSteps * kDepth + first_depth;
    const int32_t* rows = copies_x ? &pairs_of_step->in_row : &pairs_of_step->out_row;
    const int32_t rows_there = count - step * kDepth - first_depth;
#pragma unroll
    for (int i = 0; i < kDepth / kRowsAtOnce; ++i) {
      const bool exists = rows_there > i * kRowsAtOnce;
      char* const to_row = to + i * (copies_x ? kRowsA : kRowsB);
      const char* const row = from + wide(rows[i * kRowsAtOnce * 2], copies_x ? x_row_bytes : g_row_bytes);
      if (whole_pieces || !copies_x) {
        copy_piece<16>(to_row, row, exists);
      } else {
        copy_piece<8>(to_row, row, exists);
        if (x_there > kInPiece / 2) copy_piece<8>(to_row + 8, row + 8, exists);
      }
    }
  };
  const auto copy_step = [&](int32_t step, int stage) {
    if (step >= steps) return;
    const auto copy = [&](auto whole_pieces) {
      if (are_short) {
        copy_short_rows(step, stage, whole_pieces);
      } else {
        copy_rows(step, stage, whole_pieces);
      }
    };
    if (x_has_whole_pieces) {
      copy(std::true_type());
    } else {
      copy(std::false_type());
    }
  };

  float sums[kCols / 2];
#pragma unroll
  for (float& sum : sums) sum = 0;
  // A step's pairs are copied kStages - 1 steps before its rows are, in the same cp.async groups.
  for (int i = 0; i < kStages - 1; ++i) copy_pairs(i);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  for (int i = 0; i < kStages - 1; ++i) {
    copy_step(i, i * P::kStageBytes);
    copy_pairs(i + kStages - 1);
    commit_copies();
  }
  int stage = 0, to_stage = (kStages - 1) * P::kStageBytes;
#pragma unroll 1
  for (int32_t step = 0; step < steps; ++step) {
    Product::wait();
    wait_for_copies<kStages - 2>();
    Product::see_copies();
    __syncthreads();
    const char* from = stages + stage;
    Product::multiply(sums, from + group * kBytesA, from + kGroups * kBytesA);
    copy_step(step + kStages - 1, to_stage);
    copy_pairs(step + 2 * (kStages - 1));
    commit_copies();
    stage = next_stage<kStages, P::kStageBytes>(stage);
    to_stage = next_stage<kStages, P::kStageBytes>(to_stage);
  }
  Product::wait();
  Product::finish(sums, stages + group * Product::kFinishBytes);

  float* to = static_cast<float*>(a.workspace) + int64_t{slot_number} * a.in_channels * a.out_channels;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t row = first_row + t / kWarp * 16 + lane / 4 + 8 * r;
    if (row >= a.in_channels) continue;
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
      const int32_t col = first_col + j * 8 + lane % 4 * 2;
      if (col >= a.out_channels) continue;
      *reinterpret_cast<float2*>(to + int64_t{row} * a.out_channels + col) =
          make_float2(sums[j * 4 + 2 * r], sums[j * 4 + 2 * r + 1]);
    }
  }
}

constexpr int kReduceThreads = 256, kSlotsAtOnce = 8;

// A block sums 1024 / kShares weights of one tap, four per thread. kShares threads share a weight; each adds every so
// many-th slot. With few weights a chain of reads takes the time, since a quarter of all slots may belong to one tap:
// 10.2 us with one share and four reads at a time, for 91,767 sites and 32 to 32 channels, where 8 shares take 4.2.
template <typename T, int kShares>
__global__ void wgrad_reduce_kernel(WgradGemmArgs a, int32_t tap_blocks) {
  constexpr int kInShare = kReduceThreads / kShares;
  const int32_t tap = static_cast<int32_t>(blockIdx.x) / tap_blocks, share = threadIdx.x / kInShare;
  const Range slots = slots_of_tap(a.tap_pairs, a.taps, a.slots, tap);
  const int64_t weights = int64_t{a.in_channels} * a.out_channels;  // a multiple of 4
  const int64_t i = (int64_t{blockIdx.x} % tap_blocks * kInShare + threadIdx.x % kInShare) * 4;
  const float* from = static_cast<const float*>(a.workspace) + i;
  const int32_t end = i < weights ? slots.end : 0;
  float4 sum = make_float4(0, 0, 0, 0);
  const auto add = [&](const float4& part) {
    sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
  };
  for (int32_t slot = slots.begin + share; slot < end; slot += kSlotsAtOnce * kShares) {
    float4 parts[kSlotsAtOnce];
#pragma unroll
    for (int j = 0; j < kSlotsAtOnce; ++j) {
      const int32_t at = slot + j * kShares;
      parts[j] = at < end ? *reinterpret_cast<const float4*>(from + at * weights) : make_float4(0, 0, 0, 0);
    }
#pragma unroll
    for (int j = 0; j < kSlotsAtOnce; ++j) add(parts[j]);
  }
  if constexpr (kShares > 1) {
    __shared__ float4 sums[kReduceThreads];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (share > 0) return;
#pragma unroll
    for (int other = 1; other < kShares; ++other) add(sums[other * kInShare + threadIdx.x]);
  }
  if (i >= weights) return;
  const int64_t at = tap * weights + i;
  const float parts[4] = {sum.x, sum.y, sum.z, sum.w};
  for (int e = 0; e < 4; ++e) {
    if (a.out_dtype == a.dtype) {
      static_cast<T*>(a.dw)[at + e] = narrow<T>(parts[e]);
    } else {
      static_cast<float*>(a.dw)[at + e] = parts[e];
    }
  }
}

template <class P>
cudaError_t launch_wgrad_gemm(const WgradGemmArgs& a, cudaStream_t stream) {
  const int64_t weights = int64_t{a.in_channels} * a.out_channels;
  const int64_t pieces = div_up(a.in_channels, P::kRows) * div_up(a.out_channels, P::kCols);
  const int shares = weights <= 64 * 64 ? 8 : weights <= 128 * 128 ? 2 : 1;
  const auto reduce = shares == 8   ? wgrad_reduce_kernel<typename P::T, 8>
                      : shares == 2 ? wgrad_reduce_kernel<typename P::T, 2>
                                    : wgrad_reduce_kernel<typename P::T, 1>;
  const int32_t tap_blocks = static_cast<int32_t>(div_up(weights * shares, kReduceThreads * 4));
  JAXSPARSE_TRY(
      cudaFuncSetAttribute(wgrad_partial_kernel<P>, cudaFuncAttributeMaxDynamicSharedMemorySize, P::kSharedBytes));
  JAXSPARSE_TRY(launch(wgrad_partial_kernel<P>, a.slots * pieces, {P::kThreads, P::kSharedBytes}, stream, a));
  return launch(reduce, int64_t{a.taps} * tap_blocks, {kReduceThreads}, stream, a, tap_blocks);
}

}  // namespace jaxsparse::cuda
