// The custom-call handlers of each platform, by name. bindings/module.cc passes them to Python, which registers them.
#pragma once

#include <utility>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace jaxsparse {

using Handlers = std::vector<std::pair<const char*, XLA_FFI_Handler*>>;

const Handlers& cpu_handlers();        // bindings/cpu_handlers.cc
const Handlers& cuda_handlers();       // bindings/cuda_handlers.cc, in builds with CUDA: all of them
const Handlers& cuda_only_handlers();  // bindings/cuda_only_handlers.cc: those that the CPU has not

}  // namespace jaxsparse
