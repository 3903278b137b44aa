// Finds the distinct sites of a list of points. One cooperative kernel:
//
//     keys    makes the key of each point, finds which key bits matter, and counts the digits of the first pass
//     sort    sorts (key, point) pairs stably, so that the points of a site come in increasing order
//     count   counts the keys in each block's share that differ from the previous one
//     write   writes sites, their points, and the row of each point; then padding
//
// Bound by the sort's passes, four for a scan, whose keys differ in 33 bits. A pass is a few microseconds of latency up to
// some hundred thousand points, 24 bytes per point beyond. On an H200 38 us with 124,668 points, 52 with 271,156, 155 with 1
// million, 605 with 4 million. With as many bits on each axis as the longest needs, up to 54, and codes recomputed in each
// pass, it took 39, 57, 204 and 857; 5 and 100 of the gain are due to the counts of large shares.
//
// Tried: padding written during the barriers after the passes of the sort, for 400,000 rows of 100,000 points: 37.2 us, and 0.3
// more without padding. And sites by the tree of tree.cuh, with marks in global memory, then points sorted by row, 17 bits
// instead of 36 to 45: on an H100 with 271,156 points 123 us (101 by sorting at that time), 60 for the tree, 20 for each pass.
#include "cuda/coords/unique_sites.h"

#include "cuda/coords/key_span.cuh"
#include "cuda/coords/padding.cuh"
#include "cuda/sort/radix_sort.cuh"

namespace jaxsparse::cuda {
namespace {

struct Scratch {
  SortBuffers sort;
  uint64_t* bits_of;    // [blocks], OR of KeySpan::bits_of over a block's share
  int32_t* without_of;  // [kReasons, kMostBlocks], number of points without a key, by reason
  int32_t* heads_of;    // [blocks], number of keys that differ from the previous one
  int32_t* with_key;    // [1], number of points with a key
};

// A thread's part of the sorted list. A warp handles kSortPerThread sets of 32 consecutive keys.
struct Part {
  uint64_t code[kSortPerThread];
  bool is_head[kSortPerThread];

