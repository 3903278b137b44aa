// The custom calls on CUDA that the CPU has too. Each checks its operands, passes pointers to the kernels and returns the
// launch's status. Nothing here, nor in cuda_only_handlers.cc, allocates, synchronises or reads device memory, so XLA may
// record every call into a CUDA graph.
#include "bindings/bind.h"
#include "bindings/checks_conv.h"
#include "bindings/checks_coords.h"
#include "bindings/checks_rows.h"
#include "bindings/cuda_launch.h"
#include "bindings/handlers.h"
#include "cuda/conv/conv.h"
#include "cuda/coords/coarse_sites.h"
#include "cuda/coords/kernel_map.h"
#include "cuda/coords/unique_sites.h"
#include "cuda/rows/rows.h"

namespace jaxsparse {
namespace {

ffi::Error check_candidates(const char* call, int64_t n) {
  if (n <= kMaxSize) return ffi::Error::Success();
  return ffi::Error::InvalidArgument(std::string(call) + ": " + std::to_string(n) +
                                     " candidates, rows times the coarse sites that one may reach; at most 2^30 are "
                                     "supported");
}

ffi::Error unique_sites(cudaStream_t stream, In coords, In count, Out sites, Out kept, Out found, Out row_of,
                        Out order, Out offsets, Out without, Out workspace) {
  constexpr const char* call = "jaxsparse_unique_sites_v1";
  UniqueSites s;
  ffi::Error error = check_unique_sites(coords, count, sites, kept, found, row_of, order, offsets, without, workspace,
                                        &s);
  if (error.failure()) return error;
  error = check_workspace(call, s.workspace, cuda::unique_sites_workspace(s.points));
  if (error.failure()) return error;
  const cuda::UniqueSitesArgs args{ints(coords), ints(count), s.dims,       narrow(s.points), narrow(s.capacity),
                                   ints(sites),  ints(kept),  ints(found),  ints(row_of),     ints(order),
                                   ints(offsets), ints(without), workspace->untyped_data()};
  return launch_error(call, cuda::unique_sites(args, stream));
}

ffi::Error coarse_sites(cudaStream_t stream, In coords, In count, Out sites, Out kept, Out found, Out outside,
                        Out index, Out workspace, Axes kernel, Axes stride, Axes padding, Axes dilation, Axes bounds,
                        int64_t is_sorted) {
  constexpr const char* call = "jaxsparse_coarse_sites_v1";
  CoarseSites s;
  ffi::Error error = check_coarse_sites(coords, count, sites, kept, found, outside, index, workspace, kernel, stride,
                                        padding, dilation, bounds, &s);
  if (error.failure()) return error;
  const int64_t candidates = s.rows * cuda::windows_per_site(s.geometry);
  if (error = check_candidates(call, candidates); error.failure()) return error;
  error = check_workspace(call, s.workspace, cuda::coarse_sites_workspace(candidates));
  if (error.failure()) return error;
  cuda::CoarseSitesArgs args{};
  args.coords = ints(coords);
  args.count = ints(count);
  args.geometry = s.geometry;
  args.bounded = s.bounded;
  for (int a = 0; a < kMaxDims; ++a) args.bounds[a] = s.bounds[a];
  args.sorted = is_sorted != 0;
  args.rows = narrow(s.rows);
  args.capacity = narrow(s.capacity);
  args.sites = ints(sites);
  args.kept = ints(kept);
  args.found = ints(found);
  args.outside = ints(outside);
  args.index = s.makes_index ? index->untyped_data() : nullptr;
  args.workspace = workspace->untyped_data();
  return launch_error(call, cuda::coarse_sites(args, stream));
}

ffi::Error site_index(cudaStream_t stream, In coords, In count, Out index, int64_t of_blocks) {
  SiteIndex s;
  if (ffi::Error error = check_site_index(coords, count, index, &s); error.failure()) return error;
  const cuda::SiteIndexArgs args{ints(coords), ints(count), s.dims, of_blocks != 0, narrow(s.rows),
                                 index->untyped_data()};
  return launch_error("jaxsparse_site_index_v1", cuda::site_index(args, stream));
}

ffi::Error kernel_map(cudaStream_t stream, In in_coords, In in_count, In out_coords, In out_count, In index, Out table,
                      Out masks, Axes kernel, Axes stride, Axes padding, Axes dilation, int64_t builder) {
  BuildKernelMap s;
  ffi::Error error = check_kernel_map(in_coords, in_count, out_coords, out_count, index, table, masks, kernel, stride,
                                      padding, dilation, builder, &s);
  if (error.failure()) return error;
  cuda::KernelMapArgs args{};
  args.in_count = ints(in_count);
  args.out_coords = ints(out_coords);
  args.out_count = ints(out_count);
  args.index = index.untyped_data();
  args.geometry = s.geometry;
  args.builder = s.builder;
  args.in_rows = narrow(s.in_rows);
  args.out_rows = narrow(s.out_rows);
  args.taps = narrow(s.taps);
  args.mask_words = narrow(s.mask_words);
  args.table = ints(table);
  args.masks = masks->typed_data<uint32_t>();
  return launch_error("jaxsparse_kernel_map_v1", cuda::kernel_map(args, stream));
}

ffi::Error reverse_table(cudaStream_t stream, In table, In out_counts, Out reverse, Out masks) {
  ReverseTable s;
  if (ffi::Error error = check_reverse_table(table, out_counts, reverse, masks, &s); error.failure()) return error;
  const cuda::ReverseTableArgs args{ints(table),
                                    {ints(out_counts), narrow(s.segments), narrow(s.out_rows)},
                                    narrow(s.taps),
                                    narrow(s.in_rows),
                                    narrow(s.mask_words),
                                    ints(reverse),
                                    masks->typed_data<uint32_t>()};
  return launch_error("jaxsparse_reverse_table_v1", cuda::reverse_table(args, stream));
}

ffi::Error check_float64(const char* call, ffi::DataType dtype) {
  if (dtype == ffi::F64) return ffi::Error::Success();
  return ffi::Error::InvalidArgument(std::string(call) + ": on CUDA it computes in float64, got " + dtype_name(dtype));
}

ffi::Error conv_forward(cudaStream_t stream, In x, In w, In table, In masks, In out_counts, Out y, int64_t tile_rows) {
  constexpr const char* call = "jaxsparse_conv_forward_v1";
  Conv s;
  ffi::Error error = check_conv_forward(x, w, table, masks, out_counts, y, tile_rows, &s);
  if (error.failure()) return error;
  error = check_float64(call, s.dtype);
  if (error.failure()) return error;
  cuda::ConvForwardArgs args{};
  args.x = x.typed_data<double>();
  args.w = w.typed_data<double>();
  args.table = ints(table);
  args.masks = masks.typed_data<uint32_t>();
  args.out_rows = {ints(out_counts), narrow(s.segments), narrow(s.out_rows)};
  args.in_rows = narrow(s.in_rows);
  args.taps = narrow(s.taps);
  args.mask_words = narrow(s.mask_words);
  args.in_channels = narrow(s.in_channels);
  args.out_channels = narrow(s.out_channels);
  args.y = y->typed_data<double>();
  return launch_error(call, cuda::conv_forward(args, stream));
}

ffi::Error conv_wgrad(cudaStream_t stream, In x, In g, In table, In masks, In out_counts, Out dw, Out workspace,
                      int64_t tile_rows) {
  constexpr const char* call = "jaxsparse_conv_wgrad_v1";
  Conv s;
  ffi::Error error = check_conv_wgrad(x, g, table, masks, out_counts, dw, workspace, tile_rows, &s);
  if (error.failure()) return error;
  error = check_float64(call, s.dtype);
  if (error.failure()) return error;
  error = check_workspace(call, s.workspace,
                          cuda::conv_wgrad_workspace(s.taps, s.out_rows, s.in_channels, s.out_channels));
  if (error.failure()) return error;
  cuda::ConvWgradArgs args{};
  args.x = x.typed_data<double>();
  args.g = g.typed_data<double>();
  args.table = ints(table);
  args.masks = masks.typed_data<uint32_t>();
  args.out_rows = {ints(out_counts), narrow(s.segments), narrow(s.out_rows)};
  args.taps = narrow(s.taps);
  args.mask_words = narrow(s.mask_words);
  args.in_channels = narrow(s.in_channels);
  args.out_channels = narrow(s.out_channels);
  args.dw = dw->typed_data<double>();
  args.workspace = workspace->untyped_data();
  return launch_error(call, cuda::conv_wgrad(args, stream));
}

ffi::Error invert_index(cudaStream_t stream, In index, Out order, Out offsets, Out workspace) {
  constexpr const char* call = "jaxsparse_invert_index_v1";
  InvertIndex s;
  ffi::Error error = check_invert_index(index, order, offsets, workspace, &s);
  if (error.failure()) return error;
  error = check_workspace(call, s.workspace, cuda::invert_index_workspace(s.positions));
  if (error.failure()) return error;
  const cuda::InvertIndexArgs args{ints(index), narrow(s.positions), narrow(s.values),
                                   ints(order), ints(offsets),       workspace->untyped_data()};
  return launch_error(call, cuda::invert_index(args, stream));
}

ffi::Error segment_sum(cudaStream_t stream, In x, In order, In offsets, Out y) {
  SegmentSum s;
  if (ffi::Error error = check_segment_sum(x, order, offsets, y, &s); error.failure()) return error;
  const cuda::SegmentSumArgs args{kernel_dtype(s.dtype), x.untyped_data(),   ints(order),      ints(offsets),
                                  narrow(s.values),      narrow(s.channels), y->untyped_data()};
  return launch_error("jaxsparse_segment_sum_v1", cuda::segment_sum(args, stream));
}

// kCmdBufferCompatible: XLA may record the calls into a CUDA graph, see the head of this file.
JAXSPARSE_DEFINE_HANDLERS(Stream, {ffi::Traits::kCmdBufferCompatible});

}  // namespace

const Handlers& cuda_handlers() {
  static const Handlers all = [] {
    Handlers handlers = kHandlers;
    handlers.insert(handlers.end(), cuda_only_handlers().begin(), cuda_only_handlers().end());
    return handlers;
  }();
  return all;
}

}  // namespace jaxsparse
