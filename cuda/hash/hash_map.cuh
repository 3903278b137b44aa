// A hash map of 64-bit keys in global memory: open addressing, linear probing, any number of slots.
//
// A slot is a struct of 16 or 32 bytes, aligned to its size, whose first member is the key: a search reads key and values in
// one access. Slot::hash(key) is 32 bits whose high ones are well mixed. All ones is no key: it marks an empty slot. Any number of threads may insert at once; find sees what was
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
  // `number` must be at least one more than the distinct keys that will come, or a search may never end; twice as many
  // keep searches short. Every key must be kNoKey before the first one comes.
  __device__ HashMap(Slot* slots, uint32_t number) : slots_(slots), number_(number) {}

  // The slot of a key, which is entered if it is absent.
  __device__ Slot* insert_if_absent(uint64_t key) {
    for (uint32_t at = first(key);; at = next(at)) {
      const uint64_t before = atomicCAS(reinterpret_cast<unsigned long long*>(&slots_[at].key), kEmpty,
                                        static_cast<unsigned long long>(key));
      if (before == kNoKey || before == key) return slots_ + at;
    }
  }

  // Copies of the slots of those keys that are wanted, and whether each is there: the first reads are on their way together.
  template <int kKeys>
  __device__ void find(const uint64_t (&keys)[kKeys], const bool (&wanted)[kKeys], Slot (&slots)[kKeys],
                       bool (&found)[kKeys]) const {
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (wanted[i]) slots[i] = slots_[first(keys[i])];
    }
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      found[i] = wanted[i] && slots[i].key == keys[i];
      bool goes_on = wanted[i] && !found[i] && slots[i].key != kNoKey;
      for (uint32_t at = goes_on ? first(keys[i]) : 0; goes_on;) {
        at = next(at);
        slots[i] = slots_[at];
        found[i] = slots[i].key == keys[i];
        goes_on = !found[i] && slots[i].key != kNoKey;
      }
    }
  }

 private:
  static constexpr unsigned long long kEmpty = ~0ull;

  __device__ uint32_t first(uint64_t key) const { return __umulhi(Slot::hash(key), number_); }
  __device__ uint32_t next(uint32_t at) const { return at + 1 < number_ ? at + 1 : 0; }

  Slot* slots_;
  uint32_t number_;
};

}  // namespace jaxsparse::cuda
