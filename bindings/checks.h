// What every handler checks before it touches a byte: dtypes, shapes and attributes, once for CPU and CUDA.
//
// One struct a custom call holds its sizes and decoded attributes; `check_<call>` fills it from the buffers or returns
// an error that names the call, what is wrong, and the shapes of all operands. Sizes bind by name: the first operand
// with a size sets it, every later one must agree. After a check, typed_data of the stated dtype is safe.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/conv/tiles.h"
#include "cuda/coords/key.h"
#include "cuda/coords/window.h"
#include "xla/ffi/api/ffi.h"

namespace jaxsparse {

namespace ffi = xla::ffi;

using Axes = ffi::Span<const int64_t>;  // a per-axis attribute
using In = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

constexpr int64_t kUnbound = -1;
constexpr int64_t kMaxTaps = 65536;
constexpr int64_t kMaxSize = int64_t{1} << 30;  // of any axis but a workspace's: rows are numbered in int32
constexpr int64_t kMaxAxisAttr = int64_t{1} << 30;  // times a 32-bit coordinate, it stays far inside int64

inline std::string dtype_name(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::F16: return "float16";
    case ffi::BF16: return "bfloat16";
    case ffi::F32: return "float32";
    case ffi::F64: return "float64";
    case ffi::S32: return "int32";
    case ffi::U32: return "uint32";
    case ffi::U8: return "uint8";
    default: return "dtype " + std::to_string(static_cast<int>(dtype));
  }
}

inline bool is_feature_dtype(ffi::DataType dtype) {
  return dtype == ffi::F16 || dtype == ffi::BF16 || dtype == ffi::F32 || dtype == ffi::F64;
}

inline bool is_16_bit(ffi::DataType dtype) { return dtype == ffi::F16 || dtype == ffi::BF16; }

// Collects the first failure; builds strings only if there is one.
class Checks {
 public:
  explicit Checks(const char* call) : call_(call) { operands_.reserve(10); }

  void operand(const char* name, In buffer, ffi::DataType dtype, std::initializer_list<int64_t*> sizes) {
    operands_.emplace_back(name, buffer);
    if (!ok()) return;
    if (buffer.element_type() != dtype) {
      return fail(std::string(name) + " must be " + dtype_name(dtype));
    }
    if (buffer.dimensions().size() != sizes.size()) {
      return fail(std::string(name) + " must have rank " + std::to_string(sizes.size()));
    }
    size_t axis = 0;
    for (int64_t* size : sizes) {
      const int64_t actual = buffer.dimensions()[axis];
      if (*size == kUnbound) *size = actual;
      if (actual != *size) {
        return fail(std::string(name) + " must have size " + std::to_string(*size) + " on axis " +
                    std::to_string(axis));
      }
      if (actual > kMaxSize && dtype != ffi::U8) {
        return fail(std::string(name) + " must have at most 2^30 entries on axis " + std::to_string(axis));
      }
      ++axis;
    }
  }

  void operand(const char* name, Out buffer, ffi::DataType dtype, std::initializer_list<int64_t*> sizes) {
    operand(name, *buffer, dtype, sizes);
  }

  void require(bool holds, const char* what) {
    if (ok() && !holds) fail(what);
  }

  void fail(std::string what) {
    if (ok()) what_ = std::move(what);
  }

  bool ok() const { return what_.empty(); }

  ffi::Error error() const {
    if (ok()) return ffi::Error::Success();
    std::string text = std::string(call_) + ": " + what_ + "; got";
    for (const auto& [name, buffer] : operands_) {
      text += std::string(" ") + name + " " + dtype_name(buffer.element_type()) + " [";
      for (size_t a = 0; a < buffer.dimensions().size(); ++a) {
        text += a ? ", " : "";
        text += std::to_string(buffer.dimensions()[a]);
      }
      text += "]";
    }
    return ffi::Error::InvalidArgument(text);
  }

 private:
  const char* call_;
  std::string what_;
  std::vector<std::pair<const char*, In>> operands_;
};

