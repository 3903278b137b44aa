"""Counts over one kernel map: neighbours, taps, fill cost, distinct input rows, bytes. numpy in, numbers out.

Every function takes arrays of the real rows alone, `table[:, :count]` and `masks[:count]` of a `KernelMap`. A row
order is a permutation of the output rows: tile i holds the rows `order[i * tile : (i + 1) * tile]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FILL_TILES = (16, 32, 64, 128)  # rows for which a tap is skipped together: a warp's, up to a block's
READ_TILES = (64, 128, 256)  # rows whose inputs a block could keep in shared memory
WINDOWS = (256, 4096)  # rows within which sorting by tap mask keeps neighbours together


@dataclass(frozen=True)
class Statistics:
    """What is known of one level.

    Attributes:
      sites: rows of the level, N.
      pairs: (output site, tap) pairs with an input: the useful row-tap products of a convolution.
      tap_share: share of the sites at which each tap is present, in the shape of the kernel.
      fill_cost: by row order, then by tile size.
      distinct_rows: by row order, then by tile size.
      table_bytes, mask_bytes: of a map with exactly N rows.
    """

    sites: int
    pairs: int
    tap_share: np.ndarray
    fill_cost: dict[str, dict[int, float]]
    distinct_rows: dict[str, dict[int, float]]
    table_bytes: int
    mask_bytes: int

    @property
    def neighbours(self) -> float:
        """Mean number of taps present at a site, its own included."""
        return self.pairs / self.sites


def measure(
    table: np.ndarray, masks: np.ndarray, kernel: Sequence[int], orders: Mapping[str, np.ndarray] | None = None
) -> Statistics:
    """Counts everything for one level, whose rows are in Morton order, the library's.

    Tiles are cut from that order, from rows sorted by tap mask in windows of it, and from rows sorted over everything.

    Args:
      table: int32 `[K, N]`, the input row under each tap, negative where there is none.
      masks: uint32 `[N, ceil(K / 32)]`, the same as bits.
      kernel: taps an axis; their product is K.
      orders: more row orders by name, each a permutation `[N]`; they come first.
    """
    rows = len(masks)
    orders = dict(orders or {}) | {"Morton order": np.arange(rows)}
    orders |= {f"sorted in windows of {window:,}": mask_order(masks, window) for window in WINDOWS}
    orders |= {"sorted over everything": mask_order(masks, rows)}
    return Statistics(
        sites=rows,
        pairs=int(np.bitwise_count(masks).sum(dtype=np.int64)),
        tap_share=(table >= 0).mean(1).reshape(kernel),
        fill_cost={name: {t: fill_cost(masks, order, t) for t in FILL_TILES} for name, order in orders.items()},
        distinct_rows={name: {t: distinct_rows(table, order, t) for t in READ_TILES} for name, order in orders.items()},
        table_bytes=table.size * table.itemsize,
        mask_bytes=masks.size * masks.itemsize,
    )


def mask_order(masks: np.ndarray, window: int) -> np.ndarray:
    """The row order `[N]` that sorts each `window` rows by tap mask, an integer of 32 bits a word, largest first.

    Rows with equal masks keep their order.
    """
    descending = ~masks.T  # lowest word first: lexsort's last key counts most
    return np.lexsort([*descending, np.arange(len(masks)) // window])


def fill_cost(masks: np.ndarray, order: np.ndarray, tile: int) -> float:
    """Executed over useful row-tap products when a tap is skipped for `tile` rows at a time.

    All rows of a tile execute every tap that any of them has. The last tile counts with the rows that it has.
    """
    starts = np.arange(0, len(order), tile)
    rows = np.diff(starts, append=len(order))
    taps = np.bitwise_count(np.bitwise_or.reduceat(masks[order], starts, axis=0)).sum(1, dtype=np.int64)
    return float((rows * taps).sum() / np.bitwise_count(masks).sum(dtype=np.int64))


def distinct_rows(table: np.ndarray, order: np.ndarray, tile: int) -> float:
    """Mean number of distinct input rows that the outputs of one tile read.

    Whole tiles only, unless there is none.
    """
    tiles = max(len(order) // tile, 1)
    rows = table[:, order[: tiles * tile]]
    tap, position = np.nonzero(rows >= 0)
    reads = position // tile * (rows.max() + np.int64(1)) + rows[tap, position]  # (tile, input row) as one integer
    reads.sort()  # np.unique would hash, which takes three times as long
    return float(np.count_nonzero(np.diff(reads, prepend=-1)) / tiles)
