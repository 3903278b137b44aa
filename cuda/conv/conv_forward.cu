// y[m] = sum_k x[table[k, m]] @ w[k], taps in increasing order, as one implicit matrix product.
//
// A block owns kRows output rows and 64 output columns, whose sums stay in registers. It walks over the taps that any of
// its rows has, and over the input channels 64 bytes at a time; each step copies the gathered pieces of rows A
// [kRows, depth] and of weights B [depth, 64] to shared memory, three steps in flight, across taps. At few channels it
// is bound by the latency of the chain index, row, product; at many, by the tensor cores and by weight traffic from L2.
//
// A row's result does not depend on the rows that share its tile, bit for bit, if the weights are finite. A tap that a
// row lacks but a tile mate has adds products 0 * w = +-0 to the row's sum s, and s + (+-0) = s for every s but one:
// (-0) + (+0) = +0. So only the sign of a zero can differ on the way, which no later sum of non-zeros sees, and the last
// step, s + 0, turns -0 into +0. An infinite or NaN weight does reach the tile mates of a row that has its tap.
#include "cuda/common/device.cuh"
#include "cuda/conv/conv.h"
#include "cuda/conv/gather.cuh"

namespace jaxsparse::cuda {
namespace {

// The steps over one mask word's taps and the channels, and the input rows of the thread's own pieces of A.
template <typename Tile>
struct Walk {
  using T = typename Tile::T;
  using GatherA = Gather<T, Tile::kRows, kDepth<T>>;

  uint32_t later;  // taps of the word after the next one
  int32_t tap, next_tap;
  int32_t channel;
  uint32_t masks[GatherA::kOwn];  // of the thread's own rows: where they have no tap, the table may hold anything
  int32_t rows[GatherA::kOwn], next_rows[GatherA::kOwn];

  __device__ void start(const ConvForwardArgs& a, int32_t first_row, int32_t word, uint32_t bits) {
    later = bits;
    channel = 0;
#pragma unroll
    for (int i = 0; i < GatherA::kOwn; ++i) {
      const int64_t m = first_row + GatherA::own_row(i);
      masks[i] = m < a.out_rows.rows ? a.masks[m * a.mask_words + word] : 0;
    }
    fetch_next(a, first_row, word);
    step_to_next(a, first_row, word);
  }

  __device__ void advance(const ConvForwardArgs& a, int32_t first_row, int32_t word) {
    channel += kDepth<T>;
    if (channel < a.in_channels) return;
    channel = 0;
    step_to_next(a, first_row, word);
  }

 private:
  __device__ void step_to_next(const ConvForwardArgs& a, int32_t first_row, int32_t word) {
    tap = next_tap;
#pragma unroll
    for (int i = 0; i < GatherA::kOwn; ++i) rows[i] = next_rows[i];
    fetch_next(a, first_row, word);
  }

