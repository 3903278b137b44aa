// Checks of dtypes, shapes, alignment and attributes that every handler runs before it reads a buffer, shared by CPU and CUDA.
//
// Each custom call has a struct for its sizes and decoded attributes. `check_<call>` fills it, or returns an error with the
// call, what is wrong, and the shapes of all operands. Sizes bind by name: the first operand with a size sets it, all later
// ones must agree. After a check, typed_data of the stated dtype is safe.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jaxsparse {

namespace ffi = xla::ffi;

using Axes = ffi::Span<const int64_t>;  // a per-axis attribute
using In = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

constexpr int64_t kUnbound = -1;
constexpr int64_t kMaxTaps = 65536;
constexpr uintptr_t kAlignment = 16;  // bytes that a kernel moves at once
constexpr int64_t kMaxSize = int64_t{1} << 30;  // of any axis, except of uint8 buffers: rows are numbered in int32
constexpr int64_t kMaxAxisAttr = int64_t{1} << 30;  // its product with a 32-bit coordinate cannot overflow int64

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

// Keeps the first failure; builds strings only if there is one.
class Checks {
 public:
  explicit Checks(const char* call) : call_(call) { operands_.reserve(10); }

  void operand(const char* name, In buffer, ffi::DataType dtype, std::initializer_list<int64_t*> sizes) {
    operands_.emplace_back(name, buffer);
    if (!ok()) return;
    if (reinterpret_cast<uintptr_t>(buffer.untyped_data()) % kAlignment != 0) {
      return fail(std::string(name) + " must begin at a multiple of 16 bytes (on GPUs XLA passes a slice of an array as it "
                  "lies; slice at such a multiple, or take jax.lax.optimization_barrier of the slice, which copies it)");
    }
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

inline void check_segments(Checks& checks, int64_t rows, int64_t segments) {
  checks.require(segments >= 1 && rows % segments == 0, "the rows must divide into as many equal segments as counts");
}

}  // namespace jaxsparse
