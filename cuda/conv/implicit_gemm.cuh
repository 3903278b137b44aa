// Forward sparse convolution, y[m] = sum_k x[table[k, m]] @ w[k], as an implicit GEMM. It runs on tensor cores, except for
// exact float32.
//
// A block computes a tile of kRows output rows x kCols output columns, with its sums in registers. `order` puts rows with
// similar tap masks into one tile; the block skips taps that none of its rows has. The depth of the product is the list of
// all (tap, input channel) of the remaining taps. One step covers 128 bytes of it, whatever the number of channels:
//
//     A [kRows, kDepth]   gathered rows of x; rows without the tap are 0
//     B [kDepth, kCols]   weights; transposed for float32, one row per column
//
// cp.async copies both to shared memory, in 16-byte pieces if the channels allow it, through a ring buffer of kStages. The
// ring is drained only after each 32 taps (a word of the mask). Rows of 128 bytes are stored with the 128-byte swizzle,
// which wgmma and ldmatrix read without bank conflicts.
//
// Reproducibility: tensor cores add 16 products (16-bit) or 8 (TF32) at a time. If the channels are a multiple of that,
// these products belong to one tap, and a row's result is bitwise independent of the tile size and of the other rows in its
// tile: a tap that only those have adds zeros. Otherwise the tap list decides which products are rounded together.
//
// Splits, for layers with few tiles: the kSplits blocks of a cluster share a tile. Each multiplies its part of the input
// channels, for all taps; then they exchange sums through shared memory, and each finishes kCols / kSplits columns.
// Splitting channels rather than taps or steps balances the blocks and keeps the property above.
//
// With many tiles and channels no unit bounds it alone: L2 sends 5.7 to 6.7 TB/s, it and shared memory are used for 52 to 63 %
// of the time, tensor cores for half. The bytes are a row of x per pair and column tile, the weights of a tap per row tile
// that has it, and y. At deep levels, with fewer than two blocks per multiprocessor, the tile with the most taps decides: 27
// of them where the mean is 15. Splits are for those. Also tried there, with correct results:
//     an equal share of all taps for each resident block, with partial sums exchanged: 67 to 40 us (5,890 sites, 256 to 256
//     channels), elsewhere up to 40 % slower; with tiles of 256 rows: 67 to 45
//     the longest tiles paired with the shortest on a multiprocessor: within 1 %, since block placement is not fixed
//
// Measured on an H100, finest level of a LiDAR scan (91,767 sites, 3.8 neighbours), 64 to 64 channels: 20.5 us. Slower:
//     50.6 us   rows in the order of sites
//     29.7      mma.sync instead of wgmma
//     28.1      map entries read through `order` instead of the tiled table, and a pipeline one step shallower
//     42        A gathered into registers: wgmma's fragment interleaves two rows, so each load must complete and be moved
//
// L2 looks up each line that a copy instruction touches. Rows of weights were once copied by two threads (tiles of 64 rows)
// or four (128), so that an instruction touched 16 or 8 lines; now by eight, 4 lines. That took 15 to 45 % off tiles of 64
// rows and 64 columns, 6 to 8 % off 128x128, 2 to 3 % off whole networks, on an H200. There in us:
//     18.2 with 64x64/3, 18.9 with 128x64/4   91,767 sites, 64 to 64, as above; 22.2 with 256x64/4
//     17.4, 17.6                              60,107 sites, 64 to 64; 20.8 with 256x64/4
//     40.8 with 128x128/3, 44.7 with 64x128/4 60,107 sites, 128 to 128; 50.8 with 256x128/4
//     30.5 with 128x96/3, 40.0 with 64x96/3   91,767 sites, 96 to 96; 36.4 with 256x96/4
// Tiles of 256 rows won nowhere, neither did 64x48/4, 64x96/3, 64x96/4, 64x64/6 and 64x128/4; 64x64/8 and 64x128/6 on one
// small layer each, by 5 and 2 %.
//
// With few tiles, a deeper ring helps: 64x32/6 14.1 us, /3 15.0 (19,078 sites of 2.8 neighbours, 96 to 96). With many it
// costs occupancy: 6.6 instead of 5.4 (kernel 2, stride 2, 60,107 outputs, 32 to 32). With hundreds of taps 64x32/4 is
// best: 79.4, /3 88.3 (31,833 sites, 7^3 taps, 32 to 32).
//
// Most instructions of a step belong to the copies, and their number matters: 106 with 128x128/3, once 176. Gains:
//     unsigned instead of signed 64-bit products for addresses, which take three instructions each: 71.6 to 65.7 us (14,474
//     sites, 256 to 256), 39.2 to 36.6 (31,833 sites, 128 to 128)
//     the look-up of the row no longer waits for that of the tap: 7 % with tiles of 64 columns
//     stay_here keeps the compiler from recomputing values in every step
//     136 to 106, SparseResUNet42 1.58 ms to 1.52, at 19,078 sites 1.00 to 0.97: a thread's four entries of the map lie
//     together and are read at once; a row of -1 after the last tap instead of a test; offsets of stages in bytes; the
//     warpgroup known to be uniform, since wgmma's descriptors otherwise take 8 moves to uniform registers in every step
//     no integer division before the first copies: 3.1 to 2.9 (kernel 2, stride 2, 13,973 outputs, 32 to 32)
//     kOverlaps, where a block is alone on its multiprocessor: 76.4 to 72.9, and 39.3 to 37.4, with 128x128/4
//
// Tried and left out, on an H200:
//     kOverlaps from four stages on, and the first copies in a loop that is not unrolled: within 1 %
//     rows of x copied through L1 (cp.async.ca), which tiles of neighbouring rows share: 4 % slower over SparseResUNet42, up
//     to 20 % with 32 channels; weights too: 20 % slower
//     weights by TMA, in boxes of rows of one tap, which saves all warps but one a sixth of a step's instructions; without it
//     four threads copied a row then: 43.5 us for 44.5 (now 40.8) at 60,107 sites, 128 to 128, and 19.0 for 19.4 (now 17.4)
//     at 64 to 64; but 13.8 for 11.2 at 91,767 sites, 32 to 32, and 37.4 for 32.0 at 96 to 96, where a step takes two boxes
//     or four
//     those boxes multicast to two blocks of 128 rows, which halves the reads of weights: 85.6 us for 69.9 at 14,474 sites,
//     256 to 256. The two blocks wait for each other in each step and walk over the taps of both.
//     dgrad on weights where they lie, a row per column as in float32, in place of a transposed copy by XLA: saves 112 us of
//     SparseResUNet42's training step and 38 us of SparseResNet21D's, and takes 100 and 74 more. Over two scans 18.9 us to
//     27.7 at 16 channels, 34 to 37 at 32, 52.2 to 53.6 at 96, 98 to 105 at 256; only at 64 not slower. No more instructions
//     in a step
//     entries of the map read, or results written, with L2's evict_first: SparseResUNet42 forward and backward 8.26 ms as
//     before, and 8.30
//
// Splits on an H200, in us: the best tile without splits, then 64x128/3, 128x128/3 and 128x128/4 with 2. Rows sorted, 3^3
// taps:
//     41.1, 33.3, 34.9, 30.8   5,879 sites of 9.2 neighbours, 256 to 256 channels
//     39.4, 30.6, 31.6, 30.4   5,820 of 6.8, 256 to 256
//     18.0, 15.1, 17.5, 17.3   9,465 of 4.5, 128 to 128
//     58.6, 68.4, 54.4, 63.8   14,474 of 8.4, 256 to 256
//     31.0, 40.5, 32.8, 40.7   31,833 of 7.5, 128 to 128
// and 9.0 with 64x64/4 with 2, 9.5 without (13,973 of 3.4, 64 to 64). With 4 splits none is best: 64x64/4, 64x128/3, 128x64/3,
// 128x128/3; nor with 2 64x64/6 and 128x64/4, and 64x128/4 is within 2 % of /3.
//
// Splits lose if a tile has few steps (2^3 stride 2, 5,879 outputs, 128 to 128: 6.4 us without, 6.8 with), or if the blocks
// fill the device already (3^3 stride 2, 32,841 outputs, 64 to 128: 21.8 and 27.5).
//
// In float32 a step moves the same bytes for half the products. Tiles of 64 rows, which compute fewer useless products, were
// as fast as 128: TF32 37.8 and 38.0 us (64 columns), 17.3 and 19.5 at 32 channels, 62.4 and 64.6 at 96 channels. Exact
// products are bound by the multiply-adds: there 64 rows won by a tenth.
//
// With an epilogue, x may be two arrays that stand for their concatenation; once a step, a thread selects the array that
// holds its piece. In us on an H200, with norm (and ReLU), at the levels of that scan where a U-Net concatenates:
//
//     rows, channels          two arrays   one    concatenation    without a map, two    one    XLA's product, and a norm
//     91,767  96 + 32 to 96         44.0  43.1             17.3                  25.5   25.3                         30.4
//     60,107  96 + 32 to 96         43.0  43.0             11.7                  17.1   16.8                         20.1
//     31,833 128 + 64 to 128        58.5  58.6              7.6                  15.4   15.3                         14.3
//     14,474 256 + 128 to 256      117.0 116.8              6.8                  14.4   14.4                         14.4
//
// One array took the same time before that selection was added. SparseResUNet42 takes 1.772 ms instead of 1.814 with
// concatenations. Computing its shortcuts (one tap, no map) here instead of by XLA made no difference by itself.
#pragma once

