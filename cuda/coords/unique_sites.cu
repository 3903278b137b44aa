// One cooperative kernel:
//
//     keys    a key a point, and which of their bits differ
//     sort    (key, point) pairs, stably: the points of a site come in increasing order
//     count   how many keys each block's share has that differ from the one before
//     write   rows: sites, their points, the row of each point; then padding
//
// Bound by the sort's passes, about 5 for a scan of 36 bits; each is a few microseconds of latency up to a million points,
// 24 bytes a point beyond.
//
// Tried and left: sites by the tree of tree.cuh with marks straight to global memory, then points sorted by row, 17 bits
// instead of 36 to 45. On an H100 with 271,156 points 123 us (now 101): 60 for the tree, 20 for each pass of the sort.
#include "cuda/coords/unique_sites.h"

#include "cuda/sort/radix_sort.cuh"

namespace jaxsparse::cuda {
namespace {

struct Scratch {
  SortBuffers sort;
  uint64_t* bits_of;    // [blocks], of the keys in a block's share
  int32_t* no_keys_of;  // [blocks], points without a key
  int32_t* without_of;  // [kReasons, kMostBlocks], those by what they say
  int32_t* heads_of;    // [blocks], keys that differ from the one before
};

template <int D>
__global__ void __launch_bounds__(kGridThreads, 2) unique_sites_kernel(UniqueSitesArgs a, Scratch s) {
  __shared__ SortShared shared;
  __shared__ int32_t without[kReasons];
  const Grid grid = cooperative_groups::this_grid();
  const int64_t first_thread = global_thread();
  const int32_t n = real_rows(a.count, a.points);

  if (threadIdx.x < kReasons) without[threadIdx.x] = 0;
  __syncthreads();
  uint64_t bits = 0;
  int32_t no_keys = 0;
  for (int64_t p = first_thread; p < n; p += all_threads()) {
    const Site<D> site(a.coords, p);
    int64_t coord[D];
    for (int d = 0; d < D; ++d) coord[d] = site.coord[d];
    const Key key = make_key<D>(site.batch, coord);
    s.sort.keys[p] = key;
    if (key != kNoKey) {
      bits |= KeySpan<D>::bits_of(key);
    } else {
      ++no_keys;
      const int64_t why = -1 - int64_t{site.batch};
      if (why >= 0 && why < kReasons) atomicAdd(&without[why], 1);
    }
  }
  bits = block_or(bits);
  no_keys = block_sum(no_keys);
  if (threadIdx.x == 0) {
    s.bits_of[blockIdx.x] = bits;
    s.no_keys_of[blockIdx.x] = no_keys;
  }
  if (threadIdx.x < kReasons) s.without_of[threadIdx.x * kMostBlocks + blockIdx.x] = without[threadIdx.x];
  grid.sync();

  const int32_t with_key = n - sum_blocks(s.no_keys_of).all;
  const KeySpan<D> span(or_blocks(s.bits_of), with_key < n);
  radix_sort(grid, s.sort, n, span.bits(), shared, [&](Key key) { return span.code(key); });
  const Key* keys = s.sort.keys;
  const uint32_t* points = s.sort.values;

  const auto is_head = [&](int32_t i) { return i < with_key && (i == 0 || keys[i - 1] != keys[i]); };
  const Range own = share(n, kGridThreads, gridDim.x);
  int32_t heads = 0;
  for (int32_t i = own.begin + threadIdx.x; i < own.end; i += kGridThreads) heads += is_head(i);
  heads = block_sum(heads);
  if (threadIdx.x == 0) s.heads_of[blockIdx.x] = heads;
  grid.sync();

  const BlockSums rows = sum_blocks(s.heads_of);
  int32_t next = rows.before;
  for (int32_t begin = own.begin; begin < own.end; begin += kGridThreads) {
    const int32_t i = begin + threadIdx.x;
    const bool head = i < own.end && is_head(i);
    int32_t total;
    const int32_t row = next + block_exclusive_scan<kGridThreads>(static_cast<int32_t>(head), &total) - (head ? 0 : 1);
    next += total;
    if (i >= own.end) continue;
    if (head && row < a.capacity) write_site<D>(keys[i], a.sites + static_cast<int64_t>(row) * (1 + D));
    if (head && row <= a.capacity) a.offsets[row] = static_cast<int32_t>(i);
    const bool kept = i < with_key && row < a.capacity;
    a.row_of[points[i]] = kept ? row : -1;
    a.order[i] = kept ? static_cast<int32_t>(points[i]) : -1;
  }
  for (int64_t i = n + first_thread; i < a.points; i += all_threads()) a.row_of[i] = a.order[i] = -1;
  for (int64_t row = rows.all + first_thread; row <= a.capacity; row += all_threads()) {
    a.offsets[row] = static_cast<int32_t>(with_key);
    if (row < a.capacity) write_padding<D>(a.sites + row * (1 + D));
  }
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x < kReasons * kWarp) {  // a warp a reason
    const int why = threadIdx.x / kWarp;
    int32_t points_without = 0;
    for (unsigned block = threadIdx.x % kWarp; block < gridDim.x; block += kWarp) {
      points_without += s.without_of[why * kMostBlocks + block];
    }
    points_without = warp_sum(points_without);
    if (threadIdx.x % kWarp == 0) a.without[why] = points_without;
  }
  if (first_thread == 0) {
    *a.kept = min(rows.all, a.capacity);
    *a.found = rows.all;
  }
}

template <int D>
cudaError_t unique_sites_in(const UniqueSitesArgs& a, cudaStream_t stream) {
  Workspace workspace(a.workspace);
  Scratch s;
  s.sort = take_sort_buffers(workspace, a.points);
  s.bits_of = workspace.take<uint64_t>(kMostBlocks);
  s.no_keys_of = workspace.take<int32_t>(kMostBlocks);
  s.without_of = workspace.take<int32_t>(kReasons * kMostBlocks);
  s.heads_of = workspace.take<int32_t>(kMostBlocks);
  return launch_grid(unique_sites_kernel<D>, div_up(a.points, kGridThreads), stream, a, s);
}

}  // namespace

cudaError_t unique_sites(const UniqueSitesArgs& a, cudaStream_t stream) {
  return for_dims(a.dims, [&](auto dims) { return unique_sites_in<decltype(dims)::value>(a, stream); });
}

}  // namespace jaxsparse::cuda
