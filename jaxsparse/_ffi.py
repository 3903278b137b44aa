"""The XLA boundary: every custom call is registered and called here.

A target's name is an ABI, since exported models hold it: a change of operands, results, attributes or meaning takes a
new version suffix.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence

import jax
import jaxlib
import numpy as np

from jaxsparse import _native

TARGETS = (
    "jaxsparse_unique_sites_v1",
    "jaxsparse_coarse_sites_v1",
    "jaxsparse_site_index_v1",
    "jaxsparse_kernel_map_v1",
    "jaxsparse_reverse_table_v1",
    "jaxsparse_conv_forward_v1",
    "jaxsparse_conv_wgrad_v1",
    "jaxsparse_invert_index_v1",
    "jaxsparse_segment_sum_v1",
)
CUDA_TARGETS = (
    "jaxsparse_conv_schedule_v1",
    "jaxsparse_conv_gemm_v1",
    "jaxsparse_conv_fused_v1",
    "jaxsparse_linear_fused_v1",
    "jaxsparse_conv_pairs_v1",
    "jaxsparse_wgrad_gemm_v1",
    "jaxsparse_channel_moments_v1",
    "jaxsparse_batch_norm_v1",
    "jaxsparse_batch_norm_grad_v1",
)

Attribute = int | float | Sequence[int]

DISABLE_JAX_EXPORT_CHECKS = [jax.export.DisabledSafetyCheck.custom_call(name) for name in TARGETS + CUDA_TARGETS]
"""Pass as `jax.export.export(..., disabled_checks=jaxsparse.DISABLE_JAX_EXPORT_CHECKS)`: the names are kept stable."""

COMPILER_OPTIONS = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
"""Pass as `jax.jit(..., compiler_options=jaxsparse.COMPILER_OPTIONS)`.

In a CUDA graph, kernels that do not wait for each other's results then run side by side, such as the maps of coarse
sites and the first convolutions: 6 to 16 % less GPU time on an H200. Results keep their bits. It costs 1.2 to
2.5 times the memory, since what runs side by side cannot share buffers. Other platforms ignore it. `flax.nnx.jit` takes
no options: set `XLA_FLAGS=--xla_gpu_command_buffer_scheduling_mode=CONCURRENT` for it.
"""


def _runtime_ffi_version() -> tuple[int, int]:
    """The FFI API version of the installed jaxlib, read from the header that it ships."""
    header = pathlib.Path(jaxlib.__file__).parent / "include/xla/ffi/api/c_api.h"
    major, minor = re.findall(r"define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header.read_text())
    return int(major), int(minor)


def _check_versions() -> None:
    """Refuses a jaxlib older than the one built against.

    XLA answers a handler from newer headers with an error that stops the whole CPU backend from starting, so the check
    comes before the first registration.
    """
    built, runtime = _native.ffi_version(), _runtime_ffi_version()
    if built[0] != runtime[0] or built[1] > runtime[1]:
        raise ImportError(
            f"jaxsparse was built against jaxlib {_native.jaxlib_version()} (FFI API {built[0]}.{built[1]}), but "
            f"jaxlib {jaxlib.__version__} is installed (FFI API {runtime[0]}.{runtime[1]}); install jaxlib "
            f"{_native.jaxlib_version()} or newer, or rebuild jaxsparse against jaxlib {jaxlib.__version__}."
        )


def _register() -> None:
    for platform, handlers in (("cpu", _native.cpu_handlers()), ("CUDA", _native.cuda_handlers())):
        for name, handler in handlers.items():
            jax.ffi.register_ffi_target(name, handler, platform=platform)


_check_versions()
_register()


def call(
    target: str, results: Sequence[jax.ShapeDtypeStruct], *operands: jax.Array, **attributes: Attribute
) -> list[jax.Array]:
    """Calls a custom-call target. Attributes cross as 64-bit integers or floats, sequences as arrays of integers."""
    if target not in TARGETS + CUDA_TARGETS:
        raise ValueError(f"no custom-call target {target!r}; registered: {TARGETS + CUDA_TARGETS}")
    return list(jax.ffi.ffi_call(target, list(results))(*operands, **_encode(attributes)))


def _encode(attributes: Mapping[str, Attribute]) -> dict:
    def encoded(value: Attribute):
        if isinstance(value, float):
            return np.float64(value)
        return np.int64(value) if isinstance(value, int) else np.asarray(value, np.int64)

    return {name: encoded(value) for name, value in attributes.items()}
