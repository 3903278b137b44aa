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
// Bound by L2: where tiles are many, the time is that of the bytes that blocks copy, at 5.3 TB/s on an H100: a row of x for
// each pair and tile of columns, the weights of a tap for each tile of rows that has it, y. At deep levels, with fewer than
// two blocks a multiprocessor, the tile with the most taps rules: 27 of them where the mean is 15. Tried against that, with
// right results: blocks of a cluster that share long tiles (a cluster costs 15 ns to launch, so only the deepest level
// gained, 5,890 sites, 256 to 256 channels: 67 to 40 us); even shares of all taps for each block that the device holds, with
// partial sums between them (the same 67 to 40, elsewhere up to 40 % slower); and that with tiles of 256 rows (67 to 45).
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

#include <cstring>

#include "cuda/conv/entries.cuh"
#include "cuda/conv/epilogue.cuh"
#include "cuda/conv/gemm.h"
#include "cuda/conv/product32.cuh"
#include "cuda/conv/schedule.h"

namespace jaxsparse::cuda {

constexpr int kTapsAtOnce = 32;  // a word of a mask

template <typename T>
__device__ uint32_t pack(float low, float high) {
  const T both[2] = {narrow<T>(low), narrow<T>(high)};
  uint32_t bits;
  memcpy(&bits, both, 4);
  return bits;
}

// Turns v[i], a lane's part of column group i, into the four parts of the lane's own group: a transpose within a quad.
__device__ inline void transpose_quad(uint32_t (&v)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? v[i] : v[i + 1], 1);
    (odd ? v[i] : v[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, high ? v[i] : v[i + 2], 2);
    (high ? v[i] : v[i + 2]) = other;
  }
}

// Sizes of one kernel.
template <typename Arithmetic, int kTileRows_, int kCols_, int kStages_, int kPieceBytes_>
struct ImplicitGemm {
  using Product = cuda::Product<Arithmetic, kCols_, LayoutOfA::kRowMajor>;
  using T = typename Product::T;
  static_assert(kScheduleRows == kGroupRows, "a warpgroup for each tile of the schedule");
  static constexpr int kRows = kTileRows_, kCols = kCols_, kStages = kStages_;
  static constexpr int kPieceBytes = kPieceBytes_;  // of A, that a copy moves
  static constexpr int kGroups = kRows / kGroupRows;
  static constexpr int kThreads = kWarpgroup * kGroups;
  static constexpr int kStageBytes = kGroups * kBytesA + Product::kBytesB;
  static_assert(kGroups * Product::kFinishBytes <= kStages * kStageBytes);
  static int shared_bytes(int taps) {
    return kStages * kStageBytes + (taps < kTapsAtOnce ? taps : kTapsAtOnce) * kRows * 4 + 1024;
  }
};

// The place of a copying thread in the depth: a tap of the block's list, and a channel.
struct Place {
  int32_t tap, channel;
  int32_t step_taps, step_channels;  // what a step adds

  __device__ Place(int32_t depth, int32_t channels, int32_t step)
      : tap(depth / channels), channel(depth % channels), step_taps(step / channels), step_channels(step % channels) {}
  __device__ void advance(int32_t channels) {
    tap += step_taps;
    channel += step_channels;
    if (channel >= channels) {
      channel -= channels;
      ++tap;
    }
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
  constexpr int kDepth = Product::kDepth;
  constexpr bool kFused = kHasEpilogue<Args>;
  __shared__ int32_t taps[kTapsAtOnce];
  char* const stages = dynamic_shared() + (-shared_address(dynamic_shared()) & 1023);  // as the swizzle wants it
  int32_t* const in_row_of = reinterpret_cast<int32_t*>(stages + kStages * P::kStageBytes);  // [listed taps, kRows]

  const int t = threadIdx.x, lane = t % kWarp, group = t / kWarpgroup;
  const int32_t col_tiles = static_cast<int32_t>(div_up(a.out_channels, kCols));
  const int32_t all_tiles = static_cast<int32_t>(div_up(a.out_rows, kScheduleRows));
  const int32_t first_tile = static_cast<int32_t>(blockIdx.x / col_tiles) * kGroups;
  const int32_t first_col = static_cast<int32_t>(blockIdx.x % col_tiles) * kCols;
  const T* x = static_cast<const T*>(a.x);
  const T* w = static_cast<const T*>(a.w);
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

  [[maybe_unused]] int32_t residual_at = -1;  // its stage, once an epilogue has begun

#pragma unroll 1
  for (int word = 0; word < a.mask_words; ++word) {
    // The taps that any row has, and the rows of x under them.
    uint32_t own_mask = 0, mask = 0;
    if (is_scheduled) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        if (first_tile + i >= all_tiles) continue;
        const uint32_t tile_mask = a.tile_masks[int64_t{first_tile + i} * a.mask_words + word];
        if (i == group) own_mask = tile_mask;
        mask |= tile_mask;
      }
    } else if constexpr (kFused) {
      mask = first_tile * kScheduleRows < end_of_real_rows(a.epilogue.rows);
    }
    if (mask == 0) continue;
    [[maybe_unused]] const bool is_last = word + 1 == a.mask_words;
    const int32_t tap_count = __popc(mask);
    if (t < kTapsAtOnce && (mask >> t & 1)) taps[__popc(mask & ((1u << t) - 1))] = word * kTapsAtOnce + t;
    if (!is_scheduled) {
      const int32_t m = first_tile * kScheduleRows + t;
      if (t < kRows) in_row_of[t] = m < a.out_rows ? m : -1;
    } else {
      constexpr int kPieces = kScheduleRows / 4, kTapsOfGroup = kWarpgroup / kPieces;  // a warpgroup copies its tile's entries
      const int piece = t % kPieces;
      const int32_t* from =
          a.tile_table + (int64_t{first_tile + group} * a.taps + word * kTapsAtOnce) * kScheduleRows + piece * 4;
      int32_t* to = in_row_of + group * kScheduleRows + piece * 4;
      uint32_t rest = mask;
      for (int i = 0; i < tap_count; ++i, rest &= rest - 1, to += kRows) {
        if (i % kTapsOfGroup != t % kWarpgroup / kPieces) continue;
        const int bit = __ffs(static_cast<int>(rest)) - 1;
        if (own_mask >> bit & 1) {
          copy_piece<16>(reinterpret_cast<char*>(to), from + bit * kScheduleRows, true);
        } else {
          *reinterpret_cast<int4*>(to) = make_int4(-1, -1, -1, -1);
        }
      }
    }
    commit_copies();
    [[maybe_unused]] Channel channel;
    if constexpr (kFused) {
      if (is_last) channel.ask<kCols>(a, first_col);
    }
    wait_for_copies<0>();
    __syncthreads();

