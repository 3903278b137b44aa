"""The decisions of a convolution as questions: what they depend on, what is built, what the cost model thinks.

The lowering answers them, the tuner times them, `explain` prints them: all ask here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxsparse.ops.conv.config import (
    FLOAT_TILES,
    FLOAT_WGRAD_TILES,
    FORWARD_TILES,
    NARROW_TILES,
    PLAIN_TILE_ROWS,
    WGRAD_TILES,
)
from jaxsparse.tuning import choice, cost
from jaxsparse.tuning.choice import Question
from jaxsparse.tuning.key import Key, row_bucket


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product of one layer as its lowering sees it: sizes, and whether it goes over the reversed map."""

    spec: Any
    x_rows: int
    rows: int
    taps: int
    c_in: int
    c_out: int
    of_reverse: bool = False


def direction(spec, of_reverse: bool) -> str:
    """How a product goes over its map, see `Key`."""
    return "same" if spec.is_symmetric else "reverse" if of_reverse else "table"


def _is_float(p: Problem) -> bool:
    return p.spec.dtype.itemsize == 4


def _map(p: Problem):
    """The map as the model sees it, from the neighbours a row, which may be None."""
    towards = direction(p.spec, p.of_reverse)
    ratio = p.rows / p.x_rows if towards == "reverse" else p.x_rows / p.rows
    expected = cost.expected_neighbours(p.taps, p.spec.strides, p.spec.grid, ratio, towards)
    return lambda neighbours: cost.Map(p.rows, p.taps, expected if neighbours is None else neighbours)


def _key(op: str, device: str, p: Problem, dtype: str, channels: bool) -> Key:
    c_in, c_out = (p.c_in, p.c_out) if channels else (0, 0)
    towards = direction(p.spec, p.of_reverse)
    return Key(op, device, dtype, c_in, c_out, p.taps, towards, p.spec.grid, row_bucket(p.rows))


def conv(platform: str, p: Problem) -> Question:
    """The tile of forward and dgrad, whose `rows` outputs read `x_rows` inputs."""
    device, is_here = choice.device_of(platform)
    dtype = p.spec.dtype_name(platform)
    key = _key("conv", device, p, dtype, channels=True)
    at = _map(p)
    if p.spec.uses_gemm(platform, p.c_in, p.c_out):
        sorts = bool(sort(platform, p).heuristic())
        tiles: tuple = FLOAT_TILES if _is_float(p) else FORWARD_TILES if p.c_in % 8 == 0 else NARROW_TILES
        return Question(
            key, tiles, lambda tile, n: cost.conv_us(tile, at(n), p.c_in, p.c_out, dtype, sorts), is_here, p
        )
    predict = cost.cpu_conv_us if platform == "cpu" else cost.plain_conv_us
    return Question(
        key, PLAIN_TILE_ROWS, lambda tile_rows, n: predict(tile_rows, at(n), p.c_in, p.c_out, dtype), is_here, p
    )


def sort(platform: str, p: Problem) -> Question:
    """Whether a schedule sorts rows with like taps together: asked alike by all layers of one map and direction."""
    device, is_here = choice.device_of(platform)
    at = _map(p)
    return Question(
        _key("sort", device, p, "", channels=False),
        (False, True),
        lambda sorts, n: cost.sort_us(sorts, at(n), direction(p.spec, p.of_reverse), p.spec.grid, FORWARD_TILES),
        is_here,
    )


def wgrad(platform: str, p: Problem) -> Question:
    """The tile of wgrad by the scheduled kernels."""
    device, is_here = choice.device_of(platform)
    at, dtype = _map(p), p.spec.dtype_name(platform)
    return Question(
        _key("wgrad", device, p, dtype, channels=True),
        FLOAT_WGRAD_TILES if _is_float(p) else WGRAD_TILES,
        lambda tile, n: cost.wgrad_us(tile, at(n), p.c_in, p.c_out, dtype),
        is_here,
        p,
    )
