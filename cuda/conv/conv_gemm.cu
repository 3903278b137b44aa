// Every forward tile for both 16-bit dtypes.
#include "cuda/conv/implicit_gemm.cuh"

namespace jaxsparse::cuda {
namespace {

template <typename T>
cudaError_t conv_gemm_of(const ConvGemmArgs& a, cudaStream_t stream) {
#define JAXSPARSE_TRY_TILE(piece_bytes, rows, cols, stages) \
  if (a.tile == Tile{rows, cols, stages}) return launch_implicit_gemm<ImplicitGemm<T, rows, cols, stages, piece_bytes>>(a, stream);
#define JAXSPARSE_TRY_WHOLE(rows, cols, stages) JAXSPARSE_TRY_TILE(16, rows, cols, stages)
#define JAXSPARSE_TRY_NARROW(rows, cols, stages) JAXSPARSE_TRY_TILE(8, rows, cols, stages)
  if (a.in_channels % 8 == 0) {
    JAXSPARSE_FORWARD_TILES(JAXSPARSE_TRY_WHOLE)
  } else {
    JAXSPARSE_NARROW_TILES(JAXSPARSE_TRY_NARROW)
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t conv_gemm(const ConvGemmArgs& a, cudaStream_t stream) {
  switch (a.dtype) {
    case Dtype::kF16: return conv_gemm_of<__half>(a, stream);
    case Dtype::kBF16: return conv_gemm_of<__nv_bfloat16>(a, stream);
    case Dtype::kF32: return conv_gemm_float(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace jaxsparse::cuda
