// y[m] = sum_k x[table[k, m]] @ w[k] as one implicit matrix product, on tensor cores unless float32 is to be exact.
//
// A block owns kRows output rows and kCols output columns; their sums stay in registers. `order` says which rows: those
// with like tap masks lie together, since a tap that no row of the block has is left out. The depth of the product is
// the list of (tap, input channel) of the block's taps, whatever the number of channels; a step takes 128 bytes of it:
//
//     A [kRows, kDepth]   gathered rows of x, absent ones 0
//     B [kDepth, kCols]   weights, in float32 transposed: a row for each column
//
// Both come to shared memory by cp.async, in pieces of 16 bytes where the channels allow it, through a ring of kStages
// that is never drained within 32 taps. Rows of 128 bytes have their pieces exchanged by XOR with the row (the 128-byte
// swizzle that wgmma and ldmatrix both read without bank conflicts).
//
// Tensor cores add 16 products of 16 bits at a time, 8 of TF32. Where the channels are a multiple of that, these are of one tap,
// and a row's result does not depend, bit for bit, on the rows that share its tile, nor on the tile's size: a tap that only a
// mate has adds zeros. Otherwise the tile's list of taps decides which products meet, and with them the last rounding.
//
// Where tiles are few, the kSplits blocks of a cluster share one: each has a part of the input channels, of all taps. At the
// end they show each other their sums in shared memory, and each adds, finishes and stores those of kCols / kSplits columns.
// Channels are shared, not taps or steps: every block has as much to do, and what was said of a row's bits stays true.
//
// Bound by L2: where tiles are many, the time is that of the bytes that blocks copy, at 5.3 TB/s: a row of x for each pair and
// tile of columns, the weights of a tap for each tile of rows that has it, y. At deep levels, with fewer than two blocks a
// multiprocessor, the tile with the most taps rules: 27 of them where the mean is 15. Splits are for those. Tried besides,
// with right results: even shares of all taps for each block that the device holds, with partial sums between them (5,890
// sites, 256 to 256 channels: 67 to 40 us, elsewhere up to 40 % slower), that with tiles of 256 rows (67 to 45); and the
// longest tiles put beside the shortest on a multiprocessor (within 1 %, blocks do not land in a fixed order).
//
// Measured on an H100, finest level of a LiDAR scan (91,767 sites, 3.8 neighbours), 64 to 64 channels, 20.5 us:
//
//     50.6 us   rows in the order of sites instead
//     37.1      tiles of 64 rows: weights are read twice as often; 23.5 with 256 rows, one block a multiprocessor
//     29.7      mma.sync instead of wgmma
//     28.1      entries of the map read through the order of rows, not laid out in tiles by the schedule; copies one step
//               less ahead
//     42        A gathered into registers for wgmma: its operand wants two rows' halves side by side, so each load is
//               waited for and moved
//
// Copies take most of a step's instructions, 136 with 128x128/3, and those count. They were 176: signed 64-bit products for
// addresses, three instructions each, took 14,474 sites, 256 to 256, from 65.7 us to 71.6, and 31,833 sites, 128 to 128, from
// 36.6 to 39.2; a look-up of the tap before that of the row, 7 % with tiles of 64 columns. What the compiler would find out anew
// in each step it is kept from by stay_here. Products that overlap where a block is alone: 76.4 to 72.9, and 39.3 to 37.4, with
// 128x128/4.
//
// Tried and left out, on an H200: weights by the tensor copy engine, in boxes of rows of one tap, which takes a sixth of a
// step's instructions from all warps but one. 43.5 us for 44.5 at 60,107 sites, 128 to 128, and 19.0 for 19.4 at 64 to 64;
// but 13.8 for 11.2 at 91,767 sites, 32 to 32, 37.4 for 32.0 at 96 to 96, where a step takes two boxes or four. And those
// boxes multicast to two blocks, of 128 rows each, so that half as many weights are read: 85.6 us for 69.9 without at 14,474
// sites, 256 to 256. The two wait for each other in each step, and walk over the taps that either has.
//
// Splits on an H200, microseconds, the best tile without them and 128x128 with 2 and 4, rows sorted, 3^3 taps, before that:
//
//     53.2, 42.9, 39.2   5,879 sites of 9.2 neighbours, 256 to 256 channels
//     44.9, 38.3, 26.2   2,887 of 9.1, 256 to 256
//     24.2, 22.2, 18.3   9,465 of 4.5, 128 to 128
//     76.9, 68.8, 80.5   14,474 of 8.4, 256 to 256
//     28.5, 25.5, 29.1   14,474 of 8.4, 128 to 128
//     39.0, 38.0, 55.0   31,833 of 7.5, 128 to 128
//
// They lose where a tile has few steps: 2^3 stride 2, 5,879 outputs, 128 to 128, 8.8 us without and 9.7 with 2; or where blocks
// fill the device already: 3^3 stride 2, 32,841 outputs, 64 to 128, 26.0 and 30.8. All of it fits 4 us that a block costs its
// multiprocessor besides its steps. Other tiles with splits won nowhere by more than 3 %: 64x32, 64x64, 128x64 and
// 256x128 with 2, 64x64 and 128x64 with 4, 128x128 with 8.
//
// In float32 every step moves as many bytes for half the products, and tiles of 64 rows, which compute less in vain, were as
// quick as 128: TF32 37.8 and 38.0 us (columns 64), at 32 channels 17.3 and 19.5, at 96 channels 62.4 and 64.6. Exact
// products are bound by the multiply-adds: there 64 rows won by a tenth.
//
// With an epilogue, x may be two arrays that stand for their concatenation: a thread looks which one has its piece, once a
// step. In us on an H200, with norm (and ReLU), on the levels of that scan that a U-Net concatenates on:
//
//     rows, channels          two arrays   one    making it one    without a map, two    one    XLA's product, and a norm
//     91,767  96 + 32 to 96         44.0  43.1             17.3                  25.5   25.3                         30.4
//     60,107  96 + 32 to 96         43.0  43.0             11.7                  17.1   16.8                         20.1
//     31,833 128 + 64 to 128        58.5  58.6              7.6                  15.4   15.3                         14.3
//     14,474 256 + 128 to 256      117.0 116.8              6.8                  14.4   14.4                         14.4
//
// One array took the same before a thread had to look. SparseResUNet42 takes 1.772 ms in place of 1.814 with concatenations;
// its shortcuts, of one tap and without a map, in place of XLA's products and norms made no difference by themselves.
#pragma once

