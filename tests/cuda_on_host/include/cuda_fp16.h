// 16-bit floats: storage, and conversion that rounds to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline uint32_t float_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31;
  const int mantissa = h.bits & 1023;
  const float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return h.bits >> 15 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float v) {
  const uint16_t sign = static_cast<uint16_t>(float_bits(v) >> 31 << 15);
  if (std::isnan(v)) return {static_cast<uint16_t>(sign | 0x7e00)};
  const float magnitude = std::fabs(v);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  const int exponent = std::max(magnitude > 0 ? std::ilogb(magnitude) : -14, -14);  // -14: the subnormal spacing
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));  // 1024 .. 2048 if normal
  return {static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + units))};
}

inline float __bfloat162float(__nv_bfloat16 v) { return bits_float(static_cast<uint32_t>(v.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  if (std::isnan(v)) return {0x7fff};
  const uint32_t bits = float_bits(v);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
