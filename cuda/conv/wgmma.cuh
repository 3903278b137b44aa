// Hopper's wgmma with both operands in shared memory: D [64, N] += A [64, 32 bytes] B [32 bytes, N], float32 sums.
//
// Rows of shared memory have 128 bytes (64 or 32 for a narrow operand), with the swizzle of `swizzled`, which is that of the
// PTX manual. A row-major A has a row per row of the product. A transposed A, and B, have a row of 64 columns per depth; the
// next 64 columns lie kColumnStride bytes further. wgmma cannot transpose float operands: B then has a row per column. Of a
// float it reads only the bits of TF32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/common/ptx.cuh"

namespace jaxsparse::cuda {

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Makes ordinary writes and cp.async writes to shared memory visible to wgmma.
__device__ inline void fence_shared_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The matrix descriptor of an operand in shared memory; after(bytes) is the one for an address further on. Only the lower
// half depends on the address, so that this costs one addition.
template <int kRowBytes, int kColumnStride>
struct WgmmaOperand {
  static constexpr uint32_t kSwizzle = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3;
  static constexpr uint32_t kEightRows = 8 * kRowBytes;
  static constexpr uint64_t kUpper = kSwizzle << 30 | kEightRows >> 4;
  uint32_t lower;
  __device__ explicit WgmmaOperand(const char* at)
      : lower((kColumnStride >> 4) << 16 | (shared_address(at) & 0x3FFFF) >> 4) {}
  __device__ uint64_t after(int bytes) const { return kUpper << 32 | (lower + (bytes >> 4)); }
};

template <typename T, int N, bool kTransposedA>
struct Wgmma;

// The registers of D have to be listed one by one in PTX.
#define JAXSPARSE_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define JAXSPARSE_F8(i) JAXSPARSE_F4(i), JAXSPARSE_F4(i + 4)
#define JAXSPARSE_F16(i) JAXSPARSE_F8(i), JAXSPARSE_F8(i + 8)
#define JAXSPARSE_F32(i) JAXSPARSE_F16(i), JAXSPARSE_F16(i + 16)
#define JAXSPARSE_F64(i) JAXSPARSE_F32(i), JAXSPARSE_F32(i + 32)
#define JAXSPARSE_D8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define JAXSPARSE_D16 JAXSPARSE_D8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define JAXSPARSE_D24 JAXSPARSE_D16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define JAXSPARSE_D32 JAXSPARSE_D24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define JAXSPARSE_D48 JAXSPARSE_D32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define JAXSPARSE_D64 JAXSPARSE_D48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

#define JAXSPARSE_WGMMA(T, DEPTH_AND_TYPES, TRANSPOSED, N, D, A, B, ...)                                           \
  template <bool kTransposedA>                                                                                     \
  struct Wgmma<T, N, kTransposedA> {                                                                               \
    __device__ static void multiply(float (&d)[N / 2], uint64_t a, uint64_t b) {                                   \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N DEPTH_AND_TYPES " {" D "}, " A ", " B ", 1, 1, 1"        \
                   TRANSPOSED ";"                                                                                  \
                   : __VA_ARGS__                                                                                   \
                   : "l"(a), "l"(b), "n"(static_cast<int>(kTransposedA)));                                         \
    }                                                                                                              \
  };
#define JAXSPARSE_WGMMA_ALL(N, D, A, B, TRANSPOSED_A, ...)                                                      \
  JAXSPARSE_WGMMA(__half, "k16.f32.f16.f16", ", " TRANSPOSED_A ", 1", N, D, A, B, __VA_ARGS__)                  \
  JAXSPARSE_WGMMA(__nv_bfloat16, "k16.f32.bf16.bf16", ", " TRANSPOSED_A ", 1", N, D, A, B, __VA_ARGS__)         \
  JAXSPARSE_WGMMA(float, "k8.f32.tf32.tf32", "", N, D, A, B, __VA_ARGS__)

#define JAXSPARSE_OUT24 JAXSPARSE_F16(0), JAXSPARSE_F8(16)
#define JAXSPARSE_OUT48 JAXSPARSE_F32(0), JAXSPARSE_F16(32)
JAXSPARSE_WGMMA_ALL(16, JAXSPARSE_D8, "%8", "%9", "%10", JAXSPARSE_F8(0))
JAXSPARSE_WGMMA_ALL(32, JAXSPARSE_D16, "%16", "%17", "%18", JAXSPARSE_F16(0))
JAXSPARSE_WGMMA_ALL(48, JAXSPARSE_D24, "%24", "%25", "%26", JAXSPARSE_OUT24)
JAXSPARSE_WGMMA_ALL(64, JAXSPARSE_D32, "%32", "%33", "%34", JAXSPARSE_F32(0))
JAXSPARSE_WGMMA_ALL(96, JAXSPARSE_D48, "%48", "%49", "%50", JAXSPARSE_OUT48)
JAXSPARSE_WGMMA_ALL(128, JAXSPARSE_D64, "%64", "%65", "%66", JAXSPARSE_F64(0))

}  // namespace jaxsparse::cuda