#include <algorithm>

#include "cuda/common/cluster.cuh"
#include "cuda/conv/block_taps.cuh"
#include "cuda/conv/entries.cuh"
#include "cuda/conv/epilogue.cuh"
#include "cuda/conv/gemm.h"
#include "cuda/conv/product32.cuh"
#include "cuda/conv/schedule.h"
#include "cuda/conv/tile_sums.cuh"

namespace jaxsparse::cuda {

constexpr int kDepthTogether = 16;  // products that tensor cores add at a time; splits begin at its multiples

// Keeps a thread's constant in a register, in place of computing it in every step. With mma.sync that would spill.
__device__ inline int keep(int value) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  return stay_here(value);
#else
  return value;
#endif
}

// Compile-time parameters of one kernel.
template <typename Arithmetic, int kTileRows_, int kCols_, int kStages_, int kPieceBytes_, int kSplits_ = 1>
struct ImplicitGemm {
  using Product = cuda::Product<Arithmetic, kCols_, LayoutOfA::kRowMajor>;
  using T = typename Product::T;
  static_assert(kScheduleRows == kGroupRows, "a warpgroup for each tile of the schedule");
  static constexpr int kRows = kTileRows_, kCols = kCols_, kStages = kStages_;
  static constexpr int kPieceBytes = kPieceBytes_;  // bytes per cp.async of A
  static constexpr int kSplits = kSplits_, kOwnCols = kCols / kSplits;  // blocks per tile; columns that each finishes
  static constexpr int kGroups = kRows / kGroupRows;
  static constexpr int kThreads = kWarpgroup * kGroups;
  static constexpr int kStageBytes = kGroups * kBytesA + Product::kBytesB;
  static_assert(kGroups * Product::kFinishBytes <= kStages * kStageBytes);
  // If shared memory leaves no room for a second block to hide latency, a step's product is issued before the previous one
  // has finished. A stage is then free one step later.
  static constexpr bool kOverlaps = kStages * kStageBytes > 112 * 1024;
  static constexpr int kAhead = kStages - (kOverlaps ? 2 : 1);  // pipeline depth: steps by which copies run ahead
  static constexpr int kSumBytes = kSplits > 1 ? kRows * kCols * 4 : 0;  // sums for the other blocks of the cluster
  static_assert(kSumBytes <= kStages * kStageBytes && kOwnCols % 8 == 0);
  static constexpr int kAffineBytes = kOwnCols / 2 * static_cast<int>(sizeof(float4));
  // Bytes of shared memory: the stages, an epilogue's factors, the list of taps, and the rows that they read.
  static int shared_bytes(int taps, bool has_epilogue) {
    const int listed = taps < kTapsOfWord ? taps : kTapsOfWord;
    return kStages * kStageBytes + (has_epilogue ? kAffineBytes : 0) + kTapsOfWord * 4 + (listed + 1) * kRows * 4;
  }
};

