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
  // keeps it at most half full, and searches short.
  __device__ HashMap(uint64_t* keys, int64_t slots) : keys_(keys), last_(static_cast<uint64_t>(slots) - 1) {}

  // Empties the part of the slots that falls to `thread` of `threads`.
  __device__ void clear(int64_t thread, int64_t threads) {
    for (uint64_t s = thread; s <= last_; s += threads) keys_[s] = kNoKey;
  }

  // The slot of a key, which is entered if it is absent.
  __device__ int64_t insert_if_absent(uint64_t key) {
    for (uint64_t slot = hash(key) & last_;; slot = (slot + 1) & last_) {
      const uint64_t before = atomicCAS(reinterpret_cast<unsigned long long*>(keys_ + slot), kEmpty,
                                        static_cast<unsigned long long>(key));
      if (before == kNoKey || before == key) return static_cast<int64_t>(slot);
    }
  }

  // The slot of a key, -1 where it is absent.
  __device__ int64_t find(uint64_t key) const {
    for (uint64_t slot = hash(key) & last_;; slot = (slot + 1) & last_) {
      const uint64_t held = keys_[slot];
      if (held == key) return static_cast<int64_t>(slot);
      if (held == kNoKey) return -1;
    }
  }

 private:
  static constexpr unsigned long long kEmpty = ~0ull;

  uint64_t* keys_;
  uint64_t last_;
};

}  // namespace jaxsparse::cuda
