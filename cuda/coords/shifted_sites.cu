// Coarse sites if coordinates are only shifted right (see coarse_shift) and fine sites are sorted. One cooperative kernel:
//
//     count   heads, the fine sites whose coarse site differs from the previous one's, in each block's share. The index is
//             cleared first, and padding is written while the loads of sites are in flight
//     write   the heads' coarse sites and the index, last tile first: it is still in registers, the one before in the cache
//
// On an H200 with the index, which a 3^3 map of the coarse sites needs anyway, 7.2 us for 10,000 sites, 9 for 100,000, 32 for
// 1 million, 140 for 4 million.
#include "cuda/common/grid.cuh"
#include "cuda/coords/coarse_sites.h"
#include "cuda/coords/kernel_map.h"
#include "cuda/coords/padding.cuh"
#include "cuda/coords/site_index.cuh"

namespace jaxsparse::cuda {
namespace {

// A thread's part of the coarse sites of up to kRows consecutive fine ones. A warp handles sets of 32 consecutive rows. Fine
// sites have keys, and coarse ones are nearer to 0, so no key has to be checked.
template <int D>
struct ShiftedTile {
  static constexpr int kAtOnce = D < 4 ? 4 : 2, kRows = kAtOnce * kGridThreads;

  Site<D> site[kAtOnce];
  unsigned heads[kAtOnce];  // lanes of the warp whose row is the first of its coarse site

  __device__ int32_t of_warp() const {
    int32_t sum = 0;
    for (int i = 0; i < kAtOnce; ++i) sum += __popc(heads[i]);
    return sum;
  }

  // A warp's rows are sets() times 32 from first_row() on, as far as the tile goes.
  static __device__ int sets(Range tile) { return (tile.end - tile.begin + kGridThreads - 1) / kGridThreads; }
  static __device__ int32_t first_row(Range tile) {
    return tile.begin + static_cast<int32_t>(threadIdx.x) / kWarp * sets(tile) * kWarp;
  }

  static __device__ bool is_within(const CoarseSitesArgs& a, const Site<D>& site) {
    bool is_within = true;
    for (int d = 0; d < D; ++d) is_within = is_within && (!a.bounded || (site.coord[d] >= 0 && site.coord[d] < a.bounds[d]));
    return is_within;
  }

  // Calls meanwhile() while the loads of sites are in flight.
  template <typename Meanwhile>
  __device__ void read(const CoarseSitesArgs& a, int shift, Range tile, Meanwhile meanwhile) {
    const int each = sets(tile), lane = threadIdx.x % kWarp;
    const int32_t first = first_row(tile);
    Site<D> before(a.coords, max(min(first, tile.end) - 1, 0));
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (i < each) site[i] = Site<D>(a.coords, min(first + i * kWarp + lane, tile.end - 1));
    }
    meanwhile();
    for (int d = 0; d < D; ++d) before.coord[d] >>= shift;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t row = first + i * kWarp + lane;
      if (i >= each) {
        heads[i] = 0;
        continue;
      }
      bool differs = differs_below(site[i].batch, &before.batch) || row == 0;
      for (int d = 0; d < D; ++d) {
        site[i].coord[d] >>= shift;
        differs = differs_below(site[i].coord[d], &before.coord[d]) || differs;
      }
      heads[i] = __ballot_sync(kAllLanes, differs && row < tile.end && is_within(a, site[i]));
    }
  }

  // Whether a value differs from that of the lane below. *before is the value below lane 0, then that of the last lane.
  static __device__ bool differs_below(int32_t value, int32_t* before) {
    const int32_t below = __shfl_up_sync(kAllLanes, value, 1);
    const bool differs = value != (threadIdx.x % kWarp == 0 ? *before : below);
    *before = __shfl_sync(kAllLanes, value, kWarp - 1);
    return differs;
  }
};

