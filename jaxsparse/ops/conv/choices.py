"""The decisions of a convolution as questions: what they depend on, what is built, what the cost model thinks.

The lowering answers them, the tuner times them, `explain` prints them: all ask here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from jaxsparse import _native
from jaxsparse.ops.conv.config import (
    FLOAT_TILES,
    FLOAT_WGRAD_TILES,
    FORWARD_TILES,
    NARROW_TILES,
    PLAIN_TILE_ROWS,
    WGRAD_TILES,
    Tile,
)
from jaxsparse.tuning import choice, cost
from jaxsparse.tuning.choice import Question
from jaxsparse.tuning.key import Key, row_bucket

MOST_NARROW = 28  # 16-bit input channels that are padded to a multiple of 4


def scheduled_widths(dtype, c_in: int, c_out: int) -> tuple[int, int]:
    """Channels as the kernels of `cuda/conv/gemm.h` take them, padded with zeros.

    Rows of x come in pieces of 16 bytes, or of 8 where channels are few. Measured on an H200, forward of 91,767 sites,
    float16, by pieces of 8 and of 16 bytes: 4 to 32 channels 8.9 and 8.4 us, 12 to 16 11.7 and 10.8, 20 to 24 13.3 and
    16.0, 36 to 40 45.5 and 19.9 (the former has no tile of 48 columns). Zeros for x are a pass of 4 to 8 us besides.
    """
    multiple = 4 if dtype.itemsize == 4 or c_in <= MOST_NARROW else 8
    return -(-c_in // multiple) * multiple, -(-c_out // 8) * 8


def built_tiles(op: str, dtype, c_in: int) -> tuple[Tile, ...]:
    """The tiles that the build has for an op, "conv" or "wgrad", and input channels as the kernel takes them."""
    is_float = dtype.itemsize == 4
    if op == "wgrad":
        return FLOAT_WGRAD_TILES if is_float else WGRAD_TILES
    return FLOAT_TILES if is_float else FORWARD_TILES if c_in % 8 == 0 else NARROW_TILES


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

    def widths(self, platform: str) -> tuple[int, int]:
        """Channels as the kernel takes them."""
        if self.spec.uses_gemm(platform):
            return scheduled_widths(self.spec.dtype, self.c_in, self.c_out)
        return self.c_in, self.c_out


def direction(spec, of_reverse: bool) -> str:
    """How a product goes over its map, see `Key`."""
    return "same" if spec.is_symmetric else "reverse" if of_reverse else "table"


def _map(p: Problem):
    """The map as the model sees it, from the neighbours a row, which may be None."""
    towards = direction(p.spec, p.of_reverse)
    ratio = p.rows / p.x_rows if towards == "reverse" else p.x_rows / p.rows
    expected = cost.expected_neighbours(p.taps, p.spec.strides, p.spec.grid, ratio, towards)
    return lambda neighbours: cost.Map(p.rows, p.taps, expected if neighbours is None else neighbours)


def _key(op: str, device: str, p: Problem, dtype: str = "", widths: tuple[int, int] = (0, 0)) -> Key:
    towards = direction(p.spec, p.of_reverse)
    return Key(op, device, dtype, *widths, p.taps, towards, p.spec.grid, row_bucket(p.rows))


def has_clusters(platform: str) -> bool:
    """Whether the device of this process runs tiles of several splits: of sm_90 or newer, and they were built for it.

    A program that is exported where there is no such device takes none: it may run on another.
    """
    capability = getattr(choice.device_here(platform), "compute_capability", "0.0")
    built = re.findall(r"(\d+)\d", _native.cuda_architectures or "")
    major = str(capability).split(".")[0]
    return int(major) >= 9 and major in built


def most_shared_bytes(platform: str) -> int:
    """Shared memory that a block can have on the device of this process; as on Hopper where there is none.

    From the table of compute capabilities in the CUDA programming guide.
    """
    capability = str(getattr(choice.device_here(platform), "compute_capability", "9.0"))
    if capability in ("8.6", "8.9") or capability.startswith("12."):
        return 99 * 1024
    return (163 if capability.startswith("8.") else 227) * 1024


def _that_run(platform: str, tiles: tuple[Tile, ...], shared_bytes: Callable[[Tile], int]) -> tuple[Tile, ...]:
    """The tiles that the device has the shared memory and the clusters for."""
    most, has = most_shared_bytes(platform), has_clusters(platform)
    return tuple(tile for tile in tiles if shared_bytes(tile) <= most and (tile.splits == 1 or has))


def _conv_tiles(platform: str, p: Problem, built: tuple[Tile, ...]) -> tuple[Tile, ...]:
    return _that_run(platform, built, lambda tile: cost.conv_shared_bytes(tile, p.taps))


def conv(platform: str, p: Problem) -> Question:
    """The tile of forward and dgrad, whose `rows` outputs read `x_rows` inputs; on the CPU the rows of a task."""
    device, is_here = choice.device_of(platform)
    at, dtype, widths = _map(p), p.spec.dtype_name(platform), p.widths(platform)
    key = _key("conv", device, p, dtype, widths)
    if platform == "cpu":
        predict = cost.cpu_conv_us
        return Question(
            key, platform, PLAIN_TILE_ROWS, lambda rows, n: predict(rows, at(n), *widths, dtype), is_here, p
        )
    sorts = bool(sort(platform, p).heuristic())
    tiles = _conv_tiles(platform, p, built_tiles("conv", p.spec.dtype, widths[0]))
    return Question(key, platform, tiles, lambda tile, n: cost.conv_us(tile, at(n), *widths, dtype, sorts), is_here, p)


def sort(platform: str, p: Problem) -> Question:
    """Whether a schedule sorts rows with like taps together: asked alike by all layers of one map and direction."""
    device, is_here = choice.device_of(platform)
    at, tiles = _map(p), _conv_tiles(platform, p, FORWARD_TILES)
    return Question(
        _key("sort", device, p),
        platform,
        (False, True),
        lambda sorts, n: cost.sort_us(sorts, at(n), direction(p.spec, p.of_reverse), p.spec.grid, tiles),
        is_here,
    )


def wgrad(platform: str, p: Problem) -> Question:
    """The tile of wgrad by the scheduled kernels."""
    device, is_here = choice.device_of(platform)
    at, dtype, widths = _map(p), p.spec.dtype_name(platform), p.widths(platform)
    return Question(
        _key("wgrad", device, p, dtype, widths),
        platform,
        _that_run(platform, built_tiles("wgrad", p.spec.dtype, widths[0]), cost.wgrad_shared_bytes),
        lambda tile, n: cost.wgrad_us(tile, at(n), *widths, dtype),
        is_here,
        p,
    )
