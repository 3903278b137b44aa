// The CUDA handlers with kernels that run on the host, for Python to register as CPU targets of other names.
#include "cuda_runtime_api.h"
#include "xla/ffi/api/ffi.h"

// There is no stream on the CPU: hand the handlers a null one instead of asking XLA.
template <>
struct xla::ffi::CtxDecoding<xla::ffi::PlatformStream<cudaStream_t>> {
  using Type = cudaStream_t;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*, DiagnosticEngine&) {
    return nullptr;
  }
};

#include "bindings/cuda_handlers.cc"
#include "bindings/cuda_only_handlers.cc"

extern "C" {

int handler_count() { return static_cast<int>(jaxsparse::cuda_handlers().size()); }
const char* handler_name(int i) { return jaxsparse::cuda_handlers()[i].first; }
void* handler_function(int i) { return reinterpret_cast<void*>(jaxsparse::cuda_handlers()[i].second); }
void run_backwards(int backwards) { cuda_on_host_backwards = backwards != 0; }
void have_clusters(int have) { cuda_on_host_has_clusters = have != 0; }

}  // extern "C"
