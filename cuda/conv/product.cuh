// One depth step of the matrix product that forward and wgrad share. A warpgroup computes C [64, kCols] += A [64, kDepth] B
// [kDepth, kCols] from operands in shared memory, with float32 sums in registers. In the end a lane has the sums in the
// layout of mma.sync.m16n8: columns 2 (lane % 4), + 1 of each eight, rows lane / 4 and lane / 4 + 8 of its warp's 16.
//
// This file has the products of 16-bit operands: WgmmaProduct (asynchronous) on sm_90a, MmaProduct elsewhere. product32.cuh
// has those of float32. `Product<Arithmetic, kCols, kLayout>` selects one.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/common/ptx.cuh"
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "cuda/conv/wgmma.cuh"
#endif

namespace jaxsparse::cuda {

constexpr int kWarpgroup = 128;
constexpr int kGroupRows = 64;  // rows of C

// The thread's warpgroup in a block of kGroups. The compiler sees that it is the same in all lanes, so that addresses of
// operands stay in uniform registers, from which wgmma takes them.
template <int kGroups>
__device__ int own_warpgroup() {
  return kGroups == 1 ? 0 : static_cast<int>(__reduce_or_sync(kAllLanes, threadIdx.x / kWarpgroup));
}

// The byte offset of a 16-byte piece of a row of kRowBytes, with the swizzle: the piece's number is XORed with the row's, so
// that copies, ldmatrix and wgmma have no bank conflicts.
template <int kRowBytes>
__device__ uint32_t swizzled(uint32_t row, uint32_t piece) {
  return row * kRowBytes + ((piece ^ row * kRowBytes / 128 % (kRowBytes / 16)) << 4);
}

// The byte offset of the next of kStages stages in a ring buffer.
template <int kStages, int kStageBytes>
__device__ int next_stage(int stage) {
  return stage == (kStages - 1) * kStageBytes ? 0 : stage + kStageBytes;
}

// A row-major, for forward: 64 rows of 128 bytes. A depth-major (transposed), for wgrad: stored like B.
enum class LayoutOfA { kRowMajor, kDepthMajor };

constexpr int kBytesA = kGroupRows * 128;  // per warpgroup, in either layout

// The shared-memory layout of 16-bit operands. B has a row per depth, of 128 bytes (64 columns); further columns follow in
// blocks of such rows. A narrow B has shorter rows.
template <typename T_, int kCols>
struct HalfOperands {
  using T = T_;
  static constexpr bool kRowsOfBAreColumns = false;
  static constexpr int kThreadsAtLeast = 0;  // per multiprocessor, which limits registers; 0: the compiler decides
  static constexpr int kDepth = 64;  // per step: 128 bytes of a row-major row
  static constexpr int kRowBytesB = kCols > 32 ? 128 : kCols > 16 ? 64 : 32;
  static constexpr int kBlockBytesA = kBytesA, kBlockBytesB = kDepth * kRowBytesB;
  static constexpr int kBytesB = (kCols + 63) / 64 * kBlockBytesB;

  // The byte offset of a 16-byte piece of a depth's row: of a depth-major A, within its block; of B, from the start of B.
  __device__ static uint32_t place_in_a(int depth, int piece) { return swizzled<128>(depth, piece); }
  __device__ static uint32_t place_in_b(int depth, int piece) {
    constexpr int kPieces = kRowBytesB / 16;
    return piece / kPieces * kBlockBytesB + swizzled<kRowBytesB>(depth, piece % kPieces);
  }
};

// A product's interface: multiply starts a step. wait completes it, so that its stage is no longer read; wait_for_last
// completes the step before it. see_copies comes between the arrival of copies and the barrier before multiply. finish,
// called by the whole block with no copy in flight, moves sums to their lanes through kFinishBytes of shared memory per
// warpgroup. A Synchronous product is complete when multiply returns; an Asynchronous one goes on.
struct Synchronous {
  __device__ static void wait() {}
  __device__ static void wait_for_last() {}
  __device__ static void see_copies() {}
};

template <typename T, int kCols, LayoutOfA kLayout>
struct MmaProduct : HalfOperands<T, kCols>, Synchronous {
  using Operands = HalfOperands<T, kCols>;
  static constexpr bool kTransposed = kLayout == LayoutOfA::kDepthMajor;
  static constexpr int kFinishBytes = 0;
  __device__ static void multiply(float (&sums)[kCols / 2], const char* a, const char* b) {
    const int lane = threadIdx.x % kWarp, warp_row = threadIdx.x / kWarp % 4 * 16;
#pragma unroll
    for (int s = 0; s < Operands::kDepth / 16; ++s) {
      uint32_t fa[4];
      if constexpr (kTransposed) {
        load_matrices<true>(fa, a + swizzled<128>(s * 16 + lane / 16 * 8 + lane % 8, warp_row / 8 + lane / 8 % 2));
      } else {
        load_matrices<false>(fa, a + swizzled<128>(warp_row + lane % 16, s * 2 + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < kCols / 16; ++n) {
        uint32_t fb[4];
        load_matrices<true>(fb, b + Operands::place_in_b(s * 16 + lane % 16, n * 2 + lane / 16));
        mma<T>(sums + n * 8, fa, fb[0], fb[1]);
        mma<T>(sums + n * 8 + 4, fa, fb[2], fb[3]);
      }
    }
  }
  __device__ static void finish(float (&)[kCols / 2], char*) {}
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
struct Asynchronous {
  __device__ static void wait() { wgmma_wait<0>(); }
  __device__ static void wait_for_last() { wgmma_wait<1>(); }
  __device__ static void see_copies() { fence_shared_for_wgmma(); }
};

template <typename T, int kCols, LayoutOfA kLayout>
struct WgmmaProduct : HalfOperands<T, kCols>, Asynchronous {
  using Operands = HalfOperands<T, kCols>;
  static constexpr bool kTransposed = kLayout == LayoutOfA::kDepthMajor;
  static constexpr int kFinishBytes = 0;
  __device__ static void multiply(float (&sums)[kCols / 2], const char* a, const char* b) {
    wgmma_fence();
    const WgmmaOperand<128, 0> in_a(a);
    const WgmmaOperand<Operands::kRowBytesB, Operands::kBlockBytesB> in_b(b);
#pragma unroll
    for (int s = 0; s < Operands::kDepth / 16; ++s) {
      constexpr int kStepA = kTransposed ? 16 * 128 : 32, kStepB = 16 * Operands::kRowBytesB;
      Wgmma<T, kCols, kTransposed>::multiply(sums, in_a.after(s * kStepA), in_b.after(s * kStepB));
    }
    wgmma_commit();
  }
  __device__ static void finish(float (&)[kCols / 2], char*) {}
};

template <typename T, int kCols, LayoutOfA kLayout>
struct ProductOf {
  using type = WgmmaProduct<T, kCols, kLayout>;
};
#else
template <typename T, int kCols, LayoutOfA kLayout>
struct ProductOf {
  using type = MmaProduct<T, kCols, kLayout>;
};
#endif

// The product for an arithmetic: __half, __nv_bfloat16, or from product32.cuh Tf32 or Exact.
template <typename Arithmetic, int kCols, LayoutOfA kLayout>
using Product = typename ProductOf<Arithmetic, kCols, kLayout>::type;

}  // namespace jaxsparse::cuda