  // Reads the table a tap ahead of the copies that need it.
  __device__ void fetch_next(const ConvForwardArgs& a, int32_t first_row, int32_t word) {
    if (later == 0) return;
    const int bit = __ffs(static_cast<int>(later)) - 1;
    next_tap = word * 32 + bit;
    later &= later - 1;
    const int32_t* entries = a.table + static_cast<int64_t>(next_tap) * a.out_rows.rows;
#pragma unroll
    for (int i = 0; i < GatherA::kOwn; ++i) {
      const int32_t row = masks[i] >> bit & 1 ? entries[first_row + GatherA::own_row(i)] : -1;
      next_rows[i] = row < a.in_rows ? row : -1;
    }
  }
};

template <typename Tile>
constexpr int kBlocksAtLeast = Tile::kRows == 128 && sizeof(typename Tile::T) == 4 ? 4 : 0;  // 15 registers over, else

template <typename Tile>
__global__ void __launch_bounds__(kTileThreads, kBlocksAtLeast<Tile>) conv_forward_kernel(ConvForwardArgs a) {
  using T = typename Tile::T;
  using Sum = typename Tile::Sum;
  using GatherA = Gather<T, Tile::kRows, kDepth<T>>;
  using GatherB = Gather<T, kDepth<T>, kTileCols>;
  constexpr int kRows = Tile::kRows;
  constexpr int kStrideOfA = kStrideA<T, kRows, Tile::kLayoutA>;
  constexpr int kStageElements = kElementsA<T, kRows, Tile::kLayoutA> + kElementsB<T>;
  constexpr int kStageBytes = kStages * kStageElements * static_cast<int>(sizeof(T));
  constexpr int kResultBytes = kRows * kStrideC * static_cast<int>(sizeof(Sum));
  alignas(128) __shared__ unsigned char shared[kStageBytes > kResultBytes ? kStageBytes : kResultBytes];
  __shared__ uint32_t tile_masks[2];  // in turn: where a word has no tap, the next one follows without a barrier

  const int32_t col_tiles = static_cast<int32_t>(div_up(a.out_channels, kTileCols));
  const int32_t first_row = static_cast<int32_t>(blockIdx.x / col_tiles) * kRows;
  const int32_t first_col = static_cast<int32_t>(blockIdx.x % col_tiles) * kTileCols;
  const int32_t used_cols = min(kTileCols, a.out_channels - first_col);
  const T* x = static_cast<const T*>(a.x);
  const T* w = static_cast<const T*>(a.w);
  const bool x_vectors = rows_are_vectors<T>(x, a.in_channels);
  const bool w_vectors = rows_are_vectors<T>(w, a.out_channels);
  const int t = threadIdx.x;
  const bool own_row_is_real = t < kRows && row_is_real(a.out_rows, first_row + t);

  Tile tile;
  tile.clear();
  const int32_t channel_steps = static_cast<int32_t>(div_up(a.in_channels, kDepth<T>));
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

    Walk<Tile> walk;
    walk.start(a, first_row, word, bits);
    const int32_t steps = __popc(bits) * channel_steps;
    const auto copy_step = [&](int32_t step) {
      if (step < steps) {
        T* tile_a = reinterpret_cast<T*>(shared) + step % kStages * kStageElements;
        T* tile_b = tile_a + kElementsA<T, kRows, Tile::kLayoutA>;
        GatherA::copy(tile_a, kStrideOfA, x, a.in_channels, walk.channel, x_vectors,
                      [&](int i) { return walk.rows[i]; });
        const int64_t first_weight = static_cast<int64_t>(walk.tap) * a.in_channels + walk.channel;
        GatherB::copy(tile_b, kStrideB<T>, w, a.out_channels, first_col, w_vectors, [&](int i) {
          const int d = GatherB::own_row(i);
          return walk.channel + d < a.in_channels ? first_weight + d : int64_t{-1};
        });
        walk.advance(a, first_row, word);
      }
      __pipeline_commit();  // an empty one at the end, so that the count of steps in flight holds
    };

    for (int32_t step = 0; step < kStages - 1; ++step) copy_step(step);
    for (int32_t step = 0; step < steps; ++step) {
      __pipeline_wait_prior(kStages - 2);
      __syncthreads();  // this step has arrived for all; the one before is no longer read
      copy_step(step + kStages - 1);
      const T* tile_a = reinterpret_cast<const T*>(shared) + step % kStages * kStageElements;
      tile.multiply(tile_a, tile_a + kElementsA<T, kRows, Tile::kLayoutA>, kRows, used_cols);
    }
    __pipeline_wait_prior(0);
    __syncthreads();  // the stages are free for the next word, or for the result
  }

  Sum* result = reinterpret_cast<Sum*>(shared);
  tile.store(result);
  __syncthreads();
  for (int i = t; i < kRows * kTileCols; i += kTileThreads) {
    const int r = i / kTileCols, c = i % kTileCols;
    const int32_t m = first_row + r;
    if (m >= a.out_rows.rows || c >= used_cols) continue;
    const Sum sum = row_is_real(a.out_rows, m) ? result[r * kStrideC + c] + Sum(0) : Sum(0);
    const int64_t at = static_cast<int64_t>(m) * a.out_channels + first_col + c;
    if (a.out_dtype == a.dtype) {
      static_cast<T*>(a.y)[at] = narrow<T>(sum);
    } else {
      static_cast<float*>(a.y)[at] = static_cast<float>(sum);
    }
  }
}

template <typename Tile>
cudaError_t run(const ConvForwardArgs& a, cudaStream_t stream) {
  const int64_t blocks = div_up(a.out_rows.rows, Tile::kRows) * div_up(a.out_channels, kTileCols);
  return launch(conv_forward_kernel<Tile>, blocks, {kTileThreads}, stream, a);
}

template <template <typename, int, LayoutA> class Tile, typename T>
cudaError_t run_tile_rows(const ConvForwardArgs& a, cudaStream_t stream) {
  switch (a.tile_rows) {
    case 32: return run<Tile<T, 32, LayoutA::kRowMajor>>(a, stream);
    case 64: return run<Tile<T, 64, LayoutA::kRowMajor>>(a, stream);
    case 128: return run<Tile<T, 128, LayoutA::kRowMajor>>(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t conv_forward(const ConvForwardArgs& a, cudaStream_t stream) {
  switch (a.dtype) {
    case Dtype::kF16: return run_tile_rows<TensorTile, __half>(a, stream);
    case Dtype::kBF16: return run_tile_rows<TensorTile, __nv_bfloat16>(a, stream);
    case Dtype::kF32: return run_tile_rows<FmaTile, float>(a, stream);
    case Dtype::kF64: return run<FmaTile<double, 32, LayoutA::kRowMajor>>(a, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jaxsparse::cuda