template <class Args>
constexpr bool kHasEpilogue = std::is_same_v<Args, FusedConvArgs>;

// An epilogue must not lower occupancy: at least 512 threads per multiprocessor, so at most 128 registers.
template <class P, class Args>
constexpr int kBlocksAtLeast = (kHasEpilogue<Args> ? 512 : P::Product::kThreadsAtLeast) / P::kThreads;

// Args: ConvGemmArgs, or FusedConvArgs with an epilogue.
template <class P, class Args>
__global__ void __launch_bounds__(P::kThreads, (kBlocksAtLeast<P, Args>)) implicit_gemm_kernel(Args a) {
  using T = typename P::T;
  using Product = typename P::Product;
  constexpr int kRows = P::kRows, kCols = P::kCols, kGroups = P::kGroups, kStages = P::kStages, kThreads = P::kThreads;
  constexpr int kDepth = Product::kDepth, kSplits = P::kSplits, kOwnCols = P::kOwnCols;
  constexpr bool kFused = kHasEpilogue<Args>;
  if constexpr (kSplits > 1 && !kHasClusters) return;
  char* const stages = dynamic_shared();
  // {scale, scale, shift, shift} of each pair of the block's columns
  [[maybe_unused]] float4* const affine = reinterpret_cast<float4*>(stages + kStages * P::kStageBytes);
  int32_t* const taps = reinterpret_cast<int32_t*>(stages + kStages * P::kStageBytes + (kFused ? P::kAffineBytes : 0));
  int32_t* const in_row_of = taps + kTapsOfWord;  // [listed taps + 1, kRows], rows of a schedule's tile by place_of_row

  const int t = threadIdx.x, lane = t % kWarp, group = own_warpgroup<kGroups>();
  const int32_t col_tiles = static_cast<int32_t>(div_up(a.out_channels, kCols));
  const int32_t all_tiles = static_cast<int32_t>(div_up(a.out_rows, kScheduleRows));
  const unsigned tile = blockIdx.x / kSplits;
  const int32_t split = blockIdx.x % kSplits;  // the rank in the cluster
  const int32_t first_tile = static_cast<int32_t>(tile / col_tiles) * kGroups;
  if constexpr (kFused) {  // padding rows come last, and are not written
    if (begins_late(512) && first_tile * kScheduleRows >= end_of_real_rows(a.epilogue.rows)) return;
  }
  const int32_t first_col = static_cast<int32_t>(tile % col_tiles) * kCols, own_col = first_col + split * kOwnCols;
  const int32_t in_channels = a.in_channels;
  const auto first_of = [&](int32_t rank) { return in_channels / kDepthTogether * rank / kSplits * kDepthTogether; };
  const int32_t first_channel = kSplits == 1 ? 0 : first_of(split);
  const int32_t end_channel = kSplits == 1 || split + 1 == kSplits ? in_channels : first_of(split + 1);
  const int32_t channels = end_channel - first_channel;
  const T* x = static_cast<const T*>(a.x);
  const T* w = static_cast<const T*>(a.w) + first_channel * (Product::kRowsOfBAreColumns ? 1 : a.out_channels);
  const bool is_scheduled = !kFused || a.order != nullptr;

  int32_t out_row[2];  // output rows of the lane's sums
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t m = first_tile * kScheduleRows + t / kWarp * 16 + lane / 4 + 8 * r;
    out_row[r] = m >= a.out_rows ? -1 : is_scheduled ? a.order[m] : m;
  }

  // Copies of a thread: one piece of four rows of A, 16 apart (of eight, 8 apart, where pieces have 8 bytes). Of B one piece
  // of every kColsAtOnce-th row if its rows are columns. Otherwise a piece of each 64 columns of up to four rows that follow
  // each other and so belong to one tap; a row's pieces are copied at once, since L2 looks up each line of an instruction.
  constexpr int kInPieceA = P::kPieceBytes / sizeof(T), kPiecesA = kDepth / kInPieceA;
  constexpr int kRowsAtOnce = kWarpgroup / kPiecesA, kQuads = 16 / kRowsAtOnce, kColsAtOnce = kThreads / kPiecesA;
  constexpr int kPiecesB = kCols / 8, kOfRowB = std::max(Product::kRowBytesB / 16, kThreads / kDepth);
  constexpr int kRowsB = kDepth * kOfRowB / kThreads;
  static_assert(4 % kRowsB == 0, "channels are a multiple of 4, so that these rows belong to one tap");
  const int a_piece = t % kPiecesA, a_row = t / kPiecesA % kRowsAtOnce;
  const int b_row = t / kOfRowB * kRowsB, b_piece = t % kOfRowB;
  const int a_byte = a_piece * P::kPieceBytes;
  const uint32_t a_to = keep(group * kBytesA + swizzled<128>(a_row, a_byte / 16) + a_byte % 16);
  [[maybe_unused]] uint32_t b_to[kRowsB];
