// Instantiates every forward tile of float32, as TF32 and exact.
#include "cuda/conv/implicit_gemm.cuh"

namespace jaxsparse::cuda {
namespace {

template <typename Arithmetic>
cudaError_t conv_gemm_of(const ConvGemmArgs& a, cudaStream_t stream) {
#define JAXSPARSE_TRY_TILE(rows, cols, stages)                                                \
  if (a.tile == Tile{rows, cols, stages}) {                                                   \
    return launch_implicit_gemm<ImplicitGemm<Arithmetic, rows, cols, stages, 16>>(a, stream); \
  }
  JAXSPARSE_FLOAT_TILES(JAXSPARSE_TRY_TILE)
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t conv_gemm_float(const ConvGemmArgs& a, cudaStream_t stream) {
  return a.exact ? conv_gemm_of<Exact>(a, stream) : conv_gemm_of<Tf32>(a, stream);
}

}  // namespace jaxsparse::cuda
