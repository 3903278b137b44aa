"""How a convolution's kernels are chosen: numbers that travel as attributes of the custom calls."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxsparse import _native


class Tile(NamedTuple):
    """What a block of a scheduled kernel computes.

    Attributes:
      rows: output rows (forward, dgrad) or input channels (wgrad).
      cols: output channels.
      stages: steps of operands in shared memory; all but one are on their way while one is multiplied.
    """

    rows: int
    cols: int
    stages: int


FORWARD_TILES = tuple(Tile(*t) for t in _native.forward_tiles)
NARROW_TILES = tuple(Tile(*t) for t in _native.narrow_tiles)
WGRAD_TILES = tuple(Tile(*t) for t in _native.wgrad_tiles)
FLOAT_TILES = tuple(Tile(*t) for t in _native.float_tiles)
FLOAT_WGRAD_TILES = tuple(Tile(*t) for t in _native.float_wgrad_tiles)


@dataclasses.dataclass(frozen=True)
class ConvConfig:
    """The choice of kernels for one convolution, forward and backward. It changes speed, and sums within rounding.

    The scheduled kernels of CUDA serve float16, bfloat16 and float32 with channels that are multiples of 8 (input:
    of 4); everything else runs on kernels for all dtypes and widths, on CPU and CUDA.

    Attributes:
      tile_rows: output rows that one block (CUDA) or task (CPU) of the kernels for everything computes: 32, 64 or 128.
      forward, dgrad, wgrad: tiles of the scheduled kernels, from `FORWARD_TILES` (`NARROW_TILES` where input channels
        are no multiple of 8) and `WGRAD_TILES`, in float32 `FLOAT_TILES` and `FLOAT_WGRAD_TILES`; None lets jaxsparse
        choose.
      sort: whether the scheduled kernels compute rows with like taps together; None lets jaxsparse choose.
    """

    tile_rows: int = 64
    forward: Tile | None = None
    dgrad: Tile | None = None
    wgrad: Tile | None = None
    sort: bool | None = None

    def __post_init__(self):
        if self.tile_rows not in (32, 64, 128):
            raise ValueError(f"ConvConfig: `tile_rows` (={self.tile_rows}) must be 32, 64 or 128.")
        rows = FORWARD_TILES + NARROW_TILES + FLOAT_TILES
        for name, tiles in {"forward": rows, "dgrad": rows, "wgrad": WGRAD_TILES + FLOAT_WGRAD_TILES}.items():
            tile = getattr(self, name)
            if tile is not None and tile not in tiles:
                raise ValueError(
                    f"ConvConfig: `{name}` (={tile!r}) is not built; take one of {list(map(tuple, tiles))}."
                )


MULTIPROCESSORS = 132  # of the GPU that the choices below were measured on


def forward_tile(rows: int, c_in: int, c_out: int, dtype) -> Tile:
    """The tile for so many output rows (capacity) and channels: the least columns computed in vain, then the widest.

    128 rows were the quickest at every size measured: 64 read the weights twice as often, 256 leave too few blocks. In
    float32 64 rows were, TF32 and exact: at half the rate of products, those that are computed in vain cost more.
    """
    is_float = dtype == np.float32
    built = FLOAT_TILES if is_float else FORWARD_TILES if c_in % 8 == 0 else NARROW_TILES
    tiles = [t for t in built if t.rows == (64 if is_float else 128)]
    computed = {t: -(-c_out // t.cols) * t.cols for t in tiles}
    blocks = {t: -(-rows // t.rows) * -(-c_out // t.cols) for t in tiles}

    def cost(t: Tile):
        # A deep ring takes the shared memory of two blocks: worth it where there are not two for each multiprocessor.
        deep = t.cols == 128 and t.stages == 4
        return computed[t], -t.cols, deep != (blocks[t] < 2 * MULTIPROCESSORS), -t.stages

    return min(tiles, key=cost)


def wgrad_tile(c_in: int, c_out: int, dtype) -> Tile:
    """The tile of wgrad: the least padding of the [c_in, c_out] result, then the largest."""

    def cost(t: Tile):
        return -(-c_in // t.rows) * t.rows * -(-c_out // t.cols) * t.cols, -t.rows * t.cols, abs(t.stages - 3)

    return min(FLOAT_WGRAD_TILES if dtype == np.float32 else WGRAD_TILES, key=cost)


def wgrad_slots(taps: int, c_in: int, c_out: int, tile: Tile) -> int:
    """Shares of the pairs: as many as make two blocks for each multiprocessor, and two for each tap."""
    pieces = -(-c_in // tile.rows) * -(-c_out // tile.cols)
    return max(2 * taps, 2 * MULTIPROCESSORS // pieces)


def sorts_rows(taps: int, of_reverse: bool) -> bool:
    """Whether sorting rows pays for itself: not for the few taps of a strided convolution's own map.

    A row of the reverse map of a strided convolution has a tap or two of all: unsorted, eight times the work.
    """
    return taps > 9 or of_reverse
