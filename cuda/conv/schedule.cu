// One cooperative kernel:
//
//     keys    of each real row: which groups of taps it has any of, a bit a group, as a place in the Gray sequence, counted
//             down. Rows next to each other in that sequence differ in few groups, and crowded rows come first, so that
//             the long tiles of the convolution begin first
//     sort    rows by key, stably: rows of the same key stay in the order of their sites
//     tiles   the taps of each tile of 64 rows, and the entries of the table under them
//
// Executed over useful products of a 3^3 kernel, tiles of 64 rows, on average over three levels of three scans: 3.4 in the
// order of sites; sorted by the 27-bit mask 1.95, by the mask with rare taps first and in Gray order 1.70, both in three
// passes of the sort; by nine groups, the planes above and below and seven columns beside, 1.60 in one.
#include "cuda/conv/schedule.h"

#include "cuda/sort/radix_sort.cuh"

namespace jaxsparse::cuda {
namespace {

__device__ uint32_t sort_key(const ScheduleArgs& a, int32_t row) {
  uint32_t bits = 0;
  for (int32_t word = 0; word < a.mask_words; ++word) {
    const uint32_t mask = a.masks[int64_t{row} * a.mask_words + word];
    for (int32_t i = 0; i < a.groups; ++i) bits |= static_cast<uint32_t>((mask & a.group[i][word]) != 0) << (a.groups - 1 - i);
  }
  for (int shift = 1; shift < 32; shift *= 2) bits ^= bits >> shift;  // from Gray code to its place in the sequence
  return ~bits & ((1u << a.groups) - 1);
}

// A warp a tile, two rows a lane.
__device__ void lay_out_tile(const ScheduleArgs& a, int32_t tile, const int32_t (&row)[2], const bool (&real)[2]) {
  const int lane = threadIdx.x % kWarp;
  for (int32_t word = 0; word < a.mask_words; ++word) {
    uint32_t mask[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) mask[r] = real[r] ? a.masks[int64_t{row[r]} * a.mask_words + word] : 0;
    const uint32_t any = __reduce_or_sync(kAllLanes, mask[0] | mask[1]);
    if (lane == 0) a.tile_masks[int64_t{tile} * a.mask_words + word] = any;
    const int32_t* from = a.table + int64_t{word} * 32 * a.rows.rows;
    int32_t* to = a.tile_table + (int64_t{tile} * a.taps + word * 32) * kScheduleRows + lane;
#pragma unroll 4
    for (uint32_t rest = any; rest != 0; rest &= rest - 1) {
      const int32_t bit = __ffs(static_cast<int>(rest)) - 1;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        to[bit * kScheduleRows + r * kWarp] = mask[r] >> bit & 1 ? from[int64_t{bit} * a.rows.rows + row[r]] : -1;
      }
    }
  }
}

__global__ void __launch_bounds__(kGridThreads, 2) schedule_kernel(ScheduleArgs a, SortBuffers sort) {
  __shared__ SortShared shared;
  const Grid grid = cooperative_groups::this_grid();
  const int32_t rows = a.rows.rows;
  const bool sorts = a.groups > 0;
  const int32_t n = a.rows.number == 1 ? real_rows(a.rows.counts, rows) : rows;  // rows that may be real
  if (sorts) {
    for (int64_t row = global_thread(); row < n; row += all_threads()) {
      sort.keys[row] = row_is_real(a.rows, row) ? sort_key(a, row) : uint64_t{1} << a.groups;
    }
    grid.sync();
    radix_sort(grid, sort, n, a.groups + (a.rows.number > 1), shared, [](uint64_t key) { return key; });
  }
  const int32_t tiles = static_cast<int32_t>(div_up(rows, kScheduleRows));
  const int32_t all_warps = static_cast<int32_t>(all_threads() / kWarp);
  for (int32_t tile = static_cast<int32_t>(global_thread() / kWarp); tile < tiles; tile += all_warps) {
    int32_t row[2];
    bool real[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t m = tile * kScheduleRows + r * kWarp + static_cast<int32_t>(threadIdx.x) % kWarp;
      row[r] = sorts && m < n ? static_cast<int32_t>(sort.values[m]) : m;
      real[r] = m < n && row_is_real(a.rows, row[r]);
      if (m < rows) a.order[m] = row[r];
    }
    lay_out_tile(a, tile, row, real);
  }
}

}  // namespace

cudaError_t schedule(const ScheduleArgs& a, cudaStream_t stream) {
  Workspace workspace(a.workspace);
  const SortBuffers sort = take_sort_buffers(workspace, a.rows.rows);
  return launch_grid(schedule_kernel, div_up(a.rows.rows, kGridThreads), stream, a, sort);
}

}  // namespace jaxsparse::cuda
