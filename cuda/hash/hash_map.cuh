// A hash map of 64-bit keys in global memory: open addressing, linear probing, any number of slots.
//
// A slot is a struct of 16 or 32 bytes, aligned to its size, whose first member is the key. Slot::hash(key) has 32 bits, of
// which the high ones must be well mixed. The key of all ones marks an empty slot. Any number of threads may insert at once;
// find sees what was inserted before the last barrier or kernel. A key's slot depends on the order of threads, so results
// must not depend on slot numbers.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/hash/hash.h"

namespace jaxsparse::cuda {

template <typename Slot>
class HashMap {
  static_assert(sizeof(Slot) == alignof(Slot) && sizeof(Slot) % 16 == 0, "in one sector of the cache");

 public:
  // `number` of slots must exceed the number of distinct keys, or a search may never end; twice as many keep searches
  // short. Every slot's key must be kNoKey before the first insertion.
  __device__ HashMap(Slot* slots, uint32_t number) : slots_(slots), number_(number) {}

  // Returns the slot of a key, after inserting the key if it is absent.
  __device__ Slot* insert_if_absent(uint64_t key) {
    for (uint32_t at = first(key);; at = next(at)) {
      const uint64_t before = atomicCAS(reinterpret_cast<unsigned long long*>(&slots_[at].key), kEmpty,
                                        static_cast<unsigned long long>(key));
      if (before == kNoKey || before == key) return slots_ + at;
    }
  }

  // Looks up the wanted keys: found[i], and the slot number slots[i]. All keys are probed together, so that the first probes
  // are in flight at once, then the second ones; in a warp some key nearly always needs one. Only keys are kept in
  // registers: probing brings the slots into the cache for a later read.
  template <int kKeys>
  __device__ void find(const uint64_t (&keys)[kKeys], const bool (&wanted)[kKeys], uint32_t (&slots)[kKeys],
                       bool (&found)[kKeys]) const {
    uint64_t held[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      slots[i] = first(keys[i]);
      held[i] = wanted[i] ? slots_[slots[i]].key : kNoKey;
    }
    bool goes_on;
    do {
      goes_on = false;
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        if (held[i] == keys[i] || held[i] == kNoKey) continue;
        slots[i] = next(slots[i]);
        held[i] = slots_[slots[i]].key;
        goes_on = true;
      }
    } while (goes_on);
#pragma unroll
    for (int i = 0; i < kKeys; ++i) found[i] = held[i] != kNoKey;
  }

  __device__ const Slot& operator[](uint32_t slot) const { return slots_[slot]; }

 private:
  static constexpr unsigned long long kEmpty = ~0ull;

  __device__ uint32_t first(uint64_t key) const { return __umulhi(Slot::hash(key), number_); }
  __device__ uint32_t next(uint32_t at) const { return at + 1 < number_ ? at + 1 : 0; }

  Slot* slots_;
  uint32_t number_;
};

}  // namespace jaxsparse::cuda
