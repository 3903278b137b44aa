// The hash function of site keys and the size of a hash table, shared by CPU and GPU code.
#pragma once

#include <cstdint>

#include "cuda/common/host_device.h"

namespace jaxsparse {

constexpr uint64_t kNoKey = ~uint64_t{0};  // marks empty slots and rows without a valid site

// The finaliser of MurmurHash3 (Appleby, public domain): every bit of the key affects every bit of the result.
JAXSPARSE_HD uint64_t hash(uint64_t key) {
  key ^= key >> 33;
  key *= 0xff51afd7ed558ccdull;
  key ^= key >> 33;
  key *= 0xc4ceb9fe1a85ec53ull;
  key ^= key >> 33;
  return key;
}

// The number of slots for `keys` keys: the least power of two that leaves at least half of the slots empty.
JAXSPARSE_HD int64_t hash_slots(int64_t keys) {
  if (keys <= 1) return 2;
#ifdef __CUDA_ARCH__
  return int64_t{2} << (64 - __clzll(keys - 1));
#else
  return int64_t{2} << (64 - __builtin_clzll(static_cast<uint64_t>(keys - 1)));
#endif
}

}  // namespace jaxsparse
