// The depth of a block's implicit GEMM: its list of taps, the input row of each (tap, output row), and a thread's place.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/conv/schedule.h"

namespace jaxsparse::cuda {

// A step of the depth, in taps and channels: one tap too many and a negative number of channels, which Place corrects.
struct Step {
  int32_t taps, channels;
};

// The position in the depth that a thread copies next: an index into the block's tap list, and a channel.
struct Place {
  int32_t tap, channel;
  __device__ void advance(Step step, int32_t channels) {
    tap += step.taps;
    channel += step.channels;
    if (channel < 0) {
      channel += channels;
      --tap;
    }
  }
};

// Divides the depth, below 1000, by the channels of a tap. With `inverse` = 1 / channels it takes a third of the time of an
// integer division, for which the first copies would wait. It is exact: (n + 1/2) / channels is never within half of
// 1 / channels of an integer.
struct PerTap {
  int32_t channels;
  float inverse;
  __device__ Place place(int32_t depth) const {
    const int32_t tap = static_cast<int32_t>((static_cast<float>(depth) + 0.5f) * inverse);
    return {tap, depth - tap * channels};
  }
  __device__ Step step(int32_t depth) const {
    const Place to = place(depth);
    return {to.tap + 1, to.channel - channels};
  }
};

// Brings the kernel-map entries of a block's tiles, for the taps of one mask word, to shared memory: per thread 16 bytes of
// every kTapsAtATime-th tap. If there are no more taps, they are read before the mask is known, which saves 0.3 us of 6.
template <class P>
class Entries {
  static constexpr int kInTile = kScheduleRows / 4, kPieces = kInTile * P::kGroups, kTapsAtATime = P::kThreads / kPieces;

 public:
  template <class Args>
  __device__ Entries(const Args& a, int32_t first_tile, int32_t all_tiles, int word)
      : tap_(static_cast<int>(threadIdx.x) / kPieces),
        piece_(static_cast<int>(threadIdx.x) % kPieces),
        is_early_(a.taps <= kTapsAtATime) {
    const int32_t tile = first_tile + group();
    from_ = a.tile_table + (int64_t{tile} * a.taps + word * kTapsOfWord) * kScheduleRows + piece_ % kInTile * 4;
    if (is_early_ && tap_ < a.taps && tile < all_tiles) {
      early_ = *reinterpret_cast<const int4*>(from_ + tap_ * kScheduleRows);
    }
  }

  // The index, within the block, of the schedule tile whose entries this thread handles.
  __device__ int group() const { return piece_ / kInTile; }

  // Writes the entries of the taps in `mask` to in_row_of [taps, kRows]; -1 if the thread's tile (own_mask) lacks the tap.
  __device__ void put(int32_t* in_row_of, uint32_t mask, uint32_t own_mask) const {
    int4* to = reinterpret_cast<int4*>(in_row_of) + piece_;
    if (is_early_) {
      const uint32_t bit = 1u << tap_;
      if (mask & bit) to[__popc(mask & (bit - 1)) * kPieces] = own_mask & bit ? early_ : make_int4(-1, -1, -1, -1);
      return;
    }
    for (int i = 0; mask != 0; ++i, mask &= mask - 1, to += kPieces) {
      if (i % kTapsAtATime != tap_) continue;
      const int bit = __ffs(static_cast<int>(mask)) - 1;
      if (own_mask >> bit & 1) {
        copy_piece<16>(reinterpret_cast<char*>(to), from_ + bit * kScheduleRows, true);
      } else {
        *to = make_int4(-1, -1, -1, -1);
      }
    }
  }

 private:
  int tap_, piece_;
  bool is_early_;
  const int32_t* from_;
  int4 early_ = {};
};

}  // namespace jaxsparse::cuda