#pragma unroll
  for (int i = 0; i < kRowsB; ++i) b_to[i] = keep(kGroups * kBytesA + Product::place_in_b(b_row + i, b_piece));
  const int a_entries = keep(group * kScheduleRows + place_of_row(a_row));
  const int32_t b_cols = keep(a.out_channels - first_col - b_piece * 8);
  const char* const b_from = reinterpret_cast<const char*>(w + first_col + b_piece * 8);

  float sums[kCols / 2];
#pragma unroll
  for (float& sum : sums) sum = 0;

  [[maybe_unused]] int32_t residual_at = -1;  // byte offset of the residual in the stages, once the epilogue is prepared
  [[maybe_unused]] bool has_products = false;  // the same in all blocks of a cluster

#pragma unroll 1
  for (int word = 0; word < a.mask_words; ++word) {
    const PerTap per_tap = {channels, __fdividef(1, static_cast<float>(max(channels, 1)))};
    Place place_a = per_tap.place(a_piece * kInPieceA), place_b = per_tap.place(b_row);
    const Step step_places = per_tap.step(kDepth);
    // The taps of this word that any row of the tile has, and the input rows that they read.
    uint32_t mask = 0;
    if (is_scheduled) {
      const Entries<P> entries(a, first_tile, all_tiles, word);
      uint32_t own_mask = 0;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        if (first_tile + i >= all_tiles) continue;
        const uint32_t tile_mask = a.tile_masks[int64_t{first_tile + i} * a.mask_words + word];
        if (i == entries.group()) own_mask = tile_mask;
        mask |= tile_mask;
      }
      entries.put(in_row_of, mask, own_mask);
    } else if constexpr (kFused) {
      mask = first_tile * kScheduleRows < end_of_real_rows(a.epilogue.rows);
      const int32_t m = first_tile * kScheduleRows + t;
      const int to = t / kScheduleRows * kScheduleRows + place_of_row(t % kScheduleRows);
      if (t < kRows) in_row_of[to] = m < a.out_rows ? m : -1;
    }
    if (mask == 0) continue;
    has_products = true;
    [[maybe_unused]] const bool is_last = word + 1 == a.mask_words;
    const int32_t tap_count = stay_here(__popc(mask));
    if (t < kTapsOfWord && (mask >> t & 1)) taps[__popc(mask & ((1u << t) - 1))] = word * kTapsOfWord + t;
    if (t < kRows) in_row_of[tap_count * kRows + t] = -1;  // past the last tap
    commit_copies();
    [[maybe_unused]] Channel channel;
    if constexpr (kFused) {
      if (is_last) channel.ask<kOwnCols>(a, own_col);
    }
    wait_for_copies<0>();
    __syncthreads();

    const int32_t steps = static_cast<int32_t>(div_up(tap_count * channels, kDepth));
    int copied = 0, to_stage = 0;
    const auto copy_step = [&] {
      if (copied < steps) {
        char* const to = stages + to_stage;
        const int32_t entry = min(place_a.tap, tap_count) * kRows + a_entries;
        const int4* const entries = reinterpret_cast<const int4*>(in_row_of + entry);
        int4 quads[kQuads];
#pragma unroll
        for (int i = 0; i < kQuads; ++i) quads[i] = entries[i * kRowsAtOnce];
        const int32_t listed = Product::kRowsOfBAreColumns ? place_a.tap : place_b.tap;  // of the weights
        const bool tap_exists = listed < tap_count;
        const int32_t tap = taps[listed];  // past the list anything, which is not used
        const T* array = x;
        int32_t at = first_channel + place_a.channel, of_array = in_channels;
        if constexpr (kFused) {
          of_array = a.first_channels;
          if (at >= of_array) {
            array = static_cast<const T*>(a.second);
            at -= of_array;
            of_array = in_channels - of_array;
          }
        }
        const char* from = reinterpret_cast<const char*>(array + at);
        const uint32_t row_bytes = of_array * static_cast<unsigned>(sizeof(T));
#pragma unroll
        for (int i = 0; i < 4 * kQuads; ++i) {
          const int4 quad = quads[i % kQuads];
          const int32_t row = i / kQuads == 0 ? quad.x : i / kQuads == 1 ? quad.y : i / kQuads == 2 ? quad.z : quad.w;
          copy_if_not_negative<P::kPieceBytes>(to + a_to + i * kRowsAtOnce * 128, from + wide(row, row_bytes), row);
        }
        if constexpr (Product::kRowsOfBAreColumns) {
          const int b_col = t / kPiecesA;
          const T* weights = w + wide(tap * a.out_channels + first_col + b_col, in_channels) + place_a.channel;
          char* const to_col = to + kGroups * kBytesA + swizzled<128>(b_col, a_piece);
#pragma unroll
          for (int col = 0; col < kCols; col += kColsAtOnce) {
            if (kCols % kColsAtOnce != 0 && b_col + col >= kCols) break;
            const bool exists = tap_exists && first_col + b_col + col < a.out_channels;
            copy_piece<16>(to_col + col * 128, weights + col * in_channels, exists);
          }
        } else {
          const uint32_t row_bytes_b = a.out_channels * sizeof(T);
          const char* weights = b_from + wide(tap * in_channels + place_b.channel, row_bytes_b);
#pragma unroll
          for (int i = 0; i < kRowsB; ++i, weights += row_bytes_b) {
#pragma unroll
            for (int piece = 0; piece < kPiecesB; piece += 8) {  // the same place in each block of 64 columns
              if (b_piece + piece >= kPiecesB) break;
              const bool exists = tap_exists && b_cols > piece * 8;
              copy_piece<16>(to + b_to[i] + piece / 8 * Product::kBlockBytesB, weights + piece * 16, exists);
            }
          }
          place_b.advance(step_places, channels);
        }
        place_a.advance(step_places, channels);
        to_stage = next_stage<kStages, P::kStageBytes>(to_stage);
        ++copied;
      }
      commit_copies();
    };

