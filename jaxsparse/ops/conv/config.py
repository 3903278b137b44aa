"""How a convolution's kernels are chosen: numbers that travel as attributes of the custom calls."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from jaxsparse import _native


class Tile(NamedTuple):
    """What a block of a scheduled kernel computes.

    Attributes:
      rows: output rows (forward, dgrad) or input channels (wgrad).
      cols: output channels.
      stages: steps of operands in shared memory; all but one are on their way while one is multiplied.
      splits: blocks of a cluster that share the sum over input channels. More than 1 is for layers of few rows, on
        sm_90 alone.
    """

    rows: int
    cols: int
    stages: int
    splits: int = 1


FORWARD_TILES = tuple(Tile(*t) for t in _native.forward_tiles)
NARROW_TILES = tuple(Tile(*t) for t in _native.narrow_tiles)
WGRAD_TILES = tuple(Tile(*t) for t in _native.wgrad_tiles)
FLOAT_TILES = tuple(Tile(*t) for t in _native.float_tiles)
FLOAT_WGRAD_TILES = tuple(Tile(*t) for t in _native.float_wgrad_tiles)
PLAIN_TILE_ROWS = (32, 64, 128)


@dataclasses.dataclass(frozen=True)
class ConvConfig:
    """The choice of kernels for one convolution, forward and backward. It changes speed, and sums within rounding.

    The scheduled kernels of CUDA serve float16, bfloat16 and float32, with channels padded by zeros to multiples of 8
    (input channels: of 4 in float32, and in 16 bits up to 28); float64 has one kernel. What is None is chosen by
    `jaxsparse.tuning`: a tuning result, the cache, the table of the device, or the cost model. A 1x1 convolution is
    XLA's own product, with no kernel to choose, unless a norm, a residual or an activation follows in eval mode.

    Attributes:
      tile_rows: output rows that one task on the CPU computes: 32, 64 or 128.
      forward, dgrad, wgrad: tiles of the scheduled kernels, `(rows, cols, stages, splits)`, from `FORWARD_TILES`
        (`NARROW_TILES` where padded input channels are no multiple of 8) and `WGRAD_TILES`, in float32 `FLOAT_TILES`
        and `FLOAT_WGRAD_TILES`.
      sort: whether the scheduled kernels compute rows with like taps together.
    """

    tile_rows: int | None = None
    forward: Tile | None = None
    dgrad: Tile | None = None
    wgrad: Tile | None = None
    sort: bool | None = None

    @staticmethod
    def of(config: ConvConfig | None) -> ConvConfig:
        """The config, or the default where there is none; refuses what is no config."""
        if not isinstance(config, ConvConfig | None):
            raise TypeError(f"`config` (={config!r}) must be a jaxsparse.ops.ConvConfig.")
        return config or ConvConfig()

    def __post_init__(self):
        if self.tile_rows is not None and (type(self.tile_rows) is not int or self.tile_rows not in PLAIN_TILE_ROWS):
            raise ValueError(f"ConvConfig: `tile_rows` (={self.tile_rows}) must be 32, 64 or 128.")
        if self.sort not in (None, False, True):
            raise ValueError(f"ConvConfig: `sort` (={self.sort!r}) must be True, False or None.")
        rows = FORWARD_TILES + NARROW_TILES + FLOAT_TILES
        for name, tiles in {"forward": rows, "dgrad": rows, "wgrad": WGRAD_TILES + FLOAT_WGRAD_TILES}.items():
            tile = getattr(self, name)
            if tile is None:
                continue
            if tile not in tiles:
                raise ValueError(
                    f"ConvConfig: `{name}` (={tile!r}) is not built; take one of {list(map(tuple, tiles))}."
                )
            object.__setattr__(self, name, Tile(*tile))  # from a plain tuple too
