"""Runs the CUDA kernels' own source on the CPU, behind the same handlers; where there is a GPU, the kernels themselves.

`load` compiles `cuda/**/*.cu` and `bindings/cuda_*handlers.cc` with the C++ compiler and the headers in `include/`, and
registers each handler as a CPU target named `<target>_on_host`.
"""

import contextlib
import ctypes
import pathlib
import shutil
import subprocess

import jax
import numpy as np
import pytest

from jaxsparse import _ffi
from jaxsparse._keys import real_rows

_HERE = pathlib.Path(__file__).parent
_ROOT = _HERE.parents[1]


def compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++")


def build(folder: pathlib.Path) -> pathlib.Path:
    """Compiles the kernels and handlers; returns the shared library."""
    flags = ["-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas"]
    flags += [f"-I{_HERE / 'include'}", f"-I{_ROOT}"]
    flags += ["-isystem", jax.ffi.include_dir(), "-x", "c++"]
    sources = [*sorted((_ROOT / "cuda").rglob("*.cu")), _HERE / "handlers_on_host.cc"]
    objects = []
    for source in sources:
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([compiler(), *flags, "-c", str(source), "-o", str(objects[-1])], check=True)
    library = folder / "libcuda_on_host.so"
    subprocess.run([compiler(), "-shared", *map(str, objects), "-o", str(library), "-lpthread"], check=True)
    return library


_libraries: list[ctypes.CDLL] = []


def is_gpu() -> bool:
    return jax.default_backend() == "gpu"


def load(folder: pathlib.Path) -> None:
    """Builds the library and registers its handlers, once a process; on a GPU there is nothing to do."""
    if _libraries or is_gpu():
        return
    library = ctypes.CDLL(str(build(folder)))
    library.handler_name.restype = ctypes.c_char_p
    library.handler_function.restype = ctypes.c_void_p
    for i in range(library.handler_count()):
        name = library.handler_name(i).decode() + "_on_host"
        function = ctypes.CFUNCTYPE(ctypes.c_void_p)(library.handler_function(i))
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
    _libraries.append(library)


@contextlib.contextmanager
def no_clusters():
    """On the host, as on a device without clusters."""
    if is_gpu():
        pytest.skip("a GPU has clusters or has none")
    _libraries[0].have_clusters(0)
    try:
        yield
    finally:
        _libraries[0].have_clusters(1)


def _taps_of(masks, volume):
    """Whether each tap's bit is set, [tiles, volume, 1]."""
    k = np.arange(volume)
    return (masks[:, k // 32] >> (k % 32).astype(np.uint32) & 1 != 0)[:, :, None]


def _listed(pairs, number):
    """Whether each place of a listed tap has a pair, [listed, rows, 1]."""
    return (np.arange(pairs.shape[1]) < number[: len(pairs), None])[:, :, None]


def call(target: str, results, *operands, **attrs) -> list[np.ndarray]:
    """Calls `jaxsparse_<target>_v1`; `results` are (shape, dtype) pairs.

    Runs it twice, on the host with threads and blocks in one order and in the reverse, and asserts that the results are
    the same bits: a race, or a result that depends on an order CUDA does not promise, fails here. Exempt are workspaces
    and site indices, columns of a kernel map past the outputs, entries of a reversed map or a schedule under taps that
    a row or a tile lacks, a tap's pairs past their number, and padding rows of a convolution with an epilogue, which
    hold anything: the callers compare the others; those rows are returned as 0.
    """
    types = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    attrs = _ffi._encode(attrs)
    name = f"jaxsparse_{target}_v1" + ("" if is_gpu() else "_on_host")
    run = jax.jit(lambda *args: jax.ffi.ffi_call(name, types)(*args, **attrs))
    outs = []
    for backwards in (1, 0):
        if not is_gpu():
            _libraries[0].run_backwards(backwards)
        outs.append([np.asarray(v) for v in run(*operands)])
    if target == "kernel_map":
        count = int(operands[3][0])
        outs = [[table[:, :count], masks[:count]] for table, masks in outs]
    if target == "reverse_table":
        outs = [[np.where(_taps_of(masks, len(table))[:, :, 0].T, table, -1), masks] for table, masks in outs]
    if target == "conv_schedule":
        outs = [[order, masks, np.where(_taps_of(masks, table.shape[1]), table, -1)] for order, masks, table, _ in outs]
    if target in ("conv_fused", "linear_fused"):
        counts = operands[2 if target == "linear_fused" else 5]
        outs = [[np.where(real_rows(counts, len(y))[:, None], y, y.dtype.type(0))] for (y,) in outs]
    if target == "conv_pairs":
        outs = [[np.where(_listed(pairs, number), pairs, -1), number, rest] for pairs, number, rest in outs]
    for one, other in zip(*outs, strict=True):
        assert one.dtype == np.uint8 or one.tobytes() == other.tobytes(), f"{target} depends on the order of threads"
    return outs[1]
