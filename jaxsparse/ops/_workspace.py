"""Sizes of the scratch memory that CUDA handlers use, in bytes, from shapes alone.

XLA allocates it as one more result of the call. The handler compares it with what it needs and refuses a smaller one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsparse.geometry import Geometry


def struct(platform: str, size: int) -> jax.ShapeDtypeStruct:
    """The workspace result of a call: nothing on the CPU, whose handlers use the heap."""
    return jax.ShapeDtypeStruct((size if platform == "cuda" else 1,), jnp.uint8)


def unique_sites(rows: int) -> int:
    return 0


def coarse_sites(rows: int, geometry: Geometry) -> int:
    return 0


def conv_wgrad(volume: int, c_in: int, c_out: int, out_rows: int) -> int:
    return 0


def invert_index(positions: int) -> int:
    return 0
