// Hash build, kernel map, reverse map: random access to a table that mostly fits L2, so bound by its latency; enough
// independent probes in flight is what matters.
#include "cuda/coords/kernel_map.h"

#include "cuda/common/device.cuh"

namespace jaxsparse::cuda {
namespace {

constexpr int kThreads = 256;

template <int D>
__global__ void hash_insert_kernel(const int32_t* coords, const int32_t* count, int32_t rows, HashTable hash) {
  const int64_t row = global_thread();
  if (row >= rows || row >= count[0]) return;
  const Key key = key_of_row<D>(coords + row * (1 + D));
  if (key == kNoKey) return;
  const uint64_t last = (uint64_t{1} << hash.log2_slots) - 1;
  uint64_t slot = first_slot(key, hash.log2_slots);
  for (;;) {  // ends: at most half of the slots are ever taken
    const Key before = atomicCAS(reinterpret_cast<unsigned long long*>(hash.keys + slot), kNoKey, key);
    if (before == kNoKey || before == key) break;
    slot = (slot + 1) & last;
  }
  atomicMin(reinterpret_cast<unsigned*>(hash.rows + slot), static_cast<unsigned>(row));  // -1 is the largest unsigned
}

__device__ int32_t find_row(const HashTable& hash, Key key) {
  const uint64_t slots = uint64_t{1} << hash.log2_slots;
  uint64_t slot = first_slot(key, hash.log2_slots);
  for (uint64_t probe = 0; probe < slots; ++probe) {
    const Key at = hash.keys[slot];
    if (at == key) return hash.rows[slot];
    if (at == kNoKey) return -1;
    slot = (slot + 1) & (slots - 1);
  }
  return -1;
}

// A block has 32 rows and one mask word: lane = row, so that table writes coalesce; its 8 warps share the word's taps.
constexpr int kMapRows = 32;
constexpr int kMapWarps = kThreads / kMapRows;

template <int D>
__global__ void kernel_map_kernel(KernelMapArgs a) {
  __shared__ uint32_t masks[kMapRows];
  const int lane = threadIdx.x % kMapRows;
  const int warp = threadIdx.x / kMapRows;
  const int32_t word = static_cast<int32_t>(blockIdx.x % a.mask_words);
  const int64_t row = static_cast<int64_t>(blockIdx.x / a.mask_words) * kMapRows + lane;
  const bool real = row < a.out_rows && row < a.out_count[0];
  if (warp == 0) masks[lane] = 0;
  __syncthreads();

  uint32_t mask = 0;
  for (int bit = warp; bit < 32; bit += kMapWarps) {
    const int32_t k = word * 32 + bit;
    if (k >= a.taps || row >= a.out_rows) break;
    int32_t found = -1;
    if (real) {
      int64_t tap[D];  // Geometry::split_tap, unrolled over the axes and in 32 bits
      int32_t rest = k;
      for (int d = D - 1; d >= 0; --d) {
        tap[d] = rest % static_cast<int32_t>(a.geometry.kernel[d]);
        rest /= static_cast<int32_t>(a.geometry.kernel[d]);
      }
      const Key key = a.geometry.template fine_key<D>(a.out_coords + row * (1 + D), tap);
      if (key != kNoKey) found = find_row(a.hash, key);
    }
    a.table[static_cast<int64_t>(k) * a.out_rows + row] = found;
    if (found >= 0) mask |= 1u << bit;
  }
  if (mask != 0) atomicOr(&masks[lane], mask);
  __syncthreads();
  if (warp == 0 && row < a.out_rows) a.masks[row * a.mask_words + word] = masks[lane];
}

__global__ void reverse_table_kernel(ReverseTableArgs a, int64_t entries) {
  const int64_t i = global_thread();
  if (i >= entries) return;
  const int32_t k = static_cast<int32_t>(i / a.out_rows.rows);
  const int32_t m = static_cast<int32_t>(i % a.out_rows.rows);
  if (!row_is_real(a.out_rows, m)) return;
  const int32_t row = a.table[i];
  if (row < 0 || row >= a.in_rows) return;
  a.reverse[static_cast<int64_t>(k) * a.in_rows + row] = m;
  atomicOr(&a.masks[static_cast<int64_t>(row) * a.mask_words + k / 32], 1u << (k % 32));
}

}  // namespace

cudaError_t hash_build(const int32_t* coords, const int32_t* count, int dims, int32_t rows, const HashTable& hash,
                       cudaStream_t stream) {
  const size_t slots = size_t{1} << hash.log2_slots;
  JAXSPARSE_TRY(cudaMemsetAsync(hash.keys, 0xff, slots * sizeof(Key), stream));      // kNoKey
  JAXSPARSE_TRY(cudaMemsetAsync(hash.rows, 0xff, slots * sizeof(int32_t), stream));  // -1
  const int64_t blocks = div_up(rows, kThreads);
  switch (dims) {
    case 1: return launch(hash_insert_kernel<1>, blocks, kThreads, stream, coords, count, rows, hash);
    case 2: return launch(hash_insert_kernel<2>, blocks, kThreads, stream, coords, count, rows, hash);
    case 3: return launch(hash_insert_kernel<3>, blocks, kThreads, stream, coords, count, rows, hash);
    case 4: return launch(hash_insert_kernel<4>, blocks, kThreads, stream, coords, count, rows, hash);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t kernel_map(const KernelMapArgs& a, cudaStream_t stream) {
  const int64_t blocks = div_up(a.out_rows, kMapRows) * a.mask_words;
  switch (a.geometry.dims) {
    case 1: return launch(kernel_map_kernel<1>, blocks, kThreads, stream, a);
    case 2: return launch(kernel_map_kernel<2>, blocks, kThreads, stream, a);
    case 3: return launch(kernel_map_kernel<3>, blocks, kThreads, stream, a);
    case 4: return launch(kernel_map_kernel<4>, blocks, kThreads, stream, a);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t reverse_table(const ReverseTableArgs& a, cudaStream_t stream) {
  const size_t reverse_bytes = sizeof(int32_t) * a.taps * a.in_rows;
  const size_t mask_bytes = sizeof(uint32_t) * a.in_rows * a.mask_words;
  const int64_t entries = static_cast<int64_t>(a.taps) * a.out_rows.rows;
  JAXSPARSE_TRY(cudaMemsetAsync(a.reverse, 0xff, reverse_bytes, stream));  // -1
  JAXSPARSE_TRY(cudaMemsetAsync(a.masks, 0, mask_bytes, stream));
  return launch(reverse_table_kernel, div_up(entries, kThreads), kThreads, stream, a, entries);
}

}  // namespace jaxsparse::cuda
