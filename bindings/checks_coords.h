// Checks of the calls for sites and kernel maps, see checks.h.
#pragma once

#include <string>

#include "bindings/checks.h"
#include "cuda/coords/key.h"
#include "cuda/coords/window.h"

namespace jaxsparse {

inline void check_dims(Checks& checks, int64_t columns, int* dims) {
  checks.require(columns >= 2 && columns <= 1 + kMaxDims, "coords must have 2 to 5 columns, batch first");
  *dims = static_cast<int>(columns - 1);
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

// Bytes of an index of sites. Slots of hash maps have at most 32 bytes, on CPU and CUDA; of blocks, on CUDA, a row has 16 and
// at most 4 slots of 4.
inline int64_t site_index_bytes(int64_t rows) { return 32 * hash_slots(rows); }

struct CoarseSites {
  Geometry geometry{};
  bool bounded = false;
  int64_t bounds[kMaxDims] = {};
  bool makes_index = false;
  int64_t rows = kUnbound, capacity = kUnbound, workspace = kUnbound;
};

inline ffi::Error check_coarse_sites(In coords, In count, Out sites, Out kept, Out found, Out outside, Out index,
                                     Out workspace, Axes kernel, Axes stride, Axes padding, Axes dilation, Axes bounds,
                                     CoarseSites* s) {
  Checks checks("jaxsparse_coarse_sites_v1");
  int64_t one = 1, columns = kUnbound;
  int dims = 0;
  checks.operand("coords", coords, ffi::S32, {&s->rows, &columns});
  checks.operand("count", count, ffi::S32, {&one});
  checks.require(s->rows >= 1, "coords must have at least one row");
  checks.operand("sites", sites, ffi::S32, {&s->capacity, &columns});
  checks.operand("kept", kept, ffi::S32, {&one});
  checks.operand("found", found, ffi::S32, {&one});
  checks.operand("outside", outside, ffi::S32, {&one});
  int64_t index_bytes = kUnbound;
  checks.operand("index", index, ffi::U8, {&index_bytes});
  checks.operand("workspace", workspace, ffi::U8, {&s->workspace});
  check_dims(checks, columns, &dims);
  if (!checks.ok()) return checks.error();
  s->makes_index = index_bytes > 1;
  checks.require(!s->makes_index || index_bytes >= site_index_bytes(s->capacity),
                 "index must have 1 byte, or 32 for each of two slots a row of sites");
  s->geometry = decode_geometry(checks, dims, kernel, stride, padding, dilation);
  s->bounded = bounds.size() != 0;
  checks.require(!s->bounded || bounds.size() == static_cast<size_t>(dims),
                 "bounds must be empty or have one entry an axis");
  for (int a = 0; s->bounded && checks.ok() && a < dims; ++a) s->bounds[a] = bounds[a];
  return checks.error();
}

// --- 3 site_index ---

struct SiteIndex {
  int dims = 0;
  int64_t rows = kUnbound, bytes = kUnbound;
};

inline ffi::Error check_site_index(In coords, In count, Out index, SiteIndex* s) {
  Checks checks("jaxsparse_site_index_v1");
  int64_t one = 1, columns = kUnbound;
  checks.operand("coords", coords, ffi::S32, {&s->rows, &columns});
  checks.operand("count", count, ffi::S32, {&one});
  checks.require(s->rows >= 1, "coords must have at least one row");
  checks.operand("index", index, ffi::U8, {&s->bytes});
  check_dims(checks, columns, &s->dims);
  checks.require(s->bytes >= site_index_bytes(s->rows), "index must have 32 bytes for each of two slots a row");
  return checks.error();
}

// --- 4 kernel_map ---

struct BuildKernelMap {
  Geometry geometry{};
  MapBuilder builder = MapBuilder::kHash;
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
  checks.require(s->in_rows >= 1 && s->out_rows >= 1, "in_coords and out_coords must have at least one row");
  check_dims(checks, columns, &dims);
  if (checks.ok()) s->geometry = decode_geometry(checks, dims, kernel, stride, padding, dilation);
  if (checks.ok()) {
    s->taps = s->geometry.volume();
    s->mask_words = (s->taps + 31) / 32;
  }
  checks.operand("table", table, ffi::S32, {&s->taps, &s->out_rows});
  checks.operand("masks", masks, ffi::U32, {&s->out_rows, &s->mask_words});
  if (!checks.ok()) return checks.error();
  checks.require(builder == 0 || builder == 1, "builder must be 0 (hash) or 1 (blocks)");
  s->builder = static_cast<MapBuilder>(builder);
  checks.require(s->builder != MapBuilder::kBlocks || blocks_can_serve(s->geometry),
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

}  // namespace jaxsparse
