"""Settings of the whole suite: four CPU devices, strict promotion, and what several test files share."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile

# Before jax starts. On a machine with a GPU the suite runs there; JAX_PLATFORMS=cpu keeps it off.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="jaxsparse-cache-")  # not what the user tuned

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

settings.register_profile("default", deadline=None, max_examples=15, derandomize=True)
settings.load_profile("default")

SCANS = pathlib.Path(os.environ.get("JAXSPARSE_SCANS", pathlib.Path(__file__).parents[1] / "scans"))


@pytest.fixture
def x64():
    """float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def cuda_library(tmp_path_factory):
    """Compiles the CUDA kernels for the host, once a process."""
    import cuda_on_host

    cuda_on_host.load(tmp_path_factory.mktemp("cuda_on_host"))


@pytest.fixture
def real_scan():
    """Loads one of the real scans by name, or skips where they are absent."""

    def load(name: str):
        import numpy as np

        path = SCANS / f"{name}.npz"
        if not path.exists():
            pytest.skip(
                f"the scan {path.name} is not on this machine (set JAXSPARSE_SCANS to the folder that holds it)"
            )
        return np.load(path)

    return load


@contextlib.contextmanager
def raises(error: type[Exception], *parts: str):
    """Expects an error whose message holds each of the parts: argument, value, remedy."""
    with pytest.raises(error) as info:
        yield
    for part in parts:
        assert part in str(info.value), f"{part!r} is missing in: {info.value}"
