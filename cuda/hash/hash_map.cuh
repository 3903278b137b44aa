// A hash map of 64-bit keys in global memory: open addressing, linear probing, a power of two slots.
//
// A slot is a struct of 16 or 32 bytes, aligned to its size, whose first member is the key: a search reads key and values in
// one access. All ones is no key: it marks an empty slot. Any number of threads may insert at once; find sees what was
// inserted before the last barrier or kernel. Which slot a key gets depends on who came first, so places must not reach a
// result.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/hash/hash.h"

namespace jaxsparse::cuda {

template <typename Slot>
class HashMap {
  static_assert(sizeof(Slot) == alignof(Slot) && sizeof(Slot) % 16 == 0, "read in accesses of 16 bytes");

 public:
  // `slots` must be at least one more than the distinct keys that will come, or a search may never end; hash_slots()
  // keeps it at most half full, and searches short. Every key must be kNoKey before the first one comes.
  __device__ HashMap(Slot* slots, int64_t number) : slots_(slots), last_(static_cast<uint64_t>(number) - 1) {}

  // The slot of a key, which is entered if it is absent.
  __device__ Slot* insert_if_absent(uint64_t key) {
    for (uint64_t at = hash(key) & last_;; at = (at + 1) & last_) {
      const uint64_t before = atomicCAS(reinterpret_cast<unsigned long long*>(&slots_[at].key), kEmpty,
                                        static_cast<unsigned long long>(key));
      if (before == kNoKey || before == key) return slots_ + at;
    }
  }

  // Copies of the slots of several keys, whose key is kNoKey where one is absent: the first reads are on their way
  // together.
  template <int kKeys>
  __device__ void find(const uint64_t (&keys)[kKeys], Slot (&found)[kKeys]) const {
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (keys[i] == kNoKey) {
        found[i].key = kNoKey;
      } else {
        found[i] = slots_[hash(keys[i]) & last_];
      }
    }
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      for (uint64_t at = hash(keys[i]); found[i].key != keys[i] && found[i].key != kNoKey;) {
        found[i] = slots_[++at & last_];
      }
    }
  }

 private:
  static constexpr unsigned long long kEmpty = ~0ull;

  Slot* slots_;
  uint64_t last_;
};

}  // namespace jaxsparse::cuda
