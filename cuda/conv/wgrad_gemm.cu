// Instantiates every wgrad tile for both 16-bit dtypes.
#include "cuda/conv/wgrad_gemm.cuh"

namespace jaxsparse::cuda {
namespace {

template <typename T>
cudaError_t wgrad_gemm_of(const WgradGemmArgs& a, cudaStream_t stream) {
#define JAXSPARSE_TRY_TILE(rows, cols, stages) \
  if (a.tile == Tile{rows, cols, stages}) return launch_wgrad_gemm<WgradGemm<T, rows, cols, stages>>(a, stream);
  JAXSPARSE_WGRAD_TILES(JAXSPARSE_TRY_TILE)
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t wgrad_gemm(const WgradGemmArgs& a, cudaStream_t stream) {
  switch (a.dtype) {
    case Dtype::kF16: return wgrad_gemm_of<__half>(a, stream);
    case Dtype::kBF16: return wgrad_gemm_of<__nv_bfloat16>(a, stream);
    case Dtype::kF32: return wgrad_gemm_float(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace jaxsparse::cuda