inline void check_dims(Checks& checks, int64_t columns, int* dims) {
  checks.require(columns >= 2 && columns <= 1 + kMaxDims, "coords must have 2 to 5 columns, batch first");
  *dims = static_cast<int>(columns - 1);
}

inline void check_segments(Checks& checks, int64_t rows, int64_t segments) {
  checks.require(segments >= 1 && rows % segments == 0, "the rows must divide into as many equal segments as counts");
}

// Decodes the geometry attributes for `dims` axes.
inline Geometry decode_geometry(Checks& checks, int dims, Axes kernel, Axes stride, Axes padding, Axes dilation) {
  Geometry geometry{};
  geometry.dims = dims;
  const size_t n = static_cast<size_t>(dims);
  if (kernel.size() != n || stride.size() != n || padding.size() != n || dilation.size() != n) {
    checks.fail("kernel, stride, padding and dilation must have one entry an axis, " + std::to_string(dims) + " here");
    return geometry;
  }
  int64_t volume = 1;
  for (int a = 0; a < dims; ++a) {
    geometry.kernel[a] = kernel[a];
    geometry.stride[a] = stride[a];
    geometry.padding[a] = padding[a];
    geometry.dilation[a] = dilation[a];
    checks.require(kernel[a] >= 1 && kernel[a] <= kMaxTaps, "kernel must be 1 to 65536 on each axis");
    checks.require(stride[a] >= 1 && stride[a] <= kMaxAxisAttr, "stride must be 1 to 2^30");
    checks.require(dilation[a] >= 1 && dilation[a] <= kMaxAxisAttr, "dilation must be 1 to 2^30");
    checks.require(padding[a] >= -kMaxAxisAttr && padding[a] <= kMaxAxisAttr, "padding must be -2^30 to 2^30");
    if (checks.ok()) volume *= kernel[a];
    checks.require(volume <= kMaxTaps, "the kernel must have at most 65536 taps");
  }
  return geometry;
}

// --- 1 unique_sites ---

struct UniqueSites {
  int dims = 0;
  int64_t points = kUnbound, capacity = kUnbound, workspace = kUnbound;
};

inline ffi::Error check_unique_sites(In coords, In count, Out sites, Out kept, Out found, Out row_of, Out order,
                                     Out offsets, Out without, Out workspace, UniqueSites* s) {
  Checks checks("jaxsparse_unique_sites_v1");
  int64_t one = 1, columns = kUnbound;
  checks.operand("coords", coords, ffi::S32, {&s->points, &columns});
  checks.operand("count", count, ffi::S32, {&one});
  checks.operand("sites", sites, ffi::S32, {&s->capacity, &columns});
  checks.operand("kept", kept, ffi::S32, {&one});
  checks.operand("found", found, ffi::S32, {&one});
  checks.operand("row_of", row_of, ffi::S32, {&s->points});
  checks.operand("order", order, ffi::S32, {&s->points});
  int64_t ends = s->capacity + 1;
  checks.operand("offsets", offsets, ffi::S32, {&ends});
  int64_t reasons = kReasons;
  checks.operand("without", without, ffi::S32, {&reasons});
  checks.operand("workspace", workspace, ffi::U8, {&s->workspace});
  check_dims(checks, columns, &s->dims);
  return checks.error();
}

// --- 2 coarse_sites ---

struct CoarseSites {
  Geometry geometry{};
  bool bounded = false;
  int64_t bounds[kMaxDims] = {};
  int64_t rows = kUnbound, capacity = kUnbound, workspace = kUnbound;
};

