// A hash map of 64-bit keys in device memory: open addressing, linear probing, a power of two slots.
//
// It holds keys only; values lie in arrays of the same number of slots, kept by whoever uses it. All ones is no key: it
// marks an empty slot. Any number of threads may insert at once; find sees what was inserted before the last barrier.
// Which slot a key gets depends on who came first, so slots must not reach a result.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/hash/hash.h"

namespace jaxsparse::cuda {

class HashMap {
 public:
  // `slots` must be at least one more than the distinct keys that will come, or a search may never end; hash_slots()
  // keeps it at most half full, and searches short. Every slot must hold kNoKey before the first key comes.
  __device__ HashMap(uint64_t* keys, int64_t slots) : keys_(keys), last_(static_cast<uint64_t>(slots) - 1) {}

  // The slot of a key, which is entered if it is absent.
  __device__ int32_t insert_if_absent(uint64_t key) {
    for (uint64_t slot = hash(key) & last_;; slot = (slot + 1) & last_) {
      if (*static_cast<volatile uint64_t*>(keys_ + slot) == key) return static_cast<int32_t>(slot);  // often so
      const uint64_t before = atomicCAS(reinterpret_cast<unsigned long long*>(keys_ + slot), kEmpty,
                                        static_cast<unsigned long long>(key));
      if (before == kNoKey || before == key) return static_cast<int32_t>(slot);
    }
  }

  // The slots of several keys at once, -1 where one is absent or kNoKey: the first reads are on their way together.
  template <int kKeys>
  __device__ void find(const uint64_t (&keys)[kKeys], int32_t (&slots)[kKeys]) const {
    uint64_t held[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      slots[i] = static_cast<int32_t>(hash(keys[i]) & last_);
      held[i] = keys[i] == kNoKey ? kNoKey : keys_[slots[i]];
    }
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      while (held[i] != keys[i] && held[i] != kNoKey) {
        slots[i] = static_cast<int32_t>((static_cast<uint64_t>(slots[i]) + 1) & last_);
        held[i] = keys_[slots[i]];
      }
      if (held[i] == kNoKey) slots[i] = -1;
    }
  }

 private:
  static constexpr unsigned long long kEmpty = ~0ull;

  uint64_t* keys_;
  uint64_t last_;
};

}  // namespace jaxsparse::cuda