#include "cuda/common/cluster.cuh"
#include "cuda/conv/block_taps.cuh"
#include "cuda/conv/entries.cuh"
#include "cuda/conv/epilogue.cuh"
#include "cuda/conv/gemm.h"
#include "cuda/conv/product32.cuh"
#include "cuda/conv/schedule.h"
#include "cuda/conv/tile_sums.cuh"

namespace jaxsparse::cuda {

constexpr int kDepthTogether = 16;  // products that tensor cores add at a time

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasRegisterForPlace = true;
#else
constexpr bool kHasRegisterForPlace = false;  // with mma.sync it would spill
#endif

// Sizes of one kernel.
template <typename Arithmetic, int kTileRows_, int kCols_, int kStages_, int kPieceBytes_, int kSplits_ = 1>
struct ImplicitGemm {
  using Product = cuda::Product<Arithmetic, kCols_, LayoutOfA::kRowMajor>;
  using T = typename Product::T;
  static_assert(kScheduleRows == kGroupRows, "a warpgroup for each tile of the schedule");
  static constexpr int kRows = kTileRows_, kCols = kCols_, kStages = kStages_;
  static constexpr int kPieceBytes = kPieceBytes_;  // of A, that a copy moves
  static constexpr int kSplits = kSplits_, kOwnCols = kCols / kSplits;  // blocks of a tile; columns that one of them finishes
  static constexpr int kGroups = kRows / kGroupRows;
  static constexpr int kThreads = kWarpgroup * kGroups;
  static constexpr int kStageBytes = kGroups * kBytesA + Product::kBytesB;
  static_assert(kGroups * Product::kFinishBytes <= kStages * kStageBytes);
  // Where no second block fits the multiprocessor, which could multiply meanwhile, a step's product begins before the last
  // ends; its stage is then free a step later.
  static constexpr bool kOverlaps = kStages * kStageBytes > 112 * 1024;
  static constexpr int kAhead = kStages - (kOverlaps ? 2 : 1);  // steps that copies are ahead
  static constexpr int kSumBytes = kSplits > 1 ? kRows * kCols * 4 : 0;  // that blocks of a cluster show each other
  static_assert(kSumBytes <= kStages * kStageBytes && kOwnCols % 8 == 0);
  static int shared_bytes(int taps) {
    return kStages * kStageBytes + kTapsAtOnce * 4 + (taps < kTapsAtOnce ? taps : kTapsAtOnce) * kRows * 4 + 1024;
  }
};

template <class Args>
constexpr bool kHasEpilogue = std::is_same_v<Args, FusedConvArgs>;

// An epilogue must not cost a block of the multiprocessor: at most 128 registers.
template <class P, class Args>
constexpr int kBlocksAtLeast = (kHasEpilogue<Args> ? 512 : P::Product::kThreadsAtLeast) / P::kThreads;

// Args: ConvGemmArgs, or FusedConvArgs for what has an epilogue.
template <class P, class Args>
__global__ void __launch_bounds__(P::kThreads, (kBlocksAtLeast<P, Args>)) implicit_gemm_kernel(Args a) {
  using T = typename P::T;
  using Product = typename P::Product;
  constexpr int kRows = P::kRows, kCols = P::kCols, kGroups = P::kGroups, kStages = P::kStages, kThreads = P::kThreads;
  constexpr int kDepth = Product::kDepth, kSplits = P::kSplits, kOwnCols = P::kOwnCols;
  constexpr bool kFused = kHasEpilogue<Args>;
  if constexpr (kSplits > 1 && !kHasClusters) return;
  char* const stages = dynamic_shared() + stay_here(-shared_address(dynamic_shared()) & 1023);  // as the swizzle wants it
  int32_t* const taps = reinterpret_cast<int32_t*>(stages + kStages * P::kStageBytes);  // a list
  int32_t* const in_row_of = taps + kTapsAtOnce;                                        // [listed taps, kRows]

  const int t = threadIdx.x, lane = t % kWarp, group = t / kWarpgroup;
  const int32_t col_tiles = static_cast<int32_t>(div_up(a.out_channels, kCols));
  const int32_t all_tiles = static_cast<int32_t>(div_up(a.out_rows, kScheduleRows));
  const unsigned tile = blockIdx.x / kSplits;
  const int32_t split = blockIdx.x % kSplits;  // the rank in the cluster
  const int32_t first_tile = static_cast<int32_t>(tile / col_tiles) * kGroups;
  const int32_t first_col = static_cast<int32_t>(tile % col_tiles) * kCols, own_col = first_col + split * kOwnCols;
  const int32_t in_channels = a.in_channels;
  const auto first_of = [&](int32_t rank) { return in_channels / kDepthTogether * rank / kSplits * kDepthTogether; };
  const int32_t first_channel = kSplits == 1 ? 0 : first_of(split);
  const int32_t end_channel = kSplits == 1 || split + 1 == kSplits ? in_channels : first_of(split + 1);
  const int32_t channels = end_channel - first_channel;
  const T* x = static_cast<const T*>(a.x);
  const T* w = static_cast<const T*>(a.w) + first_channel * (Product::kRowsOfBAreColumns ? 1 : a.out_channels);
  const bool is_scheduled = !kFused || a.order != nullptr;

  int32_t out_row[2];  // of the lane's sums
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t m = first_tile * kScheduleRows + t / kWarp * 16 + lane / 4 + 8 * r;
    out_row[r] = m >= a.out_rows ? -1 : is_scheduled ? a.order[m] : m;
  }
  float sums[kCols / 2];
#pragma unroll
  for (float& sum : sums) sum = 0;