    // Copies: a thread has one piece of each kRowsA-th row of A, and of B too where its rows are columns; otherwise each
    // kOfRowB-th piece of one row of B.
    constexpr int kInPieceA = P::kPieceBytes / sizeof(T), kPiecesA = kDepth / kInPieceA, kRowsA = kThreads / kPiecesA;
    constexpr int kOfRowB = kThreads / kDepth, kPiecesB = kCols / 8;
    const int32_t channels = a.in_channels;
    const int a_piece = t % kPiecesA, a_row = t / kPiecesA, b_row = t / kOfRowB, b_piece = t % kOfRowB;
    const int a_byte = a_piece * P::kPieceBytes;
    const uint32_t a_to = swizzled<128>(a_row, a_byte / 16) + a_byte % 16;
    const T* const b_from = w + first_col + b_piece * 8;
    Place place_a(a_piece * kInPieceA, channels, kDepth), place_b(b_row, channels, kDepth);
    const int32_t steps = static_cast<int32_t>(div_up(tap_count * channels, kDepth));
    int copied = 0, to_stage = 0;
    const auto copy_step = [&] {
      if (copied < steps) {
        char* to = stages + to_stage * P::kStageBytes;
        int32_t rows[kRows / kRowsA];
#pragma unroll
        for (int i = 0; i < kRows / kRowsA; ++i) {
          rows[i] = place_a.tap < tap_count ? in_row_of[place_a.tap * kRows + a_row + i * kRowsA] : -1;
        }
        const T* array = x;
        int32_t channel = place_a.channel, of_array = channels;
        if constexpr (kFused) {
          of_array = a.first_channels;
          if (channel >= of_array) {
            array = static_cast<const T*>(a.second);
            channel -= of_array;
            of_array = channels - of_array;
          }
        }
        const char* from = reinterpret_cast<const char*>(array + channel);
        const int32_t row_bytes = of_array * static_cast<int>(sizeof(T));
#pragma unroll
        for (int i = 0; i < kRows / kRowsA; ++i) {
          copy_piece<P::kPieceBytes>(to + a_to + i * kRowsA * 128, from + int64_t{rows[i]} * row_bytes, rows[i] >= 0);
        }
        to += kGroups * kBytesA;
        if constexpr (Product::kRowsOfBAreColumns) {
          const bool tap_exists = place_a.tap < tap_count;
          const int32_t tap = tap_exists ? taps[place_a.tap] : 0;
          const T* weights = w + (int64_t{tap} * a.out_channels + first_col + a_row) * channels + place_a.channel;
#pragma unroll
          for (int col = 0; col < kCols; col += kRowsA) {
            if (kCols % kRowsA != 0 && a_row + col >= kCols) break;
            const bool exists = tap_exists && first_col + a_row + col < a.out_channels;
            copy_piece<16>(to + a_to + col * 128, weights + col * channels, exists);
          }
        } else {
          const bool row_exists = place_b.tap < tap_count;
          const T* weights = b_from;
          if (row_exists) weights += (int64_t{taps[place_b.tap]} * channels + place_b.channel) * a.out_channels;
#pragma unroll
          for (int piece = 0; piece < kPiecesB; piece += kOfRowB) {
            if (kPiecesB % kOfRowB != 0 && b_piece + piece >= kPiecesB) break;
            const bool exists = row_exists && first_col + (b_piece + piece) * 8 < a.out_channels;
            copy_piece<16>(to + Product::place_in_b(b_row, b_piece + piece), weights + piece * 8, exists);
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
    for (int i = 0; i < kStages - 1; ++i) copy_step();
    if constexpr (kFused) {
      if (is_last) channel.put<kCols>(a.epilogue, out_row, affine_of_columns<kCols>());
    }
    int stage = 0;
#pragma unroll 1
    for (int32_t step = 0; step < steps; ++step) {
      Product::wait();  // of the step before: after the barrier its stage is free
      wait_for_copies<kStages - 2>();
      Product::see_copies();
      __syncthreads();
      const char* from = stages + stage * P::kStageBytes;
      Product::multiply(sums, from + group * kBytesA, from + kGroups * kBytesA);
      if constexpr (kFused) {  // the first step that leaves a stage free
        if (is_last && step == max(steps - kStages + 1, 0)) {
          residual_at = to_stage * P::kStageBytes;
          Ending<P>::copy_residual(a, out_row, first_col, stages + residual_at);
        }
      }
      copy_step();
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
        channel.ask<kCols>(a, first_col);
        channel.put<kCols>(a.epilogue, out_row, affine_of_columns<kCols>());
        residual_at = 0;
        Ending<P>::copy_residual(a, out_row, first_col, stages);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
      }
      Ending<P>::apply(a, out_row, first_col, affine_of_columns<kCols>(), stages + residual_at, sums);
    }
  }

  // Sums to y: a lane has columns 2q, 2q + 1 of each eight, of rows g and g + 8.
  const int q = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool is_padding = kFused && is_marked(out_row[r]);
    const int32_t row = is_padding ? unmarked(out_row[r]) : out_row[r];
    if (is_padding) {
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) sums[j * 4 + 2 * r] = sums[j * 4 + 2 * r + 1] = 0;
    }
    if (sizeof(T) == 2 && (kFused || a.out_dtype == a.dtype)) {
      T* to = static_cast<T*>(a.y) + int64_t{row} * a.out_channels + first_col;
#pragma unroll
      for (int j = 0; j + 4 <= kCols / 8; j += 4) {
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = pack<T>(sums[(j + i) * 4 + 2 * r], sums[(j + i) * 4 + 2 * r + 1]);
        transpose_quad(v);
        if (row >= 0 && first_col + (j + q) * 8 < a.out_channels) {
          *reinterpret_cast<uint4*>(to + (j + q) * 8) = make_uint4(v[0], v[1], v[2], v[3]);
        }
      }
#pragma unroll
      for (int j = kCols / 32 * 4; j < kCols / 8; ++j) {
        if (row >= 0 && first_col + j * 8 < a.out_channels) {
          *reinterpret_cast<uint32_t*>(to + j * 8 + q * 2) = pack<T>(sums[j * 4 + 2 * r], sums[j * 4 + 2 * r + 1]);
        }
      }
    } else {
      float* to = static_cast<float*>(a.y) + int64_t{row} * a.out_channels + first_col;
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) {
        if (row >= 0 && first_col + j * 8 < a.out_channels) {
          *reinterpret_cast<float2*>(to + j * 8 + q * 2) = make_float2(sums[j * 4 + 2 * r], sums[j * 4 + 2 * r + 1]);
        }
      }
    }
  }
}