template <int D>
__global__ void __launch_bounds__(kGridThreads, 2) shifted_sites_kernel(CoarseSitesArgs a, int shift, int32_t* heads_of) {
  const Grid grid = cooperative_groups::this_grid();
  const int32_t n = real_rows(a.count, a.rows);
  if (a.index != nullptr) {  // there are no more coarse sites than fine ones
    BlockIndex(a.index, a.capacity, BlockIndex::slots_for(min(n, a.capacity))).clear();
  }
  const Range own = share(n, kWarp, gridDim.x);
  ShiftedTile<D> tile;
  const auto tile_at = [&](int32_t begin) { return Range{begin, min(begin + tile.kRows, own.end)}; };
  const int lane = threadIdx.x % kWarp;
  int32_t heads = 0, last = own.begin;
  const auto coarse_at = [&](int32_t row) {
    Site<D> site(a.coords, row);
    for (int d = 0; d < D; ++d) site.coord[d] >>= shift;
    return site;
  };
  const auto in_block_at = [&](const Site<D>& site) {
    InBlock in = in_block(site);
    if (!tile.is_within(a, site)) in.bit = -1;
    return in;
  };
  const auto fill = [&] { fill_padding<D>(a.sites, n, a.capacity); };
  if (own.begin >= own.end) fill();
  for (int32_t begin = own.begin; begin < own.end; begin += tile.kRows) {
    tile.read(a, shift, tile_at(begin), [&] {
      if (begin == own.begin) fill();
    });
    heads += lane == 0 ? tile.of_warp() : 0;
    last = begin;
  }
  heads = block_sum(heads);
  if (threadIdx.x == 0) heads_of[blockIdx.x] = heads;
  grid.sync();

  // From the last tile, which is in registers, to the first: what was read last is most likely still in the cache.
  const BlockSums rows = sum_blocks(heads_of);
  int32_t next = rows.before + heads;
  for (int32_t begin = last; begin >= own.begin && begin < own.end; begin -= tile.kRows) {
    if (begin != last) tile.read(a, shift, tile_at(begin), [] {});
    int32_t total;
    const int32_t before = block_exclusive_scan<kGridThreads>(lane == 0 ? tile.of_warp() : 0, &total);
    next -= total;
    // Of a warp, too, the last rows first: a block that begins in some needs to know its sites in those after.
    int32_t row = next + __shfl_sync(kAllLanes, before, 0) + __shfl_sync(kAllLanes, tile.of_warp(), 0);
    const Range of_tile = tile_at(begin);
    const int32_t first = tile.first_row(of_tile), end = min(first + tile.sets(of_tile) * kWarp, of_tile.end);
    Rest rest{kNoKey, 0};
    if (a.index != nullptr && first < end) {
      rest.block = in_block(coarse_at(end - 1)).block;
      const auto later_at = [&](int32_t row) { return row < n ? in_block_at(coarse_at(row)) : InBlock{kNoKey, -1}; };
      for (int32_t later = end + lane; rest.add(later_at(later));) later += kWarp;
    }
#pragma unroll
    for (int i = tile.kAtOnce - 1; i >= 0; --i) {
      if (first + i * kWarp >= end) continue;
      row -= __popc(tile.heads[i]);
      const int32_t own_row = row + __popc(tile.heads[i] & ((1u << lane) - 1));
      if ((tile.heads[i] >> lane & 1) != 0 && own_row < a.capacity) tile.site[i].write(a.sites, own_row);
      if (a.index == nullptr) continue;
      // Made here, since keeping it in registers from the start would spill.
      const BlockIndex index(a.index, a.capacity, BlockIndex::slots_for(min(n, a.capacity)));
      const int32_t set = first + i * kWarp;
      const bool begins = set == 0 || !same_block(coarse_at(set - 1), tile.site[i]);  // of lane 0
      enter_in_order(index, in_block_at(tile.site[i]), own_row, a.capacity, begins, &rest);
    }
  }
  end_sites<D>(a, rows.all, min(n, a.capacity));
  if (global_thread() == 0) *a.outside = 0;
}

}  // namespace

cudaError_t shifted_sites(const CoarseSitesArgs& a, cudaStream_t stream) {
  const int shift = coarse_shift(a.geometry);
  const bool looks_ahead = shift == 1;  // a block has at most 64 * 2^D fine sites; of wider cells, too many to look ahead for
  CoarseSitesArgs sites = a;
  if (!looks_ahead) sites.index = nullptr;
  JAXSPARSE_TRY(for_dims(a.geometry.dims, [&](auto dims) {
    return launch_grid(shifted_sites_kernel<decltype(dims)::value>, div_up(a.rows, kGridThreads), stream, sites, shift,
                       Workspace(a.workspace).take<int32_t>(kMostBlocks));
  }));
  if (looks_ahead || a.index == nullptr) return cudaSuccess;
  return site_index({a.sites, a.kept, a.geometry.dims, true, a.capacity, a.index}, stream);
}

}  // namespace jaxsparse::cuda
