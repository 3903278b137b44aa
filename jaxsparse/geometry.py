"""The geometry of a kernel: sizes, strides, padding and dilation an axis, and the one index relation.

    fine = stride * coarse - padding + dilation * tap,    tap = 0 .. kernel - 1

Taps are numbered row-major over the axes, the last axis fastest.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Iterable, Sequence

AxisInts = int | Sequence[int]
MOST_TAPS = 65536


def per_axis(name: str, value: AxisInts, dims: int, least: int = 1) -> tuple[int, ...]:
    """One integer an axis, from an integer or a sequence of `dims` of them.

    Raises:
      ValueError: names the argument, its value and what it must be.
    """
    try:
        entries = tuple(map(operator.index, value)) if isinstance(value, Iterable) else (operator.index(value),) * dims
    except TypeError:
        raise TypeError(f"`{name}` (={value!r}) must be an integer or a sequence of integers, one an axis.") from None
    if len(entries) != dims:
        raise ValueError(f"`{name}` (={value!r}) must have one entry for each of the {dims} spatial axes.")
    if min(entries) < least:
        raise ValueError(f"`{name}` (={value!r}) must be at least {least} on every axis.")
    return entries


def check_bounds(bounds: Sequence[int] | None, dims: int) -> tuple[int, ...] | None:
    """The sizes of the grid, one an axis."""
    if bounds is None:
        return None
    sizes = per_axis("bounds", bounds, dims)
    check_within_int32("bounds", sizes)
    return sizes


def check_within_int32(name: str, entries: tuple[int, ...]) -> None:
    """Refuses what leaves no room for sums of two in int32."""
    if max(entries) > 2**30:
        raise ValueError(f"`{name}` (={entries}) must be at most 2^30 on every axis.")


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A kernel's geometry, one entry an axis in each field."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def create(
        cls,
        dims: int,
        kernel_size: AxisInts,
        strides: AxisInts = 1,
        padding: AxisInts | None = None,
        dilation: AxisInts = 1,
    ) -> Geometry:
        """Checks the arguments and fills them in for `dims` axes.

        Padding defaults to `dilation * ((kernel - 1) // 2)`: kernel 3 reaches -1, 0, 1 and kernel 2 reaches 0, 1.
        """
        if not 1 <= dims <= 4:
            raise ValueError(f"`dims` (={dims}) must be 1 to 4 spatial axes.")
        kernel = per_axis("kernel_size", kernel_size, dims)
        dilation = per_axis("dilation", dilation, dims)
        if padding is None:
            padding = tuple(d * ((k - 1) // 2) for k, d in zip(kernel, dilation, strict=True))
        else:
            padding = per_axis("padding", padding, dims, least=-(2**30))
        geometry = cls(kernel, per_axis("strides", strides, dims), padding, dilation)
        if geometry.volume > MOST_TAPS:
            raise ValueError(
                f"`kernel_size` (={kernel_size}) has {geometry.volume} taps; at most {MOST_TAPS} are supported."
            )
        if geometry.reach > 2**30:
            raise ValueError(
                f"`strides` (={geometry.stride}), `padding` (={geometry.padding}), `dilation` (={geometry.dilation}) "
                f"and `kernel_size` (={geometry.kernel}) reach {geometry.reach} cells far; at most 2^30 are supported."
            )
        return geometry

    @classmethod
    def cells(cls, stride: tuple[int, ...]) -> Geometry:
        """The geometry whose windows are the cells of a coarser grid: each fine site reaches the one that holds it."""
        return cls(stride, stride, (0,) * len(stride), (1,) * len(stride))

    @property
    def is_cells(self) -> bool:
        """Whether each window is a cell of the coarser grid."""
        return self == Geometry.cells(self.stride)

    @property
    def volume(self) -> int:
        """Number of taps, K."""
        return math.prod(self.kernel)

    @property
    def taps(self) -> list[tuple[int, ...]]:
        """The taps in order, one entry an axis each."""
        return list(itertools.product(*map(range, self.kernel)))

    @property
    def reach(self) -> int:
        """The longest step of the index relation: coordinates plus or minus 2^30 still fit int32."""
        axes = zip(self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return max(max(s, abs(p), abs(d * (k - 1) - p)) for k, s, p, d in axes)

    @property
    def is_pointwise(self) -> bool:
        """Whether each output site sees exactly the input site at the same place: a product for each row, no map."""
        return self.volume == 1 and set(self.stride) == {1} and set(self.padding) == {0}

    @property
    def is_symmetric(self) -> bool:
        """Whether tap K - 1 - k steps as far back as tap k steps forward."""
        axes = zip(self.kernel, self.padding, self.dilation, strict=True)
        return set(self.stride) == {1} and all(2 * p == d * (k - 1) for k, p, d in axes)

    @functools.cached_property
    def tap_groups(self) -> tuple[tuple[int, ...], ...]:
        """At most nine groups of taps to sort rows by: rows with taps in the same groups have much the same taps.

        Up to nine taps are a group each. More are grouped by the signs of their offsets from the middle of the kernel:
        all taps ahead on the last axis, all behind on it, and each column along it that is not in the middle. In four
        dimensions: all ahead and all behind on each axis. Chosen by search over LiDAR and indoor scans, see
        `cuda/conv/schedule.cu`.
        """
        if self.volume <= 9:
            return tuple((k,) for k in range(self.volume))
        sides = [
            tuple((2 * t > k - 1) - (2 * t < k - 1) for t, k in zip(tap, self.kernel, strict=True)) for tap in self.taps
        ]
        dims = len(self.kernel)
        if dims == 4:
            wanted = [{axis: sign} for axis in range(dims) for sign in (1, -1)]
        else:
            columns = sorted(itertools.product((1, 0, -1), repeat=dims - 1), key=lambda c: (c.count(0), c))
            wanted = [{dims - 1: sign} for sign in (1, -1)] + [dict(enumerate(c)) for c in columns if any(c)]
        groups = (
            tuple(k for k, side in enumerate(sides) if all(side[axis] == sign for axis, sign in signs.items()))
            for signs in wanted
        )
        return tuple(group for group in groups if group)[:9]

    @property
    def blocks_under_window(self) -> float:
        """Over how many blocks of 64 sites, the last six bits of a key, a window lies on average."""
        dims = len(self.kernel)
        sizes = [1 << (6 // dims + (dims - 1 - axis < 6 % dims)) for axis in range(dims)]
        return math.prod(d * (k - 1) / size + 1 for k, d, size in zip(self.kernel, self.dilation, sizes, strict=True))

    @property
    def builders(self) -> tuple[str, ...]:
        """How a kernel map can be built from sorted input sites, the quickest first; see `jaxsparse.kernel_map`."""
        dims = len(self.kernel)
        under = 1  # blocks of 64 sites, the last six bits of a key, that a window can lie over
        for axis, (k, s, p, d) in enumerate(zip(self.kernel, self.stride, self.padding, self.dilation, strict=True)):
            size = 1 << (6 // dims + (dims - 1 - axis < 6 % dims))
            worst = 0 if s % size == 0 and p % size == 0 else size - 1  # offset of the first tap in its block
            under *= (worst + d * (k - 1)) // size + 1
        return ("blocks", "hash") if under <= 27 else ("hash",)

    def coarse_per_site(self) -> int:
        """At most how many coarse sites have a window that holds one fine site."""
        periods = [s // math.gcd(s, d) for s, d in zip(self.stride, self.dilation, strict=True)]
        return math.prod(-(-k // p) for k, p in zip(self.kernel, periods, strict=True))

    def coarse_bounds(self, bounds: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the coarse grid whose windows lie over a fine grid of sizes `bounds`, as in a dense convolution.

        No coordinate lies beyond 2^30, so neither do the sizes.

        Raises:
          ValueError: where the window does not fit between the bounds.
        """
        sizes = tuple(
            min((b + 2 * p - d * (k - 1) - 1) // s + 1, 2**30)
            for b, k, s, p, d in zip(bounds, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        if min(sizes) < 1:
            raise ValueError(
                f"`bounds` (={tuple(bounds)}) of the grid are too small for the window of `kernel_size` "
                f"(={self.kernel}) with `padding` (={self.padding}) and `dilation` (={self.dilation}): enlarge bounds "
                "or padding."
            )
        return sizes

    def attributes(self) -> dict[str, tuple[int, ...]]:
        """The geometry as custom-call attributes."""
        return dataclasses.asdict(self)
