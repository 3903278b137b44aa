// Checks of the calls for rows of features, see checks.h.
#pragma once

#include <optional>

#include "bindings/checks.h"

namespace jaxsparse {

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
  std::optional<In> a, center, gate_scale, gate_shift;  // none, the first two, or all four
  std::optional<In> residual;
  ffi::DataType vectors = ffi::DataType::INVALID;  // of scale, bias and their gradients

  ffi::DataType sums() const { return dtype == ffi::F64 ? ffi::F64 : ffi::F32; }
};

inline void check_channels(Checks* checks, const char* name, In x, In count, Out workspace, Channels* s) {
  int64_t one = 1;
  s->dtype = x.element_type();
  checks->operand(name, x, s->dtype, {&s->rows, &s->channels});
  checks->operand("count", count, ffi::S32, {&one});
  checks->operand("workspace", workspace, ffi::U8, {&s->workspace});
  checks->require(is_feature_dtype(s->dtype), "features must be float16, bfloat16, float32 or float64");
  checks->require(s->channels >= 1, "features must have at least one channel");
}

inline ffi::Error check_channel_moments(In b, In count, Out first, Out second, Out workspace, ffi::RemainingArgs rest,
                                        Channels* s) {
  Checks checks("jaxsparse_channel_moments_v1");
  check_channels(&checks, "b", b, count, workspace, s);
  const ffi::DataType sums = s->sums();
  checks.operand("first", first, sums, {&s->channels});
  checks.operand("second", second, sums, {&s->channels});
  checks.require(rest.size() == 0 || rest.size() == 2 || rest.size() == 4,
                 "a and center must be given together, and gate_scale and gate_shift with them");
  if (checks.ok() && rest.size() >= 2) {
    s->a = rest.get<In>(0).value();
    s->center = rest.get<In>(1).value();
    checks.operand("a", *s->a, s->dtype, {&s->rows, &s->channels});
    checks.operand("center", *s->center, sums, {&s->channels});
  }
  if (checks.ok() && rest.size() == 4) {
    s->gate_scale = rest.get<In>(2).value();
    s->gate_shift = rest.get<In>(3).value();
    checks.operand("gate_scale", *s->gate_scale, sums, {&s->channels});
    checks.operand("gate_shift", *s->gate_shift, sums, {&s->channels});
  }
  return checks.error();
}

// --- 15 batch_norm ---

inline ffi::Error check_batch_norm(In x, In count, In scale, In bias, Out y, Out mean, Out variance, Out inverse,
                                   Out factor, Out shift, Out workspace, ffi::RemainingArgs rest, Channels* s) {
  Checks checks("jaxsparse_batch_norm_v1");
  check_channels(&checks, "x", x, count, workspace, s);
  s->vectors = scale.element_type();
  checks.operand("scale", scale, s->vectors, {&s->channels});
  checks.operand("bias", bias, s->vectors, {&s->channels});
  checks.operand("y", y, s->dtype, {&s->rows, &s->channels});
  const std::pair<const char*, Out> vectors[] = {
      {"mean", mean}, {"variance", variance}, {"inverse", inverse}, {"factor", factor}, {"shift", shift}};
  for (const auto& [name, vector] : vectors) checks.operand(name, vector, s->sums(), {&s->channels});
  checks.require(is_feature_dtype(s->vectors), "scale and bias must be float16, bfloat16, float32 or float64");
  checks.require(rest.size() <= 1, "after bias there is room for a residual alone");
  if (checks.ok() && rest.size() == 1) {
    s->residual = rest.get<In>(0).value();
    checks.operand("residual", *s->residual, s->dtype, {&s->rows, &s->channels});
  }
  return checks.error();
}

// --- 16 batch_norm_grad ---

inline ffi::Error check_batch_norm_grad(In ct, In x, In mean, In inverse, In factor, In shift, In count, Out x_ct,
                                        Out scale_ct, Out bias_ct, Out workspace, Channels* s) {
  Checks checks("jaxsparse_batch_norm_grad_v1");
  check_channels(&checks, "x", x, count, workspace, s);
  checks.operand("ct", ct, s->dtype, {&s->rows, &s->channels});
  const std::pair<const char*, In> vectors[] = {
      {"mean", mean}, {"inverse", inverse}, {"factor", factor}, {"shift", shift}};
  for (const auto& [name, vector] : vectors) checks.operand(name, vector, s->sums(), {&s->channels});
  checks.operand("x_ct", x_ct, s->dtype, {&s->rows, &s->channels});
  s->vectors = scale_ct->element_type();
  checks.operand("scale_ct", scale_ct, s->vectors, {&s->channels});
  checks.operand("bias_ct", bias_ct, s->vectors, {&s->channels});
  checks.require(is_feature_dtype(s->vectors), "scale_ct and bias_ct must be float16, bfloat16, float32 or float64");
  return checks.error();
}

}  // namespace jaxsparse