template <class P, class Args>
cudaError_t launch_implicit_gemm(const Args& a, cudaStream_t stream) {
  const auto kernel = implicit_gemm_kernel<P, Args>;
  const int64_t blocks = div_up(a.out_rows, P::kRows) * div_up(a.out_channels, P::kCols);
  const int shared_bytes = P::shared_bytes(a.taps);
  JAXSPARSE_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  return launch(kernel, blocks, {P::kThreads, shared_bytes}, stream, a);
}

// The kernel of a tile, for operands of 16 bits.
template <typename T, class Args>
cudaError_t implicit_gemm(const Args& a, cudaStream_t stream) {
#define JAXSPARSE_TRY_TILE(piece_bytes, rows, cols, stages) \
  if (a.tile == Tile{rows, cols, stages}) return launch_implicit_gemm<ImplicitGemm<T, rows, cols, stages, piece_bytes>>(a, stream);
#define JAXSPARSE_TRY_WHOLE(rows, cols, stages) JAXSPARSE_TRY_TILE(16, rows, cols, stages)
#define JAXSPARSE_TRY_NARROW(rows, cols, stages) JAXSPARSE_TRY_TILE(8, rows, cols, stages)
  if (a.in_channels % 8 == 0) {
    JAXSPARSE_FORWARD_TILES(JAXSPARSE_TRY_WHOLE)
  } else {
    JAXSPARSE_NARROW_TILES(JAXSPARSE_TRY_NARROW)
  }
#undef JAXSPARSE_TRY_TILE
#undef JAXSPARSE_TRY_WHOLE
#undef JAXSPARSE_TRY_NARROW
  return cudaErrorInvalidValue;
}

}  // namespace jaxsparse::cuda
