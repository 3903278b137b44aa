// Candidates -> keys -> sort -> drop equal neighbours. All of it is bound by memory traffic; the sort dominates.
//
//     keys      a candidate a thread, kNoKey where it does not count, so that it sorts behind every site
//     heads     a tile of sorted keys a block: how many keys differ from the one before
//     offsets   one block: running sum of the heads over the tiles; its total is `found`
//     distinct  each tile again: writes its heads, in order, as keys (workspace) and as sites (result)
//     rows      a point a thread: binary search for its key among the distinct ones
//
// The sort has a host-side size, so it follows capacity; every other step leaves at once past the real candidates.
#include "cuda/coords/sites.h"

#include "cuda/common/device.cuh"

namespace jaxsparse::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = kTileKeys / kThreads;

__device__ bool is_head(const Key* keys, int64_t i, int64_t n) {
  return i < n && keys[i] != kNoKey && (i == 0 || keys[i - 1] != keys[i]);
}

template <int D>
__global__ void point_keys_kernel(UniqueSitesArgs a, Key* keys) {
  const int64_t p = global_thread();
  if (p >= a.points) return;
  keys[p] = p < a.count[0] ? key_of_row<D>(a.coords + p * (1 + D)) : kNoKey;
}

// A thread has one (fine site, window) candidate: window w picks one coarse coordinate on each axis.
template <int D>
__global__ void coarse_keys_kernel(CoarseSitesArgs a, int64_t windows, int64_t candidates, Key* keys) {
  const int64_t i = global_thread();
  const int64_t row = i / windows;
  bool lost = false;
  Key key = kNoKey;
  if (i < candidates && row < a.count[0]) {
    const int32_t* site = a.coords + row * (1 + D);
    int64_t window = i % windows;
    int64_t coarse[D];
    bool counts = key_of_row<D>(site) != kNoKey;
    for (int d = D - 1; d >= 0; --d) {
      const Geometry& g = a.geometry;
      const CoarseAxis axis{g.kernel[d], g.stride[d], g.padding[d], g.dilation[d]};
      const int64_t per_axis = axis.coarse_per_axis();
      coarse[d] = 0;
      counts = axis.coarse(site[1 + d], window % per_axis, &coarse[d]) && counts;
      counts = counts && (!a.bounded || (coarse[d] >= 0 && coarse[d] < a.bounds[d]));
      window /= per_axis;
    }
    if (counts) key = make_key<D>(site[0], coarse);
    lost = counts && key == kNoKey;
  }
  if (i < candidates) keys[i] = key;
  const int lost_in_block = __syncthreads_count(lost);
  if (threadIdx.x == 0 && lost_in_block > 0) atomicAdd(a.outside, lost_in_block);
}

__global__ void count_heads_kernel(const Key* keys, int64_t n, int32_t* tile_heads) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileKeys;
  int32_t heads = 0, total = 0;
  if (first < n && keys[first] != kNoKey) {  // the same for the whole block
    for (int j = 0; j < kPerThread; ++j) heads += is_head(keys, first + j * kThreads + threadIdx.x, n);
    block_exclusive_scan<kThreads>(heads, &total);
  }
  if (threadIdx.x == 0) tile_heads[blockIdx.x] = total;
}

// One block. Replaces the tiles' counts by the sums before them.
__global__ void scan_tiles_kernel(int32_t* tile_heads, int32_t tiles, int32_t* found) {
  int32_t sum = 0;
  for (int32_t first = 0; first < tiles; first += kThreads) {
    const int32_t i = first + static_cast<int32_t>(threadIdx.x);
    int32_t total;
    const int32_t before = block_exclusive_scan<kThreads>(i < tiles ? tile_heads[i] : 0, &total);
    if (i < tiles) tile_heads[i] = sum + before;
    sum += total;
  }
  if (threadIdx.x == 0) *found = sum;
}

// Also pads the sites past the last distinct one.
template <int D>
__global__ void write_distinct_kernel(const Key* keys, int64_t n, const int32_t* tile_heads, const int32_t* found,
                                      int32_t capacity, int32_t* sites, Key* distinct) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileKeys;
  for (int64_t row = first + threadIdx.x; row < first + kTileKeys && row < capacity; row += kThreads) {
    if (row >= found[0]) write_padding<D>(sites + row * (1 + D));
  }
  if (first >= n || keys[first] == kNoKey) return;
  int32_t rank = tile_heads[blockIdx.x];
  for (int j = 0; j < kPerThread; ++j) {
    const int64_t i = first + j * kThreads + threadIdx.x;
    const bool head = is_head(keys, i, n);
    int32_t total;
    const int32_t row = rank + block_exclusive_scan<kThreads>(static_cast<int32_t>(head), &total);
    if (head) {
      distinct[row] = keys[i];
      if (row < capacity) write_site<D>(keys[i], sites + static_cast<int64_t>(row) * (1 + D));
    }
    rank += total;
  }
}

