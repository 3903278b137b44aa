// count   how many pairs each tap has in each tile of output rows
// scan    the sums before each tile
// write   the pairs
#include "cuda/conv/pairs.h"

#include "cuda/common/device.cuh"

namespace jaxsparse::cuda {
namespace {

constexpr int kThreads = 256;

// A block a tap and tile: work follows the real rows, since a tile past them has nothing to read.
struct Tile {
  int32_t tap, number, tiles;

  __device__ explicit Tile(const PairsArgs& a) : tiles(static_cast<int32_t>(div_up(a.out_rows.rows, kTilePairRows))) {
    tap = static_cast<int32_t>(blockIdx.x) / tiles;
    number = static_cast<int32_t>(blockIdx.x) % tiles;
  }
};

__device__ Pair pair_at(const PairsArgs& a, int32_t tap, int32_t m) {
  if (!row_is_real(a.out_rows, m)) return {-1, m};
  const int32_t row = a.table[int64_t{tap} * a.out_rows.rows + m];
  return {row < a.in_rows ? row : -1, m};
}

__global__ void count_pairs_kernel(PairsArgs a, int32_t* tile_pairs) {
  const Tile tile(a);
  int32_t count = 0;
#pragma unroll
  for (int32_t j = 0; j < kTilePairRows / kThreads; ++j) {
    const int32_t m = tile.number * kTilePairRows + j * kThreads + static_cast<int32_t>(threadIdx.x);
    count += __syncthreads_count(pair_at(a, tile.tap, m).in_row >= 0);
  }
  if (threadIdx.x == 0) tile_pairs[int64_t{tile.tap} * (tile.tiles + 1) + tile.number] = count;
}

// A block a tap.
__global__ void scan_pairs_kernel(PairsArgs a, int32_t* tile_pairs, int32_t tiles) {
  tile_pairs += int64_t{blockIdx.x} * (tiles + 1);
  int32_t sum = 0;
  for (int32_t first = 0; first < tiles; first += kThreads) {
    const int32_t tile = first + static_cast<int32_t>(threadIdx.x);
    int32_t total;
    const int32_t before = block_exclusive_scan<kThreads>(tile < tiles ? tile_pairs[tile] : 0, &total);
    if (tile < tiles) tile_pairs[tile] = sum + before;
    sum += total;
  }
  if (threadIdx.x == 0) {
    tile_pairs[tiles] = sum;
    a.tap_pairs[blockIdx.x] = sum;
  }
}

__global__ void write_pairs_kernel(PairsArgs a, const int32_t* tile_pairs) {
  const Tile tile(a);
  tile_pairs += int64_t{tile.tap} * (tile.tiles + 1) + tile.number;
  int32_t at = tile_pairs[0];
  if (tile_pairs[1] == at) return;
  Pair* pairs = a.pairs + int64_t{tile.tap} * a.out_rows.rows;
  for (int32_t j = 0; j < kTilePairRows / kThreads; ++j) {
    const int32_t m = tile.number * kTilePairRows + j * kThreads + static_cast<int32_t>(threadIdx.x);
    const Pair pair = pair_at(a, tile.tap, m);
    const int32_t exists = pair.in_row >= 0;
    int32_t total;
    const int32_t before = block_exclusive_scan<kThreads>(exists, &total);
    if (exists) pairs[at + before] = pair;
    at += total;
  }
}

}  // namespace

cudaError_t list_pairs(const PairsArgs& a, cudaStream_t stream) {
  int32_t* tile_pairs = static_cast<int32_t*>(a.workspace);
  const int32_t tiles = static_cast<int32_t>(div_up(a.out_rows.rows, kTilePairRows));
  const int64_t blocks = int64_t{a.taps} * tiles;
  if (blocks > 0) JAXSPARSE_TRY(launch(count_pairs_kernel, blocks, {kThreads}, stream, a, tile_pairs));
  JAXSPARSE_TRY(launch(scan_pairs_kernel, a.taps, {kThreads}, stream, a, tile_pairs, tiles));
  return blocks > 0 ? launch(write_pairs_kernel, blocks, {kThreads}, stream, a, tile_pairs) : cudaSuccess;
}

}  // namespace jaxsparse::cuda
