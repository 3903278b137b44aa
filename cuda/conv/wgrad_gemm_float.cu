// Instantiates every wgrad tile of float32, as TF32 and exact.
#include "cuda/conv/wgrad_gemm.cuh"

namespace jaxsparse::cuda {
namespace {

template <typename Arithmetic>
cudaError_t wgrad_gemm_of(const WgradGemmArgs& a, cudaStream_t stream) {
#define JAXSPARSE_TRY_TILE(rows, cols, stages) \
  if (a.tile == Tile{rows, cols, stages}) return launch_wgrad_gemm<WgradGemm<Arithmetic, rows, cols, stages>>(a, stream);
  JAXSPARSE_FLOAT_WGRAD_TILES(JAXSPARSE_TRY_TILE)
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t wgrad_gemm_float(const WgradGemmArgs& a, cudaStream_t stream) {
  return a.exact ? wgrad_gemm_of<Exact>(a, stream) : wgrad_gemm_of<Tf32>(a, stream);
}

}  // namespace jaxsparse::cuda