template <int D>
__global__ void find_rows_kernel(UniqueSitesArgs a, const Key* distinct) {
  const int64_t p = global_thread();
  if (p >= a.points) return;
  const Key key = p < a.count[0] ? key_of_row<D>(a.coords + p * (1 + D)) : kNoKey;
  int32_t row = -1;
  if (key != kNoKey) {  // then it is among the distinct keys
    int32_t low = 0, high = a.found[0];
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (distinct[middle] < key) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    row = low < a.capacity ? low : -1;
  }
  a.row_of[p] = row;
}

// Sorts n candidate keys and writes the distinct ones; `distinct` comes back as where their keys lie.
template <int D>
cudaError_t distinct_sites(Key* keys, Key* spare, int64_t n, Workspace workspace, int32_t capacity, int32_t* sites,
                           int32_t* found, Key** distinct, cudaStream_t stream) {
  const int64_t tiles = div_up(n, kTileKeys);
  int32_t* tile_heads = workspace.take<int32_t>(tiles + 1);
  const int64_t temp_bytes = sort_temp_bound(n);
  JAXSPARSE_TRY(sort_keys(&keys, &spare, n, 0, 64, workspace.take<char>(temp_bytes), temp_bytes, stream));
  JAXSPARSE_TRY(launch(count_heads_kernel, tiles, kThreads, stream, keys, n, tile_heads));
  JAXSPARSE_TRY(launch(scan_tiles_kernel, 1, kThreads, stream, tile_heads, tiles, found));
  const int64_t longest = n > capacity ? n : capacity;
  JAXSPARSE_TRY(launch(write_distinct_kernel<D>, div_up(longest, kTileKeys), kThreads, stream, keys, n, tile_heads,
                       found, capacity, sites, spare));
  *distinct = spare;
  return cudaSuccess;
}

template <int D>
cudaError_t unique_sites_in(const UniqueSitesArgs& a, cudaStream_t stream) {
  Workspace workspace(a.workspace);
  Key* keys = workspace.take<Key>(a.points);
  Key* spare = workspace.take<Key>(a.points);
  Key* distinct = nullptr;
  const int64_t blocks = div_up(a.points, kThreads);
  JAXSPARSE_TRY(launch(point_keys_kernel<D>, blocks, kThreads, stream, a, keys));
  JAXSPARSE_TRY(distinct_sites<D>(keys, spare, a.points, workspace, a.capacity, a.sites, a.found, &distinct, stream));
  return launch(find_rows_kernel<D>, blocks, kThreads, stream, a, distinct);
}

template <int D>
cudaError_t coarse_sites_in(const CoarseSitesArgs& a, cudaStream_t stream) {
  const int64_t windows = windows_per_site(a.geometry);
  const int64_t candidates = a.rows * windows;
  Workspace workspace(a.workspace);
  Key* keys = workspace.take<Key>(candidates);
  Key* spare = workspace.take<Key>(candidates);
  Key* distinct = nullptr;
  JAXSPARSE_TRY(cudaMemsetAsync(a.outside, 0, sizeof(int32_t), stream));
  JAXSPARSE_TRY(launch(coarse_keys_kernel<D>, div_up(candidates, kThreads), kThreads, stream, a, windows, candidates,
                       keys));
  return distinct_sites<D>(keys, spare, candidates, workspace, a.capacity, a.sites, a.found, &distinct, stream);
}

}  // namespace

cudaError_t unique_sites(const UniqueSitesArgs& a, cudaStream_t stream) {
  switch (a.dims) {
    case 1: return unique_sites_in<1>(a, stream);
    case 2: return unique_sites_in<2>(a, stream);
    case 3: return unique_sites_in<3>(a, stream);
    case 4: return unique_sites_in<4>(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t coarse_sites(const CoarseSitesArgs& a, cudaStream_t stream) {
  switch (a.geometry.dims) {
    case 1: return coarse_sites_in<1>(a, stream);
    case 2: return coarse_sites_in<2>(a, stream);
    case 3: return coarse_sites_in<3>(a, stream);
    case 4: return coarse_sites_in<4>(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace jaxsparse::cuda
