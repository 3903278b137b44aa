// Instantiates every forward tile with an epilogue, for both 16-bit dtypes.
#include "cuda/conv/implicit_gemm.cuh"

namespace jaxsparse::cuda {

cudaError_t conv_fused(const FusedConvArgs& a, cudaStream_t stream) {
  if (a.out_dtype != a.dtype) return cudaErrorInvalidValue;
  switch (a.dtype) {
    case Dtype::kF16: return implicit_gemm<__half>(a, stream);
    case Dtype::kBF16: return implicit_gemm<__nv_bfloat16>(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace jaxsparse::cuda