#pragma unroll
    for (int i = 0; i < P::kAhead; ++i) copy_step();
    if constexpr (kFused) {
      if (is_last) channel.put<kOwnCols>(a.epilogue, out_row, affine);
      if (is_last && kSplits > 1) residual_at = P::kSumBytes;
    }
    int stage = 0;
#pragma unroll 1
    for (int32_t step = 0; step < steps; ++step) {
      if constexpr (!P::kOverlaps) Product::wait();  // for the previous step: the barrier then frees its stage
      wait_for_copies<P::kAhead - 1>();
      Product::see_copies();
      __syncthreads();
      const char* from = stages + stage;
      Product::multiply(sums, from + group * kBytesA, from + kGroups * kBytesA);
      if constexpr (kFused && kSplits == 1) {  // at the first step after which a stage stays free
        if (is_last && step == max(steps - P::kAhead, 0)) {
          residual_at = to_stage;
          Ending<P>::copy_residual(a, out_row, own_col, stages + residual_at);
        }
      }
      copy_step();
      if constexpr (P::kOverlaps) Product::wait_for_last();
      stage = next_stage<kStages, P::kStageBytes>(stage);
    }
    Product::wait();
    wait_for_copies<0>();
    __syncthreads();
  }

  Product::finish(sums, stages + group * Product::kFinishBytes);
  if constexpr (kFused) {
    if (residual_at < 0) {  // no row of the tile has a tap in the last word, so the loop did not prepare the epilogue
      if (first_tile * kScheduleRows >= end_of_real_rows(a.epilogue.rows)) return;
      Channel channel;
      channel.ask<kOwnCols>(a, own_col);
      channel.put<kOwnCols>(a.epilogue, out_row, affine);
      residual_at = P::kSumBytes;
      if constexpr (kSplits == 1) {
        Ending<P>::copy_residual(a, out_row, own_col, stages);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
      }
    }
    if constexpr (kSplits > 1) {  // the residual is copied while the cluster adds its sums
      Ending<P>::copy_residual(a, out_row, own_col, stages + residual_at);
      commit_copies();
      if (has_products) add_splits<P>(sums, stages, split);
      wait_for_copies<0>();
      __syncthreads();
    }
    Ending<P>::apply(a, out_row, own_col, affine, stages + residual_at, sums);
  } else if constexpr (kSplits > 1) {
    if (has_products) add_splits<P>(sums, stages, split);
  }

  // Stores sums to y. A lane has columns 2q and 2q + 1 of each group of eight, in two rows that are eight apart.
  const int q = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t row = out_row[r];
    if (sizeof(T) == 2 && (kFused || a.out_dtype == a.dtype)) {
      T* to = static_cast<T*>(a.y) + int64_t{row} * a.out_channels + own_col;
#pragma unroll
      for (int j = 0; j + 4 <= kOwnCols / 8; j += 4) {
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = pack<T>(sums[(j + i) * 4 + 2 * r], sums[(j + i) * 4 + 2 * r + 1]);
        transpose_quad(v);
        if (row >= 0 && own_col + (j + q) * 8 < a.out_channels) {
          *reinterpret_cast<uint4*>(to + (j + q) * 8) = make_uint4(v[0], v[1], v[2], v[3]);
        }
      }
#pragma unroll
      for (int j = kOwnCols / 32 * 4; j < kOwnCols / 8; ++j) {
        if (row >= 0 && own_col + j * 8 < a.out_channels) {
          *reinterpret_cast<uint32_t*>(to + j * 8 + q * 2) = pack<T>(sums[j * 4 + 2 * r], sums[j * 4 + 2 * r + 1]);
        }
      }
    } else {
      float* to = static_cast<float*>(a.y) + int64_t{row} * a.out_channels + own_col;
#pragma unroll
      for (int j = 0; j < kOwnCols / 8; ++j) {
        if (row >= 0 && own_col + j * 8 < a.out_channels) {
          *reinterpret_cast<float2*>(to + j * 8 + q * 2) = make_float2(sums[j * 4 + 2 * r], sums[j * 4 + 2 * r + 1]);
        }
      }
    }
  }
  if (kSplits > 1 && has_products) cluster_wait();  // until the other blocks have read this one's sums
}

