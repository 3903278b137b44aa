"""How a convolution's kernels are chosen: numbers that travel as attributes of the custom calls."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ConvConfig:
    """The choice of kernel for one convolution, forward and backward.

    Attributes:
      tile_rows: output rows that one block (CUDA) or task (CPU) computes: 32, 64 or 128. More rows share each weight
        that is read, fewer skip more absent taps.
    """

    tile_rows: int = 64

    def __post_init__(self):
        if self.tile_rows not in (32, 64, 128):
            raise ValueError(f"ConvConfig: `tile_rows` (={self.tile_rows}) must be 32, 64 or 128.")
