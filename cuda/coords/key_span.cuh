// Short codes for a set of keys: they have the keys' order, but only the bits in which keys differ.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/coords/key.h"

namespace jaxsparse::cuda {

// If coordinates are far from the ends of their range, the high bits below the sign bit equal its complement. These, and
// bits of the batch that no key has, need no sorting: about 33 of a scan's 64 bits remain. They are moved together as by
// PEXT (Warren, Hacker's Delight, 7-4): a bit with n dropped bits below it moves by the powers of two that make up n.
template <int D>
class KeySpan {
 public:
  // The bits of a key that carry information. make() takes the OR over a set of keys.
  static __device__ Key bits_of(Key key) { return key == kNoKey ? kSigns : (key ^ unsaid(key)) & ~kSigns; }

  // `also`: further bits to keep.
  __device__ void make(Key bits_of_all, Key also) {
    kept_ = bits_of_all | kSigns | also;
    Key dropped = ~kept_ << 1, kept = kept_;
#pragma unroll 1
    for (int i = 0; i < kSteps; ++i) {
      Key odd = dropped;  // places with an odd number of dropped bits at or below them
      for (int step = 1; step < 64; step *= 2) odd ^= odd << step;
      moved_[i] = kept & odd;
      kept = (kept ^ moved_[i]) | moved_[i] >> (1 << i);
      dropped &= ~odd;
    }
    bits_ = __popcll(kept_) + ((bits_of_all & kSigns) != 0 ? 1 : 0);
  }

  // Replaces keys by their codes. kNoKey is unchanged, and remains the largest.
  template <int kKeys>
  __device__ void to_codes(Key (&keys)[kKeys]) const {
    bool is_key[kKeys];
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      is_key[j] = keys[j] != kNoKey;
      keys[j] &= kept_;
    }
#pragma unroll 1
    for (int i = 0; i < kSteps; ++i) {
      const Key moved = moved_[i];
#pragma unroll
      for (int j = 0; j < kKeys; ++j) keys[j] = (keys[j] & ~moved) | (keys[j] & moved) >> (1 << i);
    }
#pragma unroll
    for (int j = 0; j < kKeys; ++j) keys[j] = is_key[j] ? keys[j] : kNoKey;
  }

  __device__ Key key(uint64_t code) const {
    if (code == kNoKey) return code;
#pragma unroll
    for (int i = kSteps - 1; i >= 0; --i) code = (code & ~moved_[i]) | (code << (1 << i) & moved_[i]);
    code &= kept_;
    return code | (unsaid(code) & ~kept_);
  }

  __device__ int bits() const { return bits_; }

 private:
  static constexpr int kLowBits = D * (axis_bits(D) - 1);  // below the sign bits
  static constexpr Key kGroup = (Key{1} << D) - 1, kSigns = kGroup << kLowBits;
  static constexpr Key kEachGroup = ((Key{1} << kLowBits) - 1) / kGroup;  // the lowest bit of each group
  static constexpr int kSteps = 6;

  // The value of the bits below the sign bits if they carry no information: the complement of their axis's sign bit.
  static __device__ Key unsaid(Key key) { return (~(key >> kLowBits) & kGroup) * kEachGroup; }

  Key kept_, moved_[kSteps];  // moved_[i]: bits moved by 2^i
  int bits_;
};

}  // namespace jaxsparse::cuda