template <class P, class Args>
cudaError_t launch_implicit_gemm(const Args& a, cudaStream_t stream) {
  const auto kernel = implicit_gemm_kernel<P, Args>;
  const int64_t tiles = div_up(a.out_rows, P::kRows) * div_up(a.out_channels, P::kCols);
  const int shared_bytes = P::shared_bytes(a.taps, kHasEpilogue<Args>);
  if constexpr (P::kSplits > 1) {
    bool has = false;
    JAXSPARSE_TRY(has_clusters(kernel, &has));
    if (!has) return cudaErrorNotSupported;
  }
  // The limit is the kernel's, for all layers and threads of the host: as much as any layer needs, or as the device has.
  int most = 0;
  JAXSPARSE_TRY(most_shared_memory(&most));
  most = std::min(most, P::shared_bytes(kTapsOfWord, kHasEpilogue<Args>));
  JAXSPARSE_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  return launch(kernel, tiles * P::kSplits, {P::kThreads, shared_bytes, P::kSplits}, stream, a);
}

// Launches the kernel for a.tile, for 16-bit operands.
template <typename T, class Args>
cudaError_t implicit_gemm(const Args& a, cudaStream_t stream) {
#define JAXSPARSE_TRY_TILE(piece_bytes, rows, cols, stages, splits)                                       \
  if (a.tile == Tile{rows, cols, stages, splits}) {                                                      \
    return launch_implicit_gemm<ImplicitGemm<T, rows, cols, stages, piece_bytes, splits>>(a, stream);    \
  }
#define JAXSPARSE_TRY_WHOLE(rows, cols, stages) JAXSPARSE_TRY_TILE(16, rows, cols, stages, 1)
#define JAXSPARSE_TRY_SPLIT(rows, cols, stages, splits) JAXSPARSE_TRY_TILE(16, rows, cols, stages, splits)
#define JAXSPARSE_TRY_NARROW(rows, cols, stages) JAXSPARSE_TRY_TILE(8, rows, cols, stages, 1)
  if (a.in_channels % 8 == 0) {
    JAXSPARSE_FORWARD_TILES(JAXSPARSE_TRY_WHOLE)
    JAXSPARSE_SPLIT_TILES(JAXSPARSE_TRY_SPLIT)
  } else {
    JAXSPARSE_NARROW_TILES(JAXSPARSE_TRY_NARROW)
  }
#undef JAXSPARSE_TRY_TILE
#undef JAXSPARSE_TRY_WHOLE
#undef JAXSPARSE_TRY_SPLIT
#undef JAXSPARSE_TRY_NARROW
  return cudaErrorInvalidValue;
}

}  // namespace jaxsparse::cuda