  __device__ Part(const uint64_t* codes, int32_t first, int32_t end) {
    uint64_t below[kSortPerThread];
#pragma unroll
    for (int i = 0; i < kSortPerThread; ++i) {
      const int32_t at = first + i * kWarp;
      code[i] = at < end ? codes[at] : kNoKey;
      below[i] = at < end && at > 0 ? codes[at - 1] : kNoKey;
    }
#pragma unroll
    for (int i = 0; i < kSortPerThread; ++i) is_head[i] = code[i] != kNoKey && code[i] != below[i];
  }
};

template <int D>
__global__ void __launch_bounds__(kSortThreads, 1) unique_sites_kernel(UniqueSitesArgs a, Scratch s) {
  __shared__ SortShared shared;
  __shared__ int32_t without[kReasons];
  __shared__ KeySpan<D> span;
  const Grid grid = cooperative_groups::this_grid();
  const int64_t first_thread = global_thread();
  const int32_t n = real_rows(a.count, a.points);

  if (threadIdx.x < kReasons) without[threadIdx.x] = 0;
  __syncthreads();
  uint64_t bits = 0;
  put_keys(s.sort, n, shared, [&](int64_t p) {
    const Site<D> site(a.coords, p);
    const Key key = make_key<D>(site.batch, site.coord);
    bits |= KeySpan<D>::bits_of(key);
    const int64_t why = -1 - int64_t{site.batch};
    if (key == kNoKey && why >= 0 && why < kReasons) atomicAdd(&without[why], 1);
    return key;
  });
  bits = block_or<kSortThreads>(bits);  // contains a barrier, after which `without` is complete
  if (threadIdx.x == 0) s.bits_of[blockIdx.x] = bits;
  if (first_thread == 0) *s.with_key = n;
  if (threadIdx.x < kReasons) s.without_of[threadIdx.x * kMostBlocks + blockIdx.x] = without[threadIdx.x];
  sync_while(grid, [&] {  // there are no more sites than points: the rest is padding
    for (int64_t i = n + first_thread; i < a.points; i += all_threads()) a.row_of[i] = a.order[i] = -1;
    fill_padding<D>(a.sites, n, a.capacity);
  });

  bits = or_blocks<kSortThreads>(s.bits_of);
  if (threadIdx.x == 0) span.make(bits, kDigits - 1);  // the first pass's digit is counted already
  __syncthreads();
  radix_sort(grid, s.sort, n, span.bits(), shared, [&](Key (&keys)[kSortPerThread]) { span.to_codes(keys); });
  const uint64_t* codes = s.sort.keys;
  const uint32_t* points = s.sort.values;

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Range own = share(n, kWarp, gridDim.x);
  int32_t heads = 0;
  for (int32_t begin = own.begin; begin < own.end; begin += kSortTile) {
    const int32_t first = begin + warp * kSortPerThread * kWarp + lane;
    const Part part(codes, first, own.end);
#pragma unroll
    for (int i = 0; i < kSortPerThread; ++i) {
      const int32_t at = first + i * kWarp;
      heads += part.is_head[i];
      if (at < own.end && part.code[i] == kNoKey && (at == 0 || codes[at - 1] != kNoKey)) *s.with_key = at;
    }
  }
  heads = block_sum<kSortThreads>(heads);
  if (threadIdx.x == 0) s.heads_of[blockIdx.x] = heads;
  grid.sync();

  const BlockSums rows = sum_blocks<kSortThreads>(s.heads_of);
  const int32_t with_key = *s.with_key;
  int32_t next = rows.before;
  for (int32_t begin = own.begin; begin < own.end; begin += kSortTile) {
    const int32_t first = begin + warp * kSortPerThread * kWarp + lane;
    const Part part(codes, first, own.end);
    unsigned votes[kSortPerThread];
    int32_t of_warp = 0, total;
#pragma unroll
    for (int i = 0; i < kSortPerThread; ++i) {
      votes[i] = __ballot_sync(kAllLanes, part.is_head[i]);
      of_warp += __popc(votes[i]);
    }
    const int32_t before = block_exclusive_scan<kSortThreads>(lane == 0 ? of_warp : 0, &total);
    int32_t row = next + __shfl_sync(kAllLanes, before, 0) - 1;  // row of the last head before the warp's keys
    next += total;
#pragma unroll
    for (int i = 0; i < kSortPerThread; ++i) {
      const int32_t at = first + i * kWarp;
      const int32_t own_row = row + __popc(votes[i] & (0xffffffffu >> (kWarp - 1 - lane)));
      row += __popc(votes[i]);
      if (at >= own.end) continue;
      if (part.is_head[i] && own_row < a.capacity) {
        write_site<D>(span.key(part.code[i]), a.sites + static_cast<int64_t>(own_row) * (1 + D));
      }
      if (part.is_head[i] && own_row <= a.capacity) a.offsets[own_row] = at;
      const bool kept = part.code[i] != kNoKey && own_row < a.capacity;
      const uint32_t point = points[at];
      a.row_of[point] = kept ? own_row : -1;
      a.order[at] = kept ? static_cast<int32_t>(point) : -1;
    }
  }
  end_sites<D>(a, rows.all, min(n, a.capacity));
  for (int64_t row = rows.all + first_thread; row <= a.capacity; row += all_threads()) a.offsets[row] = with_key;
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x < kReasons * kWarp) {  // a warp per reason
    const int why = threadIdx.x / kWarp;
    int32_t points_without = 0;
    for (unsigned block = threadIdx.x % kWarp; block < gridDim.x; block += kWarp) {
      points_without += s.without_of[why * kMostBlocks + block];
    }
    points_without = warp_sum(points_without);
    if (threadIdx.x % kWarp == 0) a.without[why] = points_without;
  }
}

template <int D>
cudaError_t unique_sites_in(const UniqueSitesArgs& a, cudaStream_t stream) {
  Workspace workspace(a.workspace);
  Scratch s;
  JAXSPARSE_TRY(take_sort_buffers(workspace, a.points, stream, &s.sort));
  s.bits_of = workspace.take<uint64_t>(kMostBlocks);
  s.without_of = workspace.take<int32_t>(kReasons * kMostBlocks);
  s.heads_of = workspace.take<int32_t>(kMostBlocks);
  s.with_key = workspace.take<int32_t>(1);
  return launch_grid<kSortThreads>(unique_sites_kernel<D>, div_up(a.points, kSortThreads), stream, a, s);
}

}  // namespace

cudaError_t unique_sites(const UniqueSitesArgs& a, cudaStream_t stream) {
  return for_dims(a.dims, [&](auto dims) { return unique_sites_in<decltype(dims)::value>(a, stream); });
}

}  // namespace jaxsparse::cuda
