// How the rows of features reach the threads that sum their channels: which rows and pieces of them a thread has, and the
// way of those through shared memory.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/channels/channels.h"
#include "cuda/common/device.cuh"
#include "cuda/common/numbers.cuh"
#include "cuda/common/ptx.cuh"

namespace jaxsparse::cuda {

constexpr int kChannelThreads = 512;

// V numbers of a row as raw words. Only extracting a number waits for the load.
template <typename T, int V>
struct Pack {
  std::conditional_t<V == 1, T, uint4> words;

  Pack() = default;
  __device__ explicit Pack(const Accumulator<T>* from) {
    T numbers[V];
#pragma unroll
    for (int i = 0; i < V; ++i) numbers[i] = narrow<T>(from[i]);
    memcpy(&words, numbers, sizeof(numbers));
  }
  __device__ Accumulator<T> operator[](int i) const {
    T numbers[V];
    memcpy(numbers, &words, sizeof(numbers));
    return widen(numbers[i]);
  }
};

// A thread's rows of one unit of work, `step` rows apart, and its pack in each. A block has kLeft * 32 channels.
template <typename T, int V, int kLeft>
struct Rows {
  static constexpr int kAcross = kWarp * kLeft / V, kDown = kChannelThreads / kAcross;  // packs per row, rows at a time
  int32_t share, row, step, pack, packs;

  __device__ Rows(const ChannelArgs& m, uint32_t unit, uint32_t shares, uint32_t tiles)
      : share(static_cast<int32_t>(unit / tiles)),
        row(share * kDown + static_cast<int32_t>(threadIdx.x) / kAcross),
        step(static_cast<int32_t>(shares * kDown)),
        pack(static_cast<int32_t>(unit % tiles * kAcross + threadIdx.x % kAcross)),
        packs(m.channels / V) {}

  // How many there are before row `end`.
  __device__ int32_t number(int32_t end) const {
    return pack >= packs || row >= end ? 0 : (static_cast<uint32_t>(end - row) - 1) / static_cast<uint32_t>(step) + 1;
  }
  __device__ int64_t place(int32_t i) const { return (row + int64_t{i} * step) * packs + pack; }
  __device__ int64_t stride() const { return int64_t{step} * packs; }
  // The pack in the first row of the share, if there is such a row.
  template <typename P>
  __device__ P first(const P* array, int32_t rows) const {
    const int32_t first_row = share * kDown;
    return pack < packs && first_row < rows ? array[int64_t{first_row} * packs + pack] : P{};
  }
};

// A thread's rows on their way through shared memory, in slots that only it uses: row i in slot i modulo their number.
template <typename P, int kArrays>
class Ring {
 public:
  static constexpr int64_t kSlotBytes = kChannelThreads * sizeof(P) * kArrays;
  static constexpr int kAhead = kArrays == 1 ? 8 : 4;  // rows in flight; there are at least as many slots

  __device__ explicit Ring(int32_t slots)
      : own_(reinterpret_cast<P*>(dynamic_shared()) + threadIdx.x), last_(own_ + (slots - 1) * kSlot) {}

  // The next row to fetch and to get is one in this place of both arrays and in this slot. `stride`: to the row after it.
  __device__ void start(const void* first, const void* second, int64_t place, int64_t stride, int32_t slot) {
    from_[0] = static_cast<const P*>(first) + place;
    if constexpr (kArrays == 2) from_[1] = static_cast<const P*>(second) + place;
    stride_ = stride;
    in_ = out_ = own_ + slot * kSlot;
  }

  // Begins to fetch the next row, unless it does not exist; then comes the one after it, or before it. L2 need not keep rows
  // that stay in their slot.
  template <bool kForwards>
  __device__ void fetch(bool exists, bool stays = false) {
    if (exists) {
#pragma unroll
      for (int a = 0; a < kArrays; ++a) {
        if (sizeof(P) == 16 && stays) {
          copy_last_use(reinterpret_cast<char*>(in_ + a * kChannelThreads), from_[a]);
        } else if constexpr (sizeof(P) >= 4) {
          copy_piece<sizeof(P)>(reinterpret_cast<char*>(in_ + a * kChannelThreads), from_[a], true);
        } else {
          in_[a * kChannelThreads] = *from_[a];  // too short for an asynchronous copy
        }
      }
    }
    commit_copies();
#pragma unroll
    for (int a = 0; a < kArrays; ++a) from_[a] += stride_;
    in_ = next<kForwards>(in_);
  }

  // Waits for all rows but the kAhead - 1 that were fetched last, and gets the next one of each array.
  template <bool kForwards>
  __device__ void get(P* first, P* second) {
    wait_for_copies<kAhead - 1>();
    *first = out_[0];
    if constexpr (kArrays == 2) *second = out_[kChannelThreads];
    out_ = next<kForwards>(out_);
  }

 private:
  static constexpr int kSlot = kChannelThreads * kArrays;

  template <bool kForwards>
  __device__ P* next(P* slot) const {
    if constexpr (kForwards) return slot == last_ ? own_ : slot + kSlot;
    return slot == own_ ? last_ : slot - kSlot;
  }

  P *own_, *last_;  // the first and the last slot
  P *in_, *out_;    // the next one to fetch a row into, and to get one from
  const P* from_[kArrays];
  int64_t stride_;
};

}  // namespace jaxsparse::cuda
