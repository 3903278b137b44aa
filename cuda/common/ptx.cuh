// Wrappers for PTX instructions of sm_80 without a C++ intrinsic: cp.async, ldmatrix, mma.
#pragma once

#include <type_traits>

#include "cuda/common/numbers.cuh"

namespace jaxsparse::cuda {

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// cp.async of kBytes; writes zeros if `setp` holds for `value` and 0. Copies of 16 bytes bypass L1, smaller ones cannot.
#define JAXSPARSE_COPY(setp, value)                                                                                  \
  if constexpr (kBytes == 16) {                                                                                      \
    asm volatile("{\n.reg .pred p;\n" setp " p, %2, 0;\ncp.async.cg.shared.global [%0], [%1], 16, p;\n}" ::"r"(      \
                     shared_address(to)),                                                                            \
                 "l"(from), "r"(value)                                                                               \
                 : "memory");                                                                                        \
  } else {                                                                                                           \
    asm volatile("{\n.reg .pred p;\n" setp " p, %2, 0;\ncp.async.ca.shared.global [%0], [%1], %3, p;\n}" ::"r"(      \
                     shared_address(to)),                                                                            \
                 "l"(from), "r"(value), "n"(kBytes)                                                                  \
                 : "memory");                                                                                        \
  }

// Begins to copy kBytes (4, 8 or 16), or to write zeros if !exists; `from` need not be valid then.
template <int kBytes>
__device__ void copy_piece(char* to, const void* from, bool exists) {
  JAXSPARSE_COPY("setp.eq.u32", static_cast<uint32_t>(exists));
}

// The same with index >= 0 as the condition. Passed as a bool, it would cost a conversion and a second comparison.
template <int kBytes>
__device__ void copy_if_not_negative(char* to, const void* from, int32_t index) {
  JAXSPARSE_COPY("setp.lt.s32", index);
}
#undef JAXSPARSE_COPY

// Begins to copy 16 bytes that are not read again soon: L2 gives them up before others.
__device__ inline void copy_last_use(char* to, const void* from) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "l"(policy)
               : "memory");
}

// The copies since the last commit are one group. wait_for_copies waits until at most kPending groups of the thread remain.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// max(v, 0); NaN stays NaN.
__device__ inline float relu(float v) {
  asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(v));
  return v;
}

// Returns the value, opaque to the compiler: it can neither recompute it nor simplify what depends on it.
__device__ inline int stay_here(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// D [16, 8] += A [16, 32 bytes] B [32 bytes, 8]. Floats are read as TF32: sign, exponent and the first 10 mantissa bits.
template <typename T>
__device__ void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else if constexpr (std::is_same_v<T, float>) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Loads four 8 x 8 matrices; each lane passes the address of one row. Transposed, a lane gets its pair from a column.
template <bool kTransposed>
__device__ void load_matrices(uint32_t (&v)[4], const char* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(shared_address(row)));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(shared_address(row)));
  }
}

}  // namespace jaxsparse::cuda
