// What the handlers of all custom calls on CUDA share: from buffers to a kernel's arguments, from its status to an error.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "bindings/checks.h"
#include "cuda/common/types.h"

namespace jaxsparse {

using Stream = ffi::PlatformStream<cudaStream_t>;

inline ffi::Error launch_error(const char* call, cudaError_t status) {
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(call) + ": CUDA launch failed: " + cudaGetErrorString(status));
}

inline ffi::Error check_workspace(const char* call, int64_t given, int64_t needed) {
  if (given >= needed) return ffi::Error::Success();
  return ffi::Error::InvalidArgument(std::string(call) + ": workspace has " + std::to_string(given) + " bytes, needs " +
                                     std::to_string(needed));
}

// Only for feature dtypes, which a check has established.
inline cuda::Dtype kernel_dtype(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::F16: return cuda::Dtype::kF16;
    case ffi::BF16: return cuda::Dtype::kBF16;
    case ffi::F32: return cuda::Dtype::kF32;
    default: return cuda::Dtype::kF64;
  }
}

inline const int32_t* ints(In buffer) { return buffer.typed_data<int32_t>(); }
inline int32_t* ints(Out buffer) { return buffer->typed_data<int32_t>(); }
inline int32_t narrow(int64_t size) { return static_cast<int32_t>(size); }  // checks limit every size to 2^30

}  // namespace jaxsparse
