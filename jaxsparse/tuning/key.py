"""What a choice of kernels depends on, and immutable collections of choices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

SCHEMA = 1
"""Of keys and files. What is stored under another number is not read."""

Choice = int | bool | str | tuple[int, ...]
"""Rows of a tile, yes or no, a builder's name, or a `Tile`."""


class Key(NamedTuple):
    """One decision: what is known of it when a program is lowered.

    How many neighbours a site has decides how much a tile computes in vain, but it is a value and not known then. The
    grid stands in for it: scans get denser from level to level, by much the same factor whatever the sensor. It is a
    static fact, so tuning and tracing agree on the key without reading anything.

    Attributes:
      op: "conv" or "wgrad" for a layer's own tile; "sort" for the order of rows, which all layers of one map and
        direction share; "builder" for the way in which the maps of the same sites are built.
      device: kind of device, as `jax.Device.device_kind`.
      dtype: of the products: "float16" (for bfloat16 too, whose kernels differ in one instruction), "tf32", "float32",
        "float64"; "" where it makes no difference.
      c_in, c_out: channels, padded as the kernel takes them; 0 where they make no difference.
      taps: number of taps, K.
      direction: "same" for a map that is its own reverse, "table" for a map as it is, "reverse" for its reverse.
      grid: stride of the map's fine grid.
      rows: `row_bucket` of the rows computed; those of the fine sites for "builder".
    """

    op: str
    device: str
    dtype: str
    c_in: int
    c_out: int
    taps: int
    direction: str
    grid: tuple[int, ...]
    rows: int


def row_bucket(rows: int) -> int:
    """Half powers of two: rows within a fifth of each other share a number."""
    return round(2 * math.log2(max(rows, 1)))


FARTHEST = 3  # in buckets: nearly three times as many rows, or half as many again on another grid
OTHER_GRID = 2
# Farther, the cost model chooses better: on an H200 the best tile of 31,833 rows, whose channels are split over two
# blocks, took 51.7 us for 60,107 rows of the grid below, where the model's took 42.6 (128 to 128 channels).


class Choices(Mapping[Key, Choice]):
    """An immutable, hashable map from keys to choices, which finds near keys too."""

    def __init__(self, choices: Mapping[Key, Choice] = {}):
        self._choices = dict(sorted(choices.items()))
        self._hash = hash(tuple(self._choices.items()))
        self._near: dict[tuple, list[Key]] = {}
        for key in self._choices:
            self._near.setdefault(key[:-2], []).append(key)

    def __getitem__(self, key: Key) -> Choice:
        return self._choices[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Choices) and self._choices == other._choices)

    def __or__(self, other: Choices) -> Choices:
        """Both; where they differ, the right one's."""
        return Choices({**self._choices, **other._choices})

    def find(self, key: Key) -> Choice | None:
        """The choice for this key, or for the nearest that differs in rows and grid only; None where none is near."""
        if key in self._choices:
            return self._choices[key]

        def distance(other: Key) -> int:
            return abs(other.rows - key.rows) + (OTHER_GRID if other.grid != key.grid else 0)

        near = [other for other in self._near.get(key[:-2], []) if distance(other) <= FARTHEST]
        return self._choices[min(near, key=lambda other: (distance(other), other))] if near else None


def to_json(key: Key, choice: Choice) -> dict[str, Any]:
    """As it stands in files."""
    return {**key._asdict(), "choice": choice}


def tile_from_json(numbers: list[Any]) -> tuple[int, ...]:
    """A tile; where files have three numbers, from before there were splits, its splits are 1."""
    tile = tuple(map(int, numbers))
    return (*tile, 1) if len(tile) == 3 else tile


def from_json(entry: Mapping[str, Any]) -> tuple[Key, Choice]:
    """The inverse of `to_json`.

    Raises:
      ValueError, KeyError, TypeError: where it is none.
    """
    fields = {name: entry[name] for name in Key._fields}
    fields["grid"] = tuple(map(int, fields["grid"]))
    key, choice = Key(**fields), entry["choice"]
    if not all(isinstance(getattr(key, n), str) for n in ("op", "device", "dtype", "direction")):
        raise TypeError(f"a key's names must be strings: {entry}")
    if not all(isinstance(getattr(key, n), int) for n in ("c_in", "c_out", "taps", "rows")):
        raise TypeError(f"a key's numbers must be integers: {entry}")
    if isinstance(choice, list):
        choice = tile_from_json(choice)
    elif not isinstance(choice, bool | int | str):
        raise TypeError(f"a choice must be an integer, a boolean, a name or a list of integers: {entry}")
    return key, choice