  [[maybe_unused]] int32_t residual_at = -1;  // in the stages, once an epilogue has begun
  [[maybe_unused]] bool has_products = false;  // in all blocks of a cluster alike

#pragma unroll 1
  for (int word = 0; word < a.mask_words; ++word) {
    // The taps that any row has, and the rows of x under them.
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
      if (t < kRows) in_row_of[t] = m < a.out_rows ? m : -1;
    }
    if (mask == 0) continue;
    has_products = true;
    [[maybe_unused]] const bool is_last = word + 1 == a.mask_words;
    const int32_t tap_count = stay_here(__popc(mask));
    if (t < kTapsAtOnce && (mask >> t & 1)) taps[__popc(mask & ((1u << t) - 1))] = word * kTapsAtOnce + t;
    commit_copies();
    [[maybe_unused]] Channel channel;
    if constexpr (kFused) {
      if (is_last) channel.ask<kOwnCols>(a, own_col);
    }
    wait_for_copies<0>();
    __syncthreads();

    // Copies: a thread has one piece of each kRowsA-th row of A, and of B too where its rows are columns; otherwise each
    // kOfRowB-th piece of one row of B.
    constexpr int kInPieceA = P::kPieceBytes / sizeof(T), kPiecesA = kDepth / kInPieceA, kRowsA = kThreads / kPiecesA;
    constexpr int kOfRowB = kThreads / kDepth, kPiecesB = kCols / 8;
    const int a_piece = t % kPiecesA, a_row = t / kPiecesA, b_row = t / kOfRowB, b_piece = t % kOfRowB;
    const int a_byte = a_piece * P::kPieceBytes;
    uint32_t a_to = swizzled<128>(a_row, a_byte / 16) + a_byte % 16;
    if constexpr (kHasRegisterForPlace) a_to = stay_here(a_to);
    const char* const b_from = reinterpret_cast<const char*>(w + first_col + b_piece * 8);
    const int32_t divisor = kSplits == 1 ? channels : max(channels, 8);
    Place place_a(a_piece * kInPieceA, divisor, kDepth), place_b(b_row, divisor, kDepth);
    const int32_t steps = static_cast<int32_t>(div_up(tap_count * channels, kDepth));
    int copied = 0, to_stage = 0;
    const auto copy_step = [&] {
      if (copied < steps) {
        char* to = stages + to_stage * P::kStageBytes;
        int32_t rows[kRows / kRowsA];
        const int32_t* const entries = in_row_of + place_a.tap * kRows + a_row;
#pragma unroll
        for (int i = 0; i < kRows / kRowsA; ++i) rows[i] = place_a.tap < tap_count ? entries[i * kRowsA] : -1;
        const T* array = x;
        int32_t channel = first_channel + place_a.channel, of_array = in_channels;
        if constexpr (kFused) {
          of_array = a.first_channels;
          if (channel >= of_array) {
            array = static_cast<const T*>(a.second);
            channel -= of_array;
            of_array = in_channels - of_array;
          }
        }
        const char* from = reinterpret_cast<const char*>(array + channel);
        const uint32_t row_bytes = of_array * static_cast<unsigned>(sizeof(T));
#pragma unroll
        for (int i = 0; i < kRows / kRowsA; ++i) {
          copy_if_not_negative<P::kPieceBytes>(to + a_to + i * kRowsA * 128, from + wide(rows[i], row_bytes), rows[i]);
        }
        to += kGroups * kBytesA;
        if constexpr (Product::kRowsOfBAreColumns) {
          const bool tap_exists = place_a.tap < tap_count;
          const int32_t tap = tap_exists ? taps[place_a.tap] : 0;
          const T* weights = w + wide(tap * a.out_channels + first_col + a_row, in_channels) + place_a.channel;
#pragma unroll
          for (int col = 0; col < kCols; col += kRowsA) {
            if (kCols % kRowsA != 0 && a_row + col >= kCols) break;
            const bool exists = tap_exists && first_col + a_row + col < a.out_channels;
            copy_piece<16>(to + a_to + col * 128, weights + col * in_channels, exists);
          }
        } else {
          const bool row_exists = place_b.tap < tap_count;
          const char* weights = b_from;
          if (row_exists) weights += wide(taps[place_b.tap] * in_channels + place_b.channel, a.out_channels * sizeof(T));
#pragma unroll
          for (int own = 0; own < Product::kRowBytesB / 16; own += kOfRowB) {
            char* const b_to = to + Product::place_in_b(b_row, b_piece + own);
#pragma unroll
            for (int piece = own; piece < kPiecesB; piece += 8) {  // in each block of 64 columns
              if (b_piece + piece >= kPiecesB) break;
              const bool exists = row_exists && first_col + (b_piece + piece) * 8 < a.out_channels;
              copy_piece<16>(b_to + piece / 8 * Product::kBlockBytesB, weights + piece * 16, exists);
            }
          }
          place_b.advance(channels);
        }
        place_a.advance(channels);
        to_stage = next_stage<kStages>(to_stage);
        ++copied;
      }
      commit_copies();
    };

#pragma unroll
    for (int i = 0; i < P::kAhead; ++i) copy_step();
    if constexpr (kFused) {
      if (is_last) channel.put<kOwnCols>(a.epilogue, out_row, affine_of_columns<kOwnCols>());
      if (is_last && kSplits > 1) residual_at = P::kSumBytes;
    }
    int stage = 0;
#pragma unroll 1
    for (int32_t step = 0; step < steps; ++step) {
      if constexpr (!P::kOverlaps) Product::wait();  // of the step before: after the barrier its stage is free
      wait_for_copies<P::kAhead - 1>();
      Product::see_copies();
      __syncthreads();
      const char* from = stages + stage * P::kStageBytes;
      Product::multiply(sums, from + group * kBytesA, from + kGroups * kBytesA);
      if constexpr (kFused && kSplits == 1) {  // the first step that leaves a stage free
        if (is_last && step == max(steps - P::kAhead, 0)) {
          residual_at = to_stage * P::kStageBytes;
          Ending<P>::copy_residual(a, out_row, own_col, stages + residual_at);
        }
      }
      copy_step();
      if constexpr (P::kOverlaps) Product::wait_for_last();
      stage = next_stage<kStages>(stage);
    }
    Product::wait();
    wait_for_copies<0>();
    __syncthreads();
  }

  Product::finish(sums, stages + group * Product::kFinishBytes);
  if constexpr (kFused) {
    const auto is_padding_alone = [&] {
      const Segments& rows = a.epilogue.rows;
      return rows.number == 1 && first_tile * kScheduleRows >= rows.counts[0];  // padding comes last
    };
    if (residual_at < 0 && is_padding_alone()) {
      for (int32_t& row : out_row) row = marked(row);
    } else {
      if (residual_at < 0) {  // no row has a tap of the last word
        Channel channel;
        channel.ask<kOwnCols>(a, own_col);
        channel.put<kOwnCols>(a.epilogue, out_row, affine_of_columns<kOwnCols>());
        residual_at = P::kSumBytes;
        if constexpr (kSplits == 1) {
          Ending<P>::copy_residual(a, out_row, own_col, stages);
          commit_copies();
          wait_for_copies<0>();
          __syncthreads();
        }
      }
      if constexpr (kSplits > 1) {  // the residual comes while the cluster adds
        Ending<P>::copy_residual(a, out_row, own_col, stages + residual_at);
        commit_copies();
        if (has_products) add_splits<P>(sums, stages, split);
        wait_for_copies<0>();
        __syncthreads();
      }
      Ending<P>::apply(a, out_row, own_col, affine_of_columns<kOwnCols>(), stages + residual_at, sums);
    }
  } else if constexpr (kSplits > 1) {
    if (has_products) add_splits<P>(sums, stages, split);
  }

  // Sums to y: a lane has columns 2q, 2q + 1 of each eight, of rows g and g + 8.
  const int q = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool is_padding = kFused && is_marked(out_row[r]);
    const int32_t row = is_padding ? unmarked(out_row[r]) : out_row[r];
    if (is_padding) {
#pragma unroll
      for (int j = 0; j < kOwnCols / 8; ++j) sums[j * 4 + 2 * r] = sums[j * 4 + 2 * r + 1] = 0;
    }
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
  if (kSplits > 1 && has_products) cluster_wait();  // until the others have read
}

template <class P, class Args>
cudaError_t launch_implicit_gemm(const Args& a, cudaStream_t stream) {
  const auto kernel = implicit_gemm_kernel<P, Args>;
  const int64_t tiles = div_up(a.out_rows, P::kRows) * div_up(a.out_channels, P::kCols);
  const int shared_bytes = P::shared_bytes(a.taps);
  if constexpr (P::kSplits > 1) {
    bool has = false;
    JAXSPARSE_TRY(has_clusters(kernel, &has));
    if (!has) return cudaErrorNotSupported;
  }
  JAXSPARSE_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  return launch(kernel, tiles * P::kSplits, {P::kThreads, shared_bytes, P::kSplits}, stream, a);
}

// The kernel of a tile, for operands of 16 bits.
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