inline ffi::Error check_coarse_sites(In coords, In count, Out sites, Out kept, Out found, Out outside, Out workspace,
                                     Axes kernel, Axes stride, Axes padding, Axes dilation, Axes bounds,
                                     CoarseSites* s) {
  Checks checks("jaxsparse_coarse_sites_v1");
  int64_t one = 1, columns = kUnbound;
  int dims = 0;
  checks.operand("coords", coords, ffi::S32, {&s->rows, &columns});
  checks.operand("count", count, ffi::S32, {&one});
  checks.operand("sites", sites, ffi::S32, {&s->capacity, &columns});
  checks.operand("kept", kept, ffi::S32, {&one});
  checks.operand("found", found, ffi::S32, {&one});
  checks.operand("outside", outside, ffi::S32, {&one});
  checks.operand("workspace", workspace, ffi::U8, {&s->workspace});
  check_dims(checks, columns, &dims);
  if (!checks.ok()) return checks.error();
  s->geometry = decode_geometry(checks, dims, kernel, stride, padding, dilation);
  s->bounded = bounds.size() != 0;
  checks.require(!s->bounded || bounds.size() == static_cast<size_t>(dims),
                 "bounds must be empty or have one entry an axis");
  for (int a = 0; s->bounded && checks.ok() && a < dims; ++a) s->bounds[a] = bounds[a];
  return checks.error();
}

// --- 3 site_index ---

// A slot of a hash map has 32 bytes at most, on CPU and CUDA.
inline int64_t site_index_bytes(int64_t rows) { return 32 * hash_slots(rows); }

struct SiteIndex {
  int dims = 0;
  int64_t rows = kUnbound, bytes = kUnbound;
};

inline ffi::Error check_site_index(In coords, In count, Out index, SiteIndex* s) {
  Checks checks("jaxsparse_site_index_v1");
  int64_t one = 1, columns = kUnbound;
  checks.operand("coords", coords, ffi::S32, {&s->rows, &columns});
  checks.operand("count", count, ffi::S32, {&one});
  checks.operand("index", index, ffi::U8, {&s->bytes});
  check_dims(checks, columns, &s->dims);
  checks.require(s->bytes >= site_index_bytes(s->rows), "index must have 32 bytes for each of two slots a row");
  return checks.error();
}

// --- 4 kernel_map ---

enum Builder : int64_t { kHashBuilder = 0, kBlocksBuilder = 1 };

struct BuildKernelMap {
  Geometry geometry{};
  int64_t in_rows = kUnbound, out_rows = kUnbound, taps = kUnbound, mask_words = kUnbound, index_bytes = kUnbound;
};

inline ffi::Error check_kernel_map(In in_coords, In in_count, In out_coords, In out_count, In index, Out table,
                                   Out masks, Axes kernel, Axes stride, Axes padding, Axes dilation, int64_t builder,
                                   BuildKernelMap* s) {
  Checks checks("jaxsparse_kernel_map_v1");
  int64_t one = 1, columns = kUnbound;
  int dims = 0;
  checks.operand("in_coords", in_coords, ffi::S32, {&s->in_rows, &columns});
  checks.operand("in_count", in_count, ffi::S32, {&one});
  checks.operand("out_coords", out_coords, ffi::S32, {&s->out_rows, &columns});
  checks.operand("out_count", out_count, ffi::S32, {&one});
  checks.operand("index", index, ffi::U8, {&s->index_bytes});
  check_dims(checks, columns, &dims);
  if (checks.ok()) s->geometry = decode_geometry(checks, dims, kernel, stride, padding, dilation);
  if (checks.ok()) {
    s->taps = s->geometry.volume();
    s->mask_words = (s->taps + 31) / 32;
  }
  checks.operand("table", table, ffi::S32, {&s->taps, &s->out_rows});
  checks.operand("masks", masks, ffi::U32, {&s->out_rows, &s->mask_words});
  if (!checks.ok()) return checks.error();
  checks.require(builder == kHashBuilder || builder == kBlocksBuilder, "builder must be 0 (hash) or 1 (blocks)");
  checks.require(builder != kBlocksBuilder || blocks_can_serve(s->geometry),
                 "the window must lie over at most 27 blocks of 64 sites for builder 1 (blocks)");
  checks.require(s->index_bytes >= site_index_bytes(s->in_rows),
                 "index must be that of site_index for the input rows");
  return checks.error();
}

