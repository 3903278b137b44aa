// How wgrad divides the pairs of all taps into slots. A slot holds up to a fixed number of pairs of one tap. A block sums
// the products of one slot; then the slots of each tap are added in a fixed order.
//
// The number of slots depends only on taps and channels, never on rows, and no float is added atomically, so results are
// bitwise reproducible. Blocks have equal work, however the pairs are distributed over the taps.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/common/grid.cuh"

namespace jaxsparse::cuda {

// A slot of a tap: its pairs [begin, end).
struct Slot {
  int32_t tap, begin, end;
};

constexpr int32_t kPairsMultiple = 64;    // a slot holds whole steps
constexpr int32_t kMinPairsInSlot = 256;  // with fewer, writing and adding slots would cost more than the products

// Called by one warp: the number of pairs in a slot. With R = ceil(pairs / (slots - taps)), the taps need
// sum_k ceil(pairs_k / R) <= pairs / R + taps <= slots.
__device__ inline int32_t pairs_in_slot(const int32_t* tap_pairs, int32_t taps, int32_t slots) {
  int64_t pairs = 0;
  for (int32_t k = threadIdx.x % kWarp; k < taps; k += kWarp) pairs += tap_pairs[k];
  const int64_t even = div_up(div_up(warp_sum(pairs), slots - taps), kPairsMultiple) * kPairsMultiple;
  return even > kMinPairsInSlot ? static_cast<int32_t>(even) : kMinPairsInSlot;
}

// Called by one warp: visit(k, first slot of k, number of slots of k) for each tap k of the lane.
template <typename Visit>
__device__ void for_slots(const int32_t* tap_pairs, int32_t taps, int32_t in_slot, Visit visit) {
  const int lane = threadIdx.x % kWarp;
  int32_t first = 0;
  for (int32_t base = 0; base < taps; base += kWarp) {
    const int32_t k = base + lane, own = k < taps ? (tap_pairs[k] + in_slot - 1) / in_slot : 0;
    const int32_t upto = warp_inclusive_scan(own);
    if (k < taps) visit(k, first + upto - own, own);
    first += __shfl_sync(kAllLanes, upto, kWarp - 1);
  }
}

// Called by the whole block: the slot with this number; its tap is -1 if there is none.
__device__ inline Slot find_slot(const int32_t* tap_pairs, int32_t taps, int32_t slots, int32_t number) {
  __shared__ Slot slot;
  if (threadIdx.x == 0) slot.tap = -1;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    const int32_t in_slot = pairs_in_slot(tap_pairs, taps, slots);
    for_slots(tap_pairs, taps, in_slot, [&](int32_t k, int32_t first, int32_t own) {
      if (number < first || number >= first + own) return;
      const int32_t begin = (number - first) * in_slot;
      slot = {k, begin, min(begin + in_slot, tap_pairs[k])};
    });
  }
  __syncthreads();
  return slot;
}

// Called by the whole block: the slots of a tap.
__device__ inline Range slots_of_tap(const int32_t* tap_pairs, int32_t taps, int32_t slots, int32_t tap) {
  __shared__ Range range;
  if (threadIdx.x < kWarp) {
    const int32_t in_slot = pairs_in_slot(tap_pairs, taps, slots);
    for_slots(tap_pairs, taps, in_slot, [&](int32_t k, int32_t first, int32_t own) {
      if (k == tap) range = {first, first + own};
    });
  }
  __syncthreads();
  return range;
}

}  // namespace jaxsparse::cuda
