// The custom calls that only CUDA has: scheduled products, and sums and norms of channels. See cuda_handlers.cc.
#include "bindings/bind.h"
#include "bindings/checks_conv.h"
#include "bindings/checks_rows.h"
#include "bindings/cuda_launch.h"
#include "bindings/handlers.h"
#include "cuda/channels/channels.h"
#include "cuda/conv/gemm.h"
#include "cuda/conv/schedule.h"

namespace jaxsparse {
namespace {

ffi::Error conv_schedule(cudaStream_t stream, In table, In masks, In out_counts, Out order, Out tile_masks,
                         Out tile_table, Out workspace, Axes groups) {
  constexpr const char* call = "jaxsparse_conv_schedule_v1";
  ConvSchedule s;
  ffi::Error error =
      check_conv_schedule(table, masks, out_counts, order, tile_masks, tile_table, workspace, groups, &s);
  if (error.failure()) return error;
  error = check_workspace(call, s.workspace, cuda::schedule_workspace(s.rows));
  if (error.failure()) return error;
  cuda::ScheduleArgs args{};
  args.table = ints(table);
  args.masks = masks.typed_data<uint32_t>();
  args.rows = {ints(out_counts), narrow(s.segments), narrow(s.rows)};
  args.taps = narrow(s.taps);
  args.mask_words = narrow(s.mask_words);
  args.groups = s.groups;
  for (int32_t i = 0; i < s.groups * args.mask_words; ++i) {
    args.group[i / args.mask_words][i % args.mask_words] = static_cast<uint32_t>(groups[i]);
  }
  args.order = ints(order);
  args.tile_masks = tile_masks->typed_data<uint32_t>();
  args.tile_table = ints(tile_table);
  args.workspace = workspace->untyped_data();
  return launch_error(call, cuda::schedule(args, stream));
}

cuda::Tile tile_of(int64_t rows, int64_t cols, int64_t stages, int64_t splits) {
  return {narrow(rows), narrow(cols), narrow(stages), narrow(splits)};
}

// The launchers reject tiles that were not built, that need more shared memory than the device has, and tiles with splits on
// GPUs without clusters.
ffi::Error gemm_error(const char* call, cudaError_t status, const cuda::Tile& tile) {
  if (status == cudaErrorNotSupported && tile.splits > 1) {
    return ffi::Error::InvalidArgument(std::string(call) + ": a tile of " + std::to_string(tile.splits) +
                                       " splits needs a GPU of sm_90, and kernels built for it; take one without");
  }
  if (status != cudaErrorInvalidValue) return launch_error(call, status);
  return ffi::Error::InvalidArgument(std::string(call) + ": no kernel was built for tile_rows " +
                                     std::to_string(tile.rows) + ", tile_cols " + std::to_string(tile.cols) +
                                     ", stages " + std::to_string(tile.stages) + ", splits " +
                                     std::to_string(tile.splits) +
                                     " and these channels; compile, or export, the program anew with this version");
}

// What the arguments of forward and of wgrad have in common.
template <typename Args>
Args gemm_args(const Gemm& s, In x, const cuda::Tile& tile) {
  Args args{};
  args.dtype = kernel_dtype(s.dtype);
  args.out_dtype = kernel_dtype(s.out_dtype);
  args.tile = tile;
  args.x = x.untyped_data();
  args.out_rows = narrow(s.out_rows);
  args.taps = narrow(s.taps);
  args.in_channels = narrow(s.in_channels);
  args.out_channels = narrow(s.out_channels);
  return args;
}

// Without the arrays of a schedule.
cuda::ConvGemmArgs conv_gemm_args(const Gemm& s, In x, In w, Out y, const cuda::Tile& tile) {
  auto args = gemm_args<cuda::ConvGemmArgs>(s, x, tile);
  args.w = w.untyped_data();
  args.mask_words = narrow(s.mask_words);
  args.y = y->untyped_data();
  return args;
}

void set_schedule(cuda::ConvGemmArgs* args, In order, In tile_masks, In tile_table) {
  args->order = ints(order);
  args->tile_masks = tile_masks.typed_data<uint32_t>();
  args->tile_table = ints(tile_table);
}

ffi::Error conv_gemm(cudaStream_t stream, In x, In w, In order, In tile_masks, In tile_table, Out y, int64_t tile_rows,
                     int64_t tile_cols, int64_t stages, int64_t splits, int64_t exact) {
  Gemm s;
  if (ffi::Error error = check_conv_gemm(x, w, order, tile_masks, tile_table, y, &s); error.failure()) return error;
  const cuda::Tile tile = tile_of(tile_rows, tile_cols, stages, splits);
  cuda::ConvGemmArgs args = conv_gemm_args(s, x, w, y, tile);
  args.exact = exact != 0;
  set_schedule(&args, order, tile_masks, tile_table);
  return gemm_error("jaxsparse_conv_gemm_v1", cuda::conv_gemm(args, stream), tile);
}

// Without the arrays of a schedule.
cuda::FusedConvArgs conv_fused_args(const FusedConv& s, In x, In w, In out_counts, Out y, const cuda::Tile& tile,
                                    int64_t activation, double epsilon) {
  cuda::FusedConvArgs args{conv_gemm_args(s, x, w, y, tile), narrow(s.first_channels), nullptr, {}};
  cuda::PerChannel* const numbers[] = {&args.epilogue.mean, &args.epilogue.variance, &args.epilogue.scale,
                                       &args.epilogue.bias};
  for (int i = 0; i < 4; ++i) {
    if (s.given[i]) *numbers[i] = {s.given[i]->untyped_data(), kernel_dtype(s.given[i]->element_type())};
  }
  if (s.given[4]) args.epilogue.residual = s.given[4]->untyped_data();
  if (s.given[5]) args.second = s.given[5]->untyped_data();
  args.epilogue.epsilon = static_cast<float>(epsilon);
  args.epilogue.activation = static_cast<cuda::Activation>(activation);
  args.epilogue.rows = {ints(out_counts), narrow(s.segments), narrow(s.out_rows)};
  return args;
}

ffi::Error conv_fused(cudaStream_t stream, In x, In w, In order, In tile_masks, In tile_table, In out_counts, Out y,
                      ffi::RemainingArgs rest, int64_t tile_rows, int64_t tile_cols, int64_t stages, int64_t splits,
                      int64_t given, int64_t activation, double epsilon) {
  FusedConv s;
  ffi::Error error =
      check_conv_fused(x, w, order, tile_masks, tile_table, out_counts, y, rest, given, activation, &s);
  if (error.failure()) return error;
  const cuda::Tile tile = tile_of(tile_rows, tile_cols, stages, splits);
  cuda::FusedConvArgs args = conv_fused_args(s, x, w, out_counts, y, tile, activation, epsilon);
  set_schedule(&args, order, tile_masks, tile_table);
  return gemm_error("jaxsparse_conv_fused_v1", cuda::conv_fused(args, stream), tile);
}

ffi::Error linear_fused(cudaStream_t stream, In x, In w, In counts, Out y, ffi::RemainingArgs rest, int64_t tile_rows,
                        int64_t tile_cols, int64_t stages, int64_t splits, int64_t given, int64_t activation,
                        double epsilon) {
  FusedConv s;
  if (ffi::Error error = check_linear_fused(x, w, counts, y, rest, given, activation, &s); error.failure()) return error;
  const cuda::Tile tile = tile_of(tile_rows, tile_cols, stages, splits);
  const cuda::FusedConvArgs args = conv_fused_args(s, x, w, counts, y, tile, activation, epsilon);
  return gemm_error("jaxsparse_linear_fused_v1", cuda::conv_fused(args, stream), tile);
}

ffi::Error conv_pairs(cudaStream_t stream, In table, In masks, In out_counts, Out pairs, Out tap_pairs,
                      Out workspace) {
  constexpr const char* call = "jaxsparse_conv_pairs_v1";
  ConvPairs s;
  ffi::Error error = check_conv_pairs(table, masks, out_counts, pairs, tap_pairs, workspace, &s);
  if (error.failure()) return error;
  error = check_workspace(call, s.workspace, cuda::pairs_workspace(s.listed, s.out_rows));
  if (error.failure()) return error;
  const cuda::PairsArgs args{ints(table),
                             masks.typed_data<uint32_t>(),
                             {ints(out_counts), narrow(s.segments), narrow(s.out_rows)},
                             narrow(s.taps),
                             narrow(s.mask_words),
                             narrow(s.listed),
                             reinterpret_cast<cuda::Pair*>(ints(pairs)),
                             ints(tap_pairs),
                             workspace->untyped_data()};
  return launch_error(call, cuda::list_pairs(args, stream));
}

ffi::Error wgrad_gemm(cudaStream_t stream, In x, In g, In pairs, In tap_pairs, Out dw, Out workspace, int64_t tile_rows,
                      int64_t tile_cols, int64_t stages, int64_t splits, int64_t exact, int64_t slots) {
  constexpr const char* call = "jaxsparse_wgrad_gemm_v1";
  Gemm s;
  ffi::Error error = check_wgrad_gemm(x, g, pairs, tap_pairs, dw, workspace, slots, &s);
  if (error.failure()) return error;
  error = check_workspace(call, s.workspace, cuda::wgrad_gemm_workspace(slots, s.in_channels, s.out_channels));
  if (error.failure()) return error;
  auto args = gemm_args<cuda::WgradGemmArgs>(s, x, tile_of(tile_rows, tile_cols, stages, splits));
  args.exact = exact != 0;
  args.slots = narrow(slots);
  args.g = g.untyped_data();
  args.pairs = reinterpret_cast<const cuda::Pair*>(ints(pairs));
  args.tap_pairs = ints(tap_pairs);
  args.listed = narrow(s.listed);
  args.dw = dw->untyped_data();
  args.workspace = workspace->untyped_data();
  return gemm_error(call, cuda::wgrad_gemm(args, stream), args.tile);
}

const void* data(const std::optional<In>& operand) { return operand ? operand->untyped_data() : nullptr; }

// What all calls for channels have in common, once checked.
ffi::Error channel_args(const char* call, const Channels& s, In x, In count, Out workspace, cuda::ChannelArgs* args) {
  args->dtype = kernel_dtype(s.dtype);
  args->vectors = kernel_dtype(s.vectors == ffi::DataType::INVALID ? s.sums() : s.vectors);
  args->count = ints(count);
  args->rows = narrow(s.rows);
  args->channels = narrow(s.channels);
  args->x = x.untyped_data();
  args->workspace = workspace->untyped_data();
  return check_workspace(call, s.workspace, cuda::channels_workspace(s.channels, args->dtype));
}

ffi::Error channel_moments(cudaStream_t stream, In b, In count, Out first, Out second, Out workspace,
                           ffi::RemainingArgs rest) {
  constexpr const char* call = "jaxsparse_channel_moments_v1";
  Channels s;
  ffi::Error error = check_channel_moments(b, count, first, second, workspace, rest, &s);
  if (error.failure()) return error;
  cuda::ChannelArgs args;
  error = channel_args(call, s, s.a.value_or(b), count, workspace, &args);
  if (error.failure()) return error;
  if (s.a) args.ct = b.untyped_data();
  args.center = data(s.center);
  args.factor = data(s.gate_scale);
  args.shift = data(s.gate_shift);
  args.first = first->untyped_data();
  args.second = second->untyped_data();
  return launch_error(call, cuda::channel_moments(args, stream));
}

ffi::Error batch_norm(cudaStream_t stream, In x, In count, In scale, In bias, Out y, Out mean, Out variance, Out inverse,
                      Out factor, Out shift, Out workspace, ffi::RemainingArgs rest, double epsilon, int64_t relu) {
  constexpr const char* call = "jaxsparse_batch_norm_v1";
  Channels s;
  ffi::Error error =
      check_batch_norm(x, count, scale, bias, y, mean, variance, inverse, factor, shift, workspace, rest, &s);
  if (error.failure()) return error;
  cuda::ChannelArgs args;
  error = channel_args(call, s, x, count, workspace, &args);
  if (error.failure()) return error;
  args.scale = scale.untyped_data();
  args.bias = bias.untyped_data();
  args.residual = data(s.residual);
  args.epsilon = epsilon;
  args.relu = relu != 0;
  args.first = mean->untyped_data();
  args.second = variance->untyped_data();
  args.third = inverse->untyped_data();
  args.fourth = factor->untyped_data();
  args.fifth = shift->untyped_data();
  args.result = y->untyped_data();
  return launch_error(call, cuda::batch_norm(args, stream));
}

ffi::Error batch_norm_grad(cudaStream_t stream, In ct, In x, In mean, In inverse, In factor, In shift, In count, Out x_ct,
                           Out scale_ct, Out bias_ct, Out workspace, int64_t relu) {
  constexpr const char* call = "jaxsparse_batch_norm_grad_v1";
  Channels s;
  ffi::Error error =
      check_batch_norm_grad(ct, x, mean, inverse, factor, shift, count, x_ct, scale_ct, bias_ct, workspace, &s);
  if (error.failure()) return error;
  cuda::ChannelArgs args;
  error = channel_args(call, s, x, count, workspace, &args);
  if (error.failure()) return error;
  args.ct = ct.untyped_data();
  args.center = mean.untyped_data();
  args.inverse = inverse.untyped_data();
  args.factor = factor.untyped_data();
  args.shift = shift.untyped_data();
  args.relu = relu != 0;
  args.first = bias_ct->untyped_data();
  args.second = scale_ct->untyped_data();
  args.result = x_ct->untyped_data();
  return launch_error(call, cuda::batch_norm_grad(args, stream));
}

template <typename Binding>
auto with_ending(Binding binding) {
  return with_tile(std::move(binding).RemainingArgs())
      .template Attr<int64_t>("given")
      .template Attr<int64_t>("activation")
      .template Attr<double>("epsilon");
}

XLA_FFI_DEFINE_HANDLER(kConvSchedule, conv_schedule, (bind<Stream, 3, 4>().Attr<AxisAttribute>("groups")),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kConvGemm, conv_gemm, (with_tile(bind<Stream, 5, 1>()).Attr<int64_t>("exact")),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kConvFused, conv_fused, with_ending(bind<Stream, 6, 1>()), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kLinearFused, linear_fused, with_ending(bind<Stream, 3, 1>()),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kConvPairs, conv_pairs, (bind<Stream, 3, 3>()), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kWgradGemm, wgrad_gemm,
                       (with_tile(bind<Stream, 4, 2>()).Attr<int64_t>("exact").Attr<int64_t>("slots")),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kChannelMoments, channel_moments, (bind<Stream, 2, 3>().RemainingArgs()),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(
    kBatchNorm, batch_norm,
    (bind<Stream, 4, 7>().RemainingArgs().Attr<double>("epsilon").Attr<int64_t>("relu")),
    {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kBatchNormGrad, batch_norm_grad, (bind<Stream, 7, 4>().Attr<int64_t>("relu")),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

const Handlers& cuda_only_handlers() {
  static const Handlers handlers = {
      {"jaxsparse_conv_schedule_v1", kConvSchedule},
      {"jaxsparse_conv_gemm_v1", kConvGemm},
      {"jaxsparse_conv_fused_v1", kConvFused},
      {"jaxsparse_linear_fused_v1", kLinearFused},
      {"jaxsparse_conv_pairs_v1", kConvPairs},
      {"jaxsparse_wgrad_gemm_v1", kWgradGemm},
      {"jaxsparse_channel_moments_v1", kChannelMoments},
      {"jaxsparse_batch_norm_v1", kBatchNorm},
      {"jaxsparse_batch_norm_grad_v1", kBatchNormGrad},
  };
  return handlers;
}

}  // namespace jaxsparse