// --- 5 reverse_table ---

struct ReverseTable {
  int64_t taps = kUnbound, out_rows = kUnbound, in_rows = kUnbound, segments = kUnbound, mask_words = kUnbound;
};

inline ffi::Error check_reverse_table(In table, In out_counts, Out reverse, Out masks, ReverseTable* s) {
  Checks checks("jaxsparse_reverse_table_v1");
  checks.operand("table", table, ffi::S32, {&s->taps, &s->out_rows});
  if (checks.ok()) s->mask_words = (s->taps + 31) / 32;
  checks.operand("out_counts", out_counts, ffi::S32, {&s->segments});
  checks.operand("reverse", reverse, ffi::S32, {&s->taps, &s->in_rows});
  checks.operand("masks", masks, ffi::U32, {&s->in_rows, &s->mask_words});
  checks.require(s->taps >= 1 && s->taps <= kMaxTaps, "the kernel must have 1 to 65536 taps");
  check_segments(checks, s->out_rows, s->segments);
  return checks.error();
}

// --- 6 conv_forward, 7 conv_wgrad ---

struct Conv {
  ffi::DataType dtype = ffi::DataType::INVALID;  // of everything
  int tile_rows = 0;
  int64_t taps = kUnbound, in_rows = kUnbound, out_rows = kUnbound, in_channels = kUnbound, out_channels = kUnbound;
  int64_t segments = kUnbound, mask_words = kUnbound, workspace = kUnbound;
};

// What both convolutions share: the map, the dtype, the attributes.
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

// `groups` has the words of each group's mask, one group after the other.
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
  int64_t mask_words = kUnbound, workspace = kUnbound;
};

inline void check_gemm(Checks& checks, const Gemm& s) {
  checks.require(is_16_bit(s.dtype) || s.dtype == ffi::F32, "x must be float16, bfloat16 or float32");
  checks.require(s.out_dtype == s.dtype || s.out_dtype == ffi::F32, "the result must have the dtype of x, or float32");
  checks.require(s.taps >= 1 && s.taps <= kMaxTaps, "the kernel must have 1 to 65536 taps");
  checks.require(s.in_channels >= 4 && s.in_channels % 4 == 0, "input channels must be a multiple of 4");
  checks.require(s.out_channels >= 8 && s.out_channels % 8 == 0, "output channels must be a multiple of 8");
}

// `x_channels` is where those of x go: to in_channels, unless there is a second input.
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
  std::optional<In> given[6];  // in that order
};

// What follows the sums, and the second input. Bit i of `given` says whether the i-th operand is among the rest.
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
      checks.operand("residual", *operand, s->dtype, {&s->out_rows, &s->out_channels});
    } else if (i == 5) {
      second_channels = kUnbound;
      checks.operand("second", *operand, s->dtype, {&s->in_rows, &second_channels});
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

// Of one tap, under which each row lies by itself.
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
  int64_t taps = kUnbound, out_rows = kUnbound, segments = kUnbound, mask_words = kUnbound, workspace = kUnbound;
};

inline ffi::Error check_conv_pairs(In table, In masks, In out_counts, Out pairs, Out tap_pairs, Out workspace,
                                   ConvPairs* s) {
  Checks checks("jaxsparse_conv_pairs_v1");
  int64_t two = 2;
  checks.operand("table", table, ffi::S32, {&s->taps, &s->out_rows});
  if (checks.ok()) s->mask_words = (s->taps + 31) / 32;
  checks.operand("masks", masks, ffi::U32, {&s->out_rows, &s->mask_words});
  checks.operand("out_counts", out_counts, ffi::S32, {&s->segments});
  checks.operand("pairs", pairs, ffi::S32, {&s->taps, &s->out_rows, &two});
  checks.operand("tap_pairs", tap_pairs, ffi::S32, {&s->taps});
  checks.operand("workspace", workspace, ffi::U8, {&s->workspace});
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
  checks.operand("pairs", pairs, ffi::S32, {&s->taps, &s->out_rows, &two});
  checks.operand("tap_pairs", tap_pairs, ffi::S32, {&s->taps});
  checks.operand("dw", dw, s->out_dtype, {&s->taps, &s->in_channels, &s->out_channels});
  checks.operand("workspace", workspace, ffi::U8, {&s->workspace});
  check_gemm(checks, *s);
  checks.require(slots >= 2 * s->taps && slots <= kMaxSize, "slots must be at least twice the taps");
  return checks.error();
}

