// cuda/common/ptx.cuh on the host: the same functions, each instruction by what the PTX manual says of it.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/common/numbers.cuh"
#include "cuda_pipeline.h"

namespace jaxsparse::cuda {

inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p)); }

template <int kBytes>
void copy_piece(char* to, const void* from, bool exists) {
  if (reinterpret_cast<uintptr_t>(to) % kBytes != 0) cuda_on_host::die("an asynchronous copy is misaligned");
  if (exists) {
    __pipeline_memcpy_async(to, from, kBytes);
  } else {
    cuda_on_host::running->copies.back().push_back([=] { std::memset(to, 0, kBytes); });
  }
}
inline void copy_last_use(char* to, const void* from) { copy_piece<16>(to, from, true); }
template <int kBytes>
void copy_if_not_negative(char* to, const void* from, int32_t index) {
  copy_piece<kBytes>(to, from, index >= 0);
}
inline void commit_copies() { __pipeline_commit(); }
template <int kPending>
void wait_for_copies() {
  __pipeline_wait_prior(kPending);
}

inline float relu(float v) { return v < 0 ? 0 : v; }
inline int stay_here(int value) { return value; }

template <bool kTransposed>
void load_matrices(uint32_t (&v)[4], const char* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) cuda_on_host::die("a row of ldmatrix is misaligned");
  const uint64_t* rows = cuda_on_host::show(__LINE__, reinterpret_cast<uintptr_t>(row));
  const unsigned lane = cuda_on_host::lane();
  const auto element = [&](int matrix, unsigned r, unsigned c) {
    uint16_t bits;
    std::memcpy(&bits, reinterpret_cast<const char*>(rows[matrix * 8 + r]) + 2 * c, 2);
    return static_cast<uint32_t>(bits);
  };
  for (int i = 0; i < 4; ++i) {
    const unsigned major = lane / 4, minor = lane % 4 * 2;
    v[i] = kTransposed ? element(i, minor, major) | element(i, minor + 1, major) << 16
                       : element(i, major, minor) | element(i, major, minor + 1) << 16;
  }
}

template <typename T>
void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint64_t shown[3][cuda_on_host::kLanes];
  const uint64_t own[3] = {a[0] | static_cast<uint64_t>(a[1]) << 32, a[2] | static_cast<uint64_t>(a[3]) << 32,
                           b0 | static_cast<uint64_t>(b1) << 32};
  for (int i = 0; i < 3; ++i) std::memcpy(shown[i], cuda_on_host::show(__LINE__, own[i]), sizeof(shown[i]));
  const auto half = [&](int word, int lane, int register_of_pair, int k) {
    const std::conditional_t<std::is_same_v<T, float>, __half, T> value{
        static_cast<uint16_t>(shown[word][lane] >> (register_of_pair * 32 + k % 2 * 16))};
    return widen(value);
  };
  const auto tf32 = [&](int word, int lane, int register_of_pair) {
    const auto bits = static_cast<uint32_t>(shown[word][lane] >> register_of_pair * 32) & 0xffffe000u;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  };
  const int lane = cuda_on_host::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
    if constexpr (std::is_same_v<T, float>) {
      for (int k = 0; k < 8; ++k) d[i] += tf32(k / 4, row % 8 * 4 + k % 4, row / 8) * tf32(2, col * 4 + k % 4, k / 4);
      continue;
    }
    for (int k = 0; k < 16; ++k) {
      d[i] += half(k / 8, row % 8 * 4 + k % 8 / 2, row / 8, k) * half(2, col * 4 + k % 8 / 2, k / 8, k);
    }
  }
}

}  // namespace jaxsparse::cuda
