// The signatures of the custom calls (operands, results, attributes), shared by CPU and CUDA.
#pragma once

#include <utility>

#include "bindings/handlers.h"
#include "xla/ffi/api/ffi.h"

namespace jaxsparse {

// An FFI binding with a context, kIn operands and kOut results.
template <typename Context, int kIn, int kOut>
auto bind() {
  if constexpr (kOut > 0) {
    return bind<Context, kIn, kOut - 1>().template Ret<xla::ffi::AnyBuffer>();
  } else if constexpr (kIn > 0) {
    return bind<Context, kIn - 1, 0>().template Arg<xla::ffi::AnyBuffer>();
  } else {
    return xla::ffi::Ffi::Bind().Ctx<Context>();
  }
}

using AxisAttribute = xla::ffi::Span<const int64_t>;

template <typename Binding>
auto with_geometry(Binding binding) {
  return std::move(binding)
      .template Attr<AxisAttribute>("kernel")
      .template Attr<AxisAttribute>("stride")
      .template Attr<AxisAttribute>("padding")
      .template Attr<AxisAttribute>("dilation");
}

template <typename Binding>
auto with_tile(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("tile_rows")
      .template Attr<int64_t>("tile_cols")
      .template Attr<int64_t>("stages")
      .template Attr<int64_t>("splits");
}

// Defines the handlers of the custom calls that CPU and CUDA share, from functions of the same names in scope, and
// `kHandlers`, which lists them. `Context` gives the functions' first argument; FFI traits may follow. It is a macro because
// XLA_FFI_DEFINE_HANDLER is one.
#define JAXSPARSE_DEFINE_HANDLERS(Context, ...)                                                               \
  XLA_FFI_DEFINE_HANDLER(kUniqueSites, unique_sites, (bind<Context, 2, 8>()), __VA_ARGS__);                   \
  XLA_FFI_DEFINE_HANDLER(                                                                                     \
      kCoarseSites, coarse_sites,                                                                             \
      (with_geometry(bind<Context, 2, 6>()).Attr<AxisAttribute>("bounds").Attr<int64_t>("is_sorted")), __VA_ARGS__); \
  XLA_FFI_DEFINE_HANDLER(kSiteIndex, site_index, (bind<Context, 2, 1>().Attr<int64_t>("of_blocks")), __VA_ARGS__); \
  XLA_FFI_DEFINE_HANDLER(kKernelMap, kernel_map, (with_geometry(bind<Context, 5, 2>()).Attr<int64_t>("builder")), \
                         __VA_ARGS__);                                                                        \
  XLA_FFI_DEFINE_HANDLER(kReverseTable, reverse_table, (bind<Context, 2, 2>()), __VA_ARGS__);                 \
  XLA_FFI_DEFINE_HANDLER(kConvForward, conv_forward, (bind<Context, 5, 1>().Attr<int64_t>("tile_rows")),       \
                         __VA_ARGS__);                                                                        \
  XLA_FFI_DEFINE_HANDLER(kConvWgrad, conv_wgrad, (bind<Context, 5, 2>().Attr<int64_t>("tile_rows")), __VA_ARGS__); \
  XLA_FFI_DEFINE_HANDLER(kInvertIndex, invert_index, (bind<Context, 1, 3>()), __VA_ARGS__);                   \
  XLA_FFI_DEFINE_HANDLER(kSegmentSum, segment_sum, (bind<Context, 3, 1>()), __VA_ARGS__);                     \
  const Handlers kHandlers = {                                                                                \
      {"jaxsparse_unique_sites_v1", kUniqueSites},   {"jaxsparse_coarse_sites_v1", kCoarseSites},             \
      {"jaxsparse_site_index_v1", kSiteIndex},       {"jaxsparse_kernel_map_v1", kKernelMap},                 \
      {"jaxsparse_reverse_table_v1", kReverseTable}, {"jaxsparse_conv_forward_v1", kConvForward},             \
      {"jaxsparse_conv_wgrad_v1", kConvWgrad},       {"jaxsparse_invert_index_v1", kInvertIndex},             \
      {"jaxsparse_segment_sum_v1", kSegmentSum},                                                              \
  }

}  // namespace jaxsparse