// --- 12 invert_index ---

struct InvertIndex {
  int64_t positions = kUnbound, values = 0, workspace = kUnbound;
};

inline ffi::Error check_invert_index(In index, Out order, Out offsets, Out workspace, InvertIndex* s) {
  Checks checks("jaxsparse_invert_index_v1");
  int64_t ends = kUnbound;
  checks.operand("index", index, ffi::S32, {&s->positions});
  checks.operand("order", order, ffi::S32, {&s->positions});
  checks.operand("offsets", offsets, ffi::S32, {&ends});
  checks.operand("workspace", workspace, ffi::U8, {&s->workspace});
  checks.require(ends >= 1, "offsets must have one entry more than there are values");
  s->values = ends - 1;
  return checks.error();
}

// --- 13 segment_sum ---

struct SegmentSum {
  ffi::DataType dtype = ffi::DataType::INVALID;
  int64_t positions = kUnbound, values = kUnbound, channels = kUnbound;
};

inline ffi::Error check_segment_sum(In x, In order, In offsets, Out y, SegmentSum* s) {
  Checks checks("jaxsparse_segment_sum_v1");
  int64_t ends = kUnbound;
  s->dtype = x.element_type();
  checks.operand("x", x, s->dtype, {&s->positions, &s->channels});
  checks.operand("order", order, ffi::S32, {&s->positions});
  checks.operand("y", y, s->dtype, {&s->values, &s->channels});
  if (checks.ok()) ends = s->values + 1;
  checks.operand("offsets", offsets, ffi::S32, {&ends});
  checks.require(is_feature_dtype(s->dtype), "x must be float16, bfloat16, float32 or float64");
  checks.require(s->channels >= 1, "x must have at least one channel");
  return checks.error();
}

// --- 14 channel_moments ---

struct Channels {
  ffi::DataType dtype = ffi::DataType::INVALID;
  int64_t rows = kUnbound, channels = kUnbound, workspace = kUnbound;
  std::optional<In> a, center;  // both or neither
};

inline ffi::Error check_channel_moments(In b, In count, Out first, Out second, Out workspace, ffi::RemainingArgs rest,
                                        Channels* s) {
  Checks checks("jaxsparse_channel_moments_v1");
  int64_t one = 1;
  s->dtype = b.element_type();
  const ffi::DataType sums = s->dtype == ffi::F64 ? ffi::F64 : ffi::F32;
  checks.operand("b", b, s->dtype, {&s->rows, &s->channels});
  checks.operand("count", count, ffi::S32, {&one});
  checks.operand("first", first, sums, {&s->channels});
  checks.operand("second", second, sums, {&s->channels});
  checks.operand("workspace", workspace, ffi::U8, {&s->workspace});
  checks.require(is_feature_dtype(s->dtype), "b must be float16, bfloat16, float32 or float64");
  checks.require(s->channels >= 1, "b must have at least one channel");
  checks.require(rest.size() == 0 || rest.size() == 2, "a and center must be given together");
  if (checks.ok() && rest.size() == 2) {
    s->a = rest.get<In>(0).value();
    s->center = rest.get<In>(1).value();
    checks.operand("a", *s->a, s->dtype, {&s->rows, &s->channels});
    checks.operand("center", *s->center, sums, {&s->channels});
  }
  return checks.error();
}

}  // namespace jaxsparse
