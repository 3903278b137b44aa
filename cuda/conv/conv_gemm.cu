// Instantiates every forward tile for both 16-bit dtypes.
#include "cuda/conv/implicit_gemm.cuh"

namespace jaxsparse::cuda {

cudaError_t conv_gemm(const ConvGemmArgs& a, cudaStream_t stream) {
  switch (a.dtype) {
    case Dtype::kF16: return implicit_gemm<__half>(a, stream);
    case Dtype::kBF16: return implicit_gemm<__nv_bfloat16>(a, stream);
    case Dtype::kF32: return conv_gemm_float(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace jaxsparse::cuda
