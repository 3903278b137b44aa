// Turns a run-time number of dimensions into a compile-time constant.
#pragma once

#include <type_traits>

namespace jaxsparse::cpu {

// Calls f(std::integral_constant<int, D>), D = 1 .. 4.
template <typename F>
void for_dims(int dims, F&& f) {
  switch (dims) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    default: return f(std::integral_constant<int, 4>{});
  }
}

}  // namespace jaxsparse::cpu
