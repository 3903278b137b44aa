"""Sizes of the scratch memory that CUDA handlers use, in bytes, from shapes alone.

XLA allocates it as one more result of the call, so its size must be known when tracing, on machines without CUDA too.
Each formula has a twin in `cuda/`, named beside it; the handler refuses a workspace that is too small.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsparse.geometry import Geometry


def struct(platform: str, size: int) -> jax.ShapeDtypeStruct:
    """The workspace result of a call: a byte on the CPU, whose handlers use the heap."""
    return jax.ShapeDtypeStruct((size if platform == "cuda" else 1,), jnp.uint8)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _padded(size: int) -> int:
    return _ceil_div(size, 256) * 256


def _sort(keys: int) -> int:
    """`sort_workspace` in cuda/sort/workspace.h."""
    return 2 * _padded(8 * keys) + 2 * _padded(4 * keys) + 4 * 8 * 16 * 512 + 4 * 512 * (keys // 4096 + 1)


def _tree(entries: int) -> int:
    """`tree_workspace` in cuda/coords/tree.h."""
    return 12 * 2**16 + 3 * _padded(8 * entries) + 3 * _padded(4 * entries) + 9 * 4 * 512


def unique_sites(points: int) -> int:
    """`unique_sites_workspace` in cuda/coords/unique_sites.h."""
    return _sort(points) + 16 * 512 + 4 * 8 * 512


def coarse_sites(rows: int, geometry: Geometry) -> int:
    """`coarse_sites_workspace` in cuda/coords/coarse_sites.h, of every coarse site that a fine row can reach."""
    candidates = rows * geometry.coarse_per_site()
    return _padded(16 * candidates) + _padded(8 * candidates) + _tree(candidates) + 4 * 5 * 256 + 2 * _padded(4)


def site_index(rows: int) -> int:
    """`site_index_bytes` in bindings/checks_coords.h; the index is a result of its own, on every platform."""
    return 32 * max(2, 1 << (2 * rows - 1).bit_length())


def conv_wgrad(volume: int, c_in: int, c_out: int, out_rows: int) -> int:
    """`conv_wgrad_workspace` in cuda/conv/conv.h."""
    slots = max(2 * volume, min(2048, 2**22 // (c_in * c_out)))
    pairs = _padded(8 * volume * out_rows) + _padded(4 * volume) + conv_pairs(volume, out_rows)
    return pairs + 8 * slots * c_in * c_out


def conv_schedule(rows: int) -> int:
    """`schedule_workspace` in cuda/conv/schedule.h."""
    return _padded(4 * 16 * 513) + _padded(2 * rows)


def conv_pairs(listed: int, out_rows: int) -> int:
    """`pairs_workspace` in cuda/conv/pairs.h."""
    counts = 4 * 32 * -(-listed // 32)
    return _padded(counts * 64) + _padded(counts * -(-out_rows // 32))


def wgrad_gemm(slots: int, c_in: int, c_out: int) -> int:
    """`wgrad_gemm_workspace` in cuda/conv/gemm.h."""
    return 4 * slots * c_in * c_out


def invert_index(positions: int) -> int:
    """`invert_index_workspace` in cuda/rows/rows.h."""
    return _sort(positions)


def channels(channels: int, sum_bytes: int) -> int:
    """`channels_workspace` in cuda/channels/channels.h; sums take `sum_bytes` each, 4 or 8."""
    return 2 * max(1, 132 // _ceil_div(channels, 64)) * channels * sum_bytes
