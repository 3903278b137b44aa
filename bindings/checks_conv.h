// Checks of the convolution calls, and of those that prepare schedules and pairs; see checks.h.
#pragma once

#include <optional>

#include "bindings/checks.h"
#include "cuda/conv/tiles.h"

namespace jaxsparse {

// --- 6 conv_forward, 7 conv_wgrad ---

struct Conv {
  ffi::DataType dtype = ffi::DataType::INVALID;  // of all features and weights
  int tile_rows = 0;
  int64_t taps = kUnbound, in_rows = kUnbound, out_rows = kUnbound, in_channels = kUnbound, out_channels = kUnbound;
  int64_t segments = kUnbound, mask_words = kUnbound, workspace = kUnbound;
};

// Checks that both convolutions share: x, the map, the attributes.
inline void check_conv(Checks& checks, In x, In table, In masks, In out_counts, int64_t tile_rows, Conv* s) {
  s->dtype = x.element_type();
  checks.operand("x", x, s->dtype, {&s->in_rows, &s->in_channels});
  checks.operand("table", table, ffi::S32, {&s->taps, &s->out_rows});
  if (checks.ok()) s->mask_words = (s->taps + 31) / 32;
  checks.operand("masks", masks, ffi::U32, {&s->out_rows, &s->mask_words});
  checks.operand("out_counts", out_counts, ffi::S32, {&s->segments});
  checks.require(tile_rows == 32 || tile_rows == 64 || tile_rows == 128, "tile_rows must be 32, 64 or 128");
  checks.require(s->taps >= 1 && s->taps <= kMaxTaps, "the kernel must have 1 to 65536 taps");
  checks.require(s->in_channels >= 1, "x must have at least one channel");
  check_segments(checks, s->out_rows, s->segments);
  s->tile_rows = static_cast<int>(tile_rows);
}

inline ffi::Error check_conv_forward(In x, In w, In table, In masks, In out_counts, Out y,
                                     int64_t tile_rows, Conv* s) {
  Checks checks("jaxsparse_conv_forward_v1");
  check_conv(checks, x, table, masks, out_counts, tile_rows, s);
  checks.operand("w", w, s->dtype, {&s->taps, &s->in_channels, &s->out_channels});
  checks.operand("y", y, s->dtype, {&s->out_rows, &s->out_channels});
  checks.require(s->out_channels >= 1, "w must have at least one output channel");
  return checks.error();
}

inline ffi::Error check_conv_wgrad(In x, In g, In table, In masks, In out_counts, Out dw, Out workspace,
                                   int64_t tile_rows, Conv* s) {
  Checks checks("jaxsparse_conv_wgrad_v1");
  check_conv(checks, x, table, masks, out_counts, tile_rows, s);
  checks.operand("g", g, s->dtype, {&s->out_rows, &s->out_channels});
  checks.operand("dw", dw, s->dtype, {&s->taps, &s->in_channels, &s->out_channels});
  checks.operand("workspace", workspace, ffi::U8, {&s->workspace});
  checks.require(s->out_channels >= 1, "g must have at least one channel");
  return checks.error();
}

// --- 8 conv_schedule ---

struct ConvSchedule {
  int64_t taps = kUnbound, rows = kUnbound, segments = kUnbound, mask_words = kUnbound, tiles = kUnbound;
  int64_t workspace = kUnbound;
  int32_t groups = 0;
};

// `groups` holds the mask words of each group, one group after the other.
inline ffi::Error check_conv_schedule(In table, In masks, In out_counts, Out order, Out tile_masks, Out tile_table,
                                      Out workspace, Axes groups, ConvSchedule* s) {
  Checks checks("jaxsparse_conv_schedule_v1");
  int64_t tile_rows = cuda::kScheduleRows;
  checks.operand("table", table, ffi::S32, {&s->taps, &s->rows});
  if (checks.ok()) {
    s->mask_words = (s->taps + 31) / 32;
    s->tiles = (s->rows + tile_rows - 1) / tile_rows;
  }
  checks.operand("masks", masks, ffi::U32, {&s->rows, &s->mask_words});
  checks.operand("out_counts", out_counts, ffi::S32, {&s->segments});
  checks.operand("order", order, ffi::S32, {&s->rows});
  checks.operand("tile_masks", tile_masks, ffi::U32, {&s->tiles, &s->mask_words});
  checks.operand("tile_table", tile_table, ffi::S32, {&s->tiles, &s->taps, &tile_rows});
  checks.operand("workspace", workspace, ffi::U8, {&s->workspace});
  checks.require(s->taps >= 1 && s->taps <= kMaxTaps, "the kernel must have 1 to 65536 taps");
  check_segments(checks, s->rows, s->segments);
  if (!checks.ok()) return checks.error();
  const int64_t words = static_cast<int64_t>(groups.size());
  checks.require(words % s->mask_words == 0 && words / s->mask_words <= cuda::kMostGroups,
                 "groups must have the words of a mask for each of at most 9 groups");
  checks.require(words == 0 || s->mask_words <= cuda::kMostGroupWords, "groups are for kernels of at most 384 taps");
  s->groups = static_cast<int32_t>(words / s->mask_words);
  return checks.error();
}

// --- 9 conv_gemm, conv_fused, linear_fused, 10 conv_pairs, 11 wgrad_gemm ---

struct Gemm {
  ffi::DataType dtype = ffi::DataType::INVALID;      // of x and w, or of x and g
  ffi::DataType out_dtype = ffi::DataType::INVALID;  // of y, or of dw
  int64_t taps = kUnbound, in_rows = kUnbound, out_rows = kUnbound, in_channels = kUnbound, out_channels = kUnbound;
  int64_t mask_words = kUnbound, listed = kUnbound, workspace = kUnbound;
};

inline void check_gemm(Checks& checks, const Gemm& s) {
  checks.require(is_16_bit(s.dtype) || s.dtype == ffi::F32, "x must be float16, bfloat16 or float32");
  checks.require(s.out_dtype == s.dtype || s.out_dtype == ffi::F32, "the result must have the dtype of x, or float32");
  checks.require(s.taps >= 1 && s.taps <= kMaxTaps, "the kernel must have 1 to 65536 taps");
  checks.require(s.in_channels >= 4 && s.in_channels % 4 == 0, "input channels must be a multiple of 4");
  checks.require(s.out_channels >= 8 && s.out_channels % 8 == 0, "output channels must be a multiple of 8");
}

// `x_channels` receives the channels of x; it points to in_channels, except if a second input may follow.
inline void check_conv_gemm(Checks& checks, In x, In w, In order, In tile_masks, In tile_table, Out y,
                            int64_t* x_channels, Gemm* s) {
  int64_t tile_rows = cuda::kScheduleRows, tiles = kUnbound;
  s->dtype = x.element_type();
  s->out_dtype = y->element_type();
  checks.operand("x", x, s->dtype, {&s->in_rows, x_channels});
  if (s->dtype == ffi::F32) {
    checks.operand("w", w, s->dtype, {&s->taps, &s->out_channels, &s->in_channels});
  } else {
    checks.operand("w", w, s->dtype, {&s->taps, &s->in_channels, &s->out_channels});
  }
  checks.operand("order", order, ffi::S32, {&s->out_rows});
  if (checks.ok()) {
    s->mask_words = (s->taps + 31) / 32;
    tiles = (s->out_rows + tile_rows - 1) / tile_rows;
  }
  checks.operand("tile_masks", tile_masks, ffi::U32, {&tiles, &s->mask_words});
  checks.operand("tile_table", tile_table, ffi::S32, {&tiles, &s->taps, &tile_rows});
  checks.operand("y", y, s->out_dtype, {&s->out_rows, &s->out_channels});
  check_gemm(checks, *s);
}

inline ffi::Error check_conv_gemm(In x, In w, In order, In tile_masks, In tile_table, Out y, Gemm* s) {
  Checks checks("jaxsparse_conv_gemm_v1");
  check_conv_gemm(checks, x, w, order, tile_masks, tile_table, y, &s->in_channels, s);
  return checks.error();
}

constexpr const char* kFusedOperands[] = {"mean", "variance", "scale", "bias", "residual", "second"};

struct FusedConv : Gemm {
  int64_t segments = kUnbound, first_channels = kUnbound;
  std::optional<In> given[6];  // in the order of kFusedOperands
};

// Checks the epilogue and the second input. Bit i of `given` says whether operand i of kFusedOperands is in `rest`.
inline void check_fused(Checks& checks, In out_counts, ffi::RemainingArgs rest, int64_t given, int64_t activation,
                        FusedConv* s) {
  checks.operand("out_counts", out_counts, ffi::S32, {&s->segments});
  checks.require(is_16_bit(s->dtype) && s->out_dtype == s->dtype, "x and y must be float16 or bfloat16, both alike");
  checks.require(given >= 0 && given < 64, "given must have six bits");
  checks.require(activation >= 0 && activation <= 4, "activation must be 0 to 4");
  check_segments(checks, s->out_rows, s->segments);
  size_t next = 0;
  int64_t second_channels = 0;
  for (int i = 0; checks.ok() && i < 6; ++i) {
    if ((given >> i & 1) == 0) continue;
    ffi::ErrorOr<In> operand = rest.get<In>(next++);
    checks.require(operand.has_value(), "there must be an operand for each bit of given");
    if (!checks.ok()) break;
    s->given[i] = operand.value();
    const ffi::DataType dtype = operand->element_type();
    if (i == 4) {
      checks.operand(kFusedOperands[i], *operand, s->dtype, {&s->out_rows, &s->out_channels});
    } else if (i == 5) {
      second_channels = kUnbound;
      checks.operand(kFusedOperands[i], *operand, s->dtype, {&s->in_rows, &second_channels});
      checks.require(s->first_channels % 8 == 0 && second_channels % 8 == 0,
                     "the channels of x and second must be multiples of 8");
    } else {
      checks.operand(kFusedOperands[i], *operand, dtype, {&s->out_channels});
      checks.require(is_16_bit(dtype) || dtype == ffi::F32, "numbers of channels must be float16, bfloat16 or float32");
    }
  }
  checks.require(next == rest.size(), "there must be a bit of given for each operand");
  checks.require(s->first_channels + second_channels == s->in_channels,
                 "w must have as many input channels as x, and second where it is given, together");
}

inline ffi::Error check_conv_fused(In x, In w, In order, In tile_masks, In tile_table, In out_counts, Out y,
                                   ffi::RemainingArgs rest, int64_t given, int64_t activation, FusedConv* s) {
  Checks checks("jaxsparse_conv_fused_v1");
  check_conv_gemm(checks, x, w, order, tile_masks, tile_table, y, &s->first_channels, s);
  check_fused(checks, out_counts, rest, given, activation, s);
  return checks.error();
}

// A convolution with one tap and no map: each output row is computed from the same input row.
inline ffi::Error check_linear_fused(In x, In w, In counts, Out y, ffi::RemainingArgs rest, int64_t given,
                                     int64_t activation, FusedConv* s) {
  Checks checks("jaxsparse_linear_fused_v1");
  s->dtype = x.element_type();
  s->out_dtype = y->element_type();
  s->taps = s->mask_words = 1;
  checks.operand("x", x, s->dtype, {&s->in_rows, &s->first_channels});
  checks.operand("w", w, s->dtype, {&s->in_channels, &s->out_channels});
  s->out_rows = s->in_rows;
  checks.operand("y", y, s->out_dtype, {&s->out_rows, &s->out_channels});
  check_gemm(checks, *s);
  check_fused(checks, counts, rest, given, activation, s);
  return checks.error();
}

struct ConvPairs {
  int64_t taps = kUnbound, out_rows = kUnbound, segments = kUnbound, mask_words = kUnbound;
  int64_t listed = kUnbound, workspace = kUnbound;
};

inline void check_listed(Checks& checks, int64_t listed, int64_t taps) {
  checks.require(listed == taps || 2 * listed == taps + 1,
                 "pairs must have a list for each tap or, with an odd number of taps, for those up to the middle one");
}

inline ffi::Error check_conv_pairs(In table, In masks, In out_counts, Out pairs, Out tap_pairs, Out workspace,
                                   ConvPairs* s) {
  Checks checks("jaxsparse_conv_pairs_v1");
  int64_t two = 2;
  checks.operand("table", table, ffi::S32, {&s->taps, &s->out_rows});
  if (checks.ok()) s->mask_words = (s->taps + 31) / 32;
  checks.operand("masks", masks, ffi::U32, {&s->out_rows, &s->mask_words});
  checks.operand("out_counts", out_counts, ffi::S32, {&s->segments});
  checks.operand("pairs", pairs, ffi::S32, {&s->listed, &s->out_rows, &two});
  checks.operand("tap_pairs", tap_pairs, ffi::S32, {&s->taps});
  checks.operand("workspace", workspace, ffi::U8, {&s->workspace});
  check_listed(checks, s->listed, s->taps);
  checks.require(s->taps >= 1 && s->taps <= kMaxTaps, "the kernel must have 1 to 65536 taps");
  check_segments(checks, s->out_rows, s->segments);
  return checks.error();
}

inline ffi::Error check_wgrad_gemm(In x, In g, In pairs, In tap_pairs, Out dw, Out workspace, int64_t slots, Gemm* s) {
  Checks checks("jaxsparse_wgrad_gemm_v1");
  int64_t two = 2;
  s->dtype = x.element_type();
  s->out_dtype = dw->element_type();
  checks.operand("x", x, s->dtype, {&s->in_rows, &s->in_channels});
  checks.operand("g", g, s->dtype, {&s->out_rows, &s->out_channels});
  checks.operand("pairs", pairs, ffi::S32, {&s->listed, &s->out_rows, &two});
  checks.operand("tap_pairs", tap_pairs, ffi::S32, {&s->taps});
  checks.operand("dw", dw, s->out_dtype, {&s->taps, &s->in_channels, &s->out_channels});
  checks.operand("workspace", workspace, ffi::U8, {&s->workspace});
  check_gemm(checks, *s);
  check_listed(checks, s->listed, s->taps);
  checks.require(slots >= 2 * s->taps && slots <= kMaxSize, "slots must be at least twice the taps");
  return checks.error();
}

}  // namespace jaxsparse
