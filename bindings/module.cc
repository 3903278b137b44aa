// The Python module jaxsparse._native: the custom-call handlers as capsules, and versions and tiles of this build.
#include <pybind11/pybind11.h>

#include "bindings/handlers.h"
#include "cuda/conv/tiles.h"

#ifdef JAXSPARSE_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace {

py::dict capsules(const jaxsparse::Handlers& handlers) {
  py::dict out;
  for (const auto& [name, handler] : handlers) out[name] = py::capsule(reinterpret_cast<void*>(handler));
  return out;
}

template <int kNumber>
py::list as_tuples(const jaxsparse::cuda::Tile (&tiles)[kNumber]) {
  py::list out;
  for (const auto& tile : tiles) out.append(py::make_tuple(tile.rows, tile.cols, tile.stages, tile.splits));
  return out;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Custom-call handlers of jaxsparse; jaxsparse._ffi registers them.";
  m.def("ffi_version", [] { return py::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
        "XLA FFI API version of the headers that this module was built with.");
  m.def("jaxlib_version", [] { return JAXSPARSE_JAXLIB_VERSION; }, "The jaxlib whose headers were used.");
  m.attr("schedule_rows") = jaxsparse::cuda::kScheduleRows;
  m.attr("most_group_words") = jaxsparse::cuda::kMostGroupWords;
  m.attr("forward_tiles") = as_tuples(jaxsparse::cuda::kForwardTiles);
  m.attr("narrow_tiles") = as_tuples(jaxsparse::cuda::kNarrowTiles);
  m.attr("wgrad_tiles") = as_tuples(jaxsparse::cuda::kWgradTiles);
  m.attr("float_tiles") = as_tuples(jaxsparse::cuda::kFloatTiles);
  m.attr("float_wgrad_tiles") = as_tuples(jaxsparse::cuda::kFloatWgradTiles);
  m.def("cpu_handlers", [] { return capsules(jaxsparse::cpu_handlers()); });
#ifdef JAXSPARSE_WITH_CUDA
  m.def("cuda_handlers", [] { return capsules(jaxsparse::cuda_handlers()); });
  m.attr("cuda_version") = CUDART_VERSION;
  m.attr("cuda_architectures") = JAXSPARSE_CUDA_ARCHITECTURES;
#else
  m.def("cuda_handlers", [] { return py::dict(); });
  m.attr("cuda_version") = py::none();
  m.attr("cuda_architectures") = py::none();
#endif
}
