"""Sites: where a sparse tensor's rows lie, and the maps between grids that layers share."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxsparse import _coords, _keys, status
from jaxsparse._compat import trace_state
from jaxsparse.geometry import AxisInts, Geometry, check_bounds, check_within_int32, per_axis
from jaxsparse.status import Problem


class Capacities(Mapping[tuple[int, ...], int]):
    """Rows to reserve for each grid: an immutable, hashable map from grid stride to capacity.

    Made by `jaxsparse.capacities` from sample scenes. Keys are strides relative to the input grid, one integer an axis.
    """

    def __init__(self, rows: Mapping[tuple[int, ...], int] = ()):  # type: ignore[assignment]
        for grid, capacity in dict(rows).items():
            if not isinstance(grid, tuple):
                raise TypeError(f"Capacities: keys are grid strides, a tuple of one integer an axis, got {grid!r}.")
            check_capacity(capacity, f"Capacities: the capacity of grid {grid}")
        self._rows = tuple(sorted((k, int(v)) for k, v in dict(rows).items()))

    def __getitem__(self, stride: tuple[int, ...]) -> int:
        return dict(self._rows)[tuple(stride)]

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter(dict(self._rows))

    def __len__(self) -> int:
        return len(self._rows)

    def __hash__(self) -> int:
        return hash(self._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Capacities) and self._rows == other._rows

    def __repr__(self) -> str:
        return f"Capacities({dict(self._rows)})"

    def hear(self, stride: tuple[int, ...], rows: jax.Array) -> None:
        """Is told how many rows each new grid needs. Does nothing: `jaxsparse.capacities` overrides it to listen."""


class _Memo:
    """What has been derived from one set of coordinates, kept while the same trace runs.

    Not part of the pytree: a `Sites` that crosses into another trace as an argument (of a jit, scan or remat body)
    starts with none. One that a traced function closes over keeps what was derived there until the next trace asks for
    it: no other trace gets it, but `jax.checking_leaks` complains. A pickle and a deep copy start with none.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[Any, Any]] = {}
        self._with: weakref.WeakKeyDictionary[_Memo, _Memo] = weakref.WeakKeyDictionary()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        state = trace_state()
        held = self._entries.get(key)
        if held is None or held[0] != state:
            held = self._entries[key] = (state, make())
        return held[1]

    def of_pair(self, partner: _Memo) -> _Memo:
        """What has been derived from these coordinates and others together, kept while both last."""
        return self._with.setdefault(partner, _Memo())

    def __reduce__(self):
        return _Memo, ()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["coords", "count", "status"],
    meta_fields=["stride", "capacities", "batch_size", "bounds", "order"],
    drop_fields=["_memo"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Sites:
    """The sites of a sparse tensor.

    Layers that keep sites return the same object, and layers that change them keep the result here, so that every map
    of a network is built once. Make one through `SparseTensor` or `voxelize`.

    Attributes:
      coords: int32 `[N, 1 + D]`, batch index first, in units of this grid; N is the capacity. Rows from `count` on are
        padding: every entry is -2^31.
      count: int32 scalar, how many rows are real.
      status: int32 `[7]`, see `jaxsparse.status`.
      stride: size of this grid's cells in cells of the input grid, an integer an axis.
      capacities: rows to reserve for coarser grids.
      batch_size: number of scenes, where known; batch indices lie in [0, batch_size).
      bounds: sizes of the grid, where known: every coordinate lies in [0, size).
      order: "morton" if rows are sorted by (batch, Morton code), else "any".
    """

    coords: jax.Array
    count: jax.Array
    status: jax.Array
    stride: tuple[int, ...]
    capacities: Capacities = dataclasses.field(default_factory=Capacities)
    batch_size: int | None = None
    bounds: tuple[int, ...] | None = None
    order: str = "any"
    _memo: _Memo = dataclasses.field(default_factory=_Memo, init=False, repr=False)

    @classmethod
    def create(
        cls,
        coords: jax.Array,
        count: jax.Array | int | None = None,
        *,
        stride: AxisInts = 1,
        batch_size: int | None = None,
        bounds: Sequence[int] | None = None,
        capacities: Capacities | None = None,
    ) -> Sites:
        """Sites from coordinates in any row order; values are checked on the device, see `SparseTensor`."""
        coords, grid, size = _check_static(coords, stride, bounds, batch_size)
        capacities = check_capacities(capacities, len(grid))
        rows = coords.shape[0]
        count, wrong_count = check_count(count, rows)
        if rows == 0:  # custom calls want rows; one of padding is the empty scene
            coords = jnp.full((1, coords.shape[1]), _keys.PADDING_COORD, jnp.int32)
        real = _keys.real_rows(count[None], coords.shape[0])
        coords = jnp.where(real[:, None], coords, _keys.PADDING_COORD)
        found = status.merge(wrong_count, _check_values(coords, count, batch_size, size))
        return cls(coords, count, found, grid, capacities, batch_size, size, "any")

    @property
    def capacity(self) -> int:
        """Rows of the arrays, N."""
        return self.coords.shape[0]

    @property
    def dims(self) -> int:
        """Number of spatial dimensions, D."""
        return self.coords.shape[1] - 1

    @property
    def counts(self) -> jax.Array:
        """`count` as the one-segment counts that primitives take: int32 `[1]`.

        Of a program's argument it is a copy: most kernels read it, and where the next call passes another array, the
        host then changes one command of a CUDA graph, not dozens (SparseResNet21D, training: 0.1 ms of 5.0 on an H200).
        Ops that make sites put their own counts into the memo.
        """
        return self.memo("counts", lambda: lax.optimization_barrier(jnp.minimum(self.count, self.capacity))[None])

    @property
    def is_real(self) -> jax.Array:
        """Which rows are real, bool `[N]`."""
        return _keys.real_rows(self.counts, self.capacity)

    def memo(self, key: Hashable, make: Callable[[], Any], partner: Sites | None = None) -> Any:
        """What `make()` returned for this key, and this partner, in the current trace, calling it the first time."""
        memo = self._memo if partner is None else self._memo.of_pair(partner._memo)
        return memo.get(key, make)

    def same_as(self, other: Sites) -> bool:
        """Whether both share their coordinates, known without reading a value."""
        return self._memo is other._memo

    @property
    def index(self) -> tuple[jax.Array, ...]:
        """What `_coords.kernel_map` looks these sites up in, where the op that made them made it too, in this trace."""
        return self.memo("index", tuple)

    def with_status(self, *statuses: jax.Array) -> Sites:
        """The same sites with more to report; maps stay shared."""
        same = dataclasses.replace(self, status=status.merge(self.status, *statuses))
        object.__setattr__(same, "_memo", self._memo)
        return same

    def check(self) -> Sites:
        """Waits for the status and raises what it reports; returns the sites."""
        status.check(self.status)
        return self

    def coarse(self, geometry: Geometry, mode: str, capacity: int | None = None, implementation: str = "auto") -> Sites:
        """Output sites of a strided convolution, sorted by (batch, Morton code).

        Args:
          geometry: of the convolution.
          mode: "reachable" for every site whose window holds an input site (spconv, TorchSparse), "floor" for
            `floor(fine / stride)` (MinkowskiEngine).
          capacity: rows of the result; by default `capacities` decides, else as many as here, or twice that where a
            fine site can reach more than one coarse site.
          implementation: "auto" or "xla".
        """
        if mode not in ("reachable", "floor"):
            raise ValueError(f'`sites` (={mode!r}) must be "reachable" or "floor".')
        # "floor": the coarse sites whose stride x stride cell holds an input
        window = Geometry.cells(geometry.stride) if mode == "floor" else geometry
        stride = tuple(a * b for a, b in zip(self.stride, geometry.stride, strict=True))
        if capacity is None:
            capacity = self.capacities.get(stride, self.capacity * min(window.coarse_per_site(), 2))
        check_capacity(capacity)
        check_within_int32("strides", stride)
        bounds = None
        if self.bounds is not None and mode == "floor":
            bounds = tuple(-(-b // s) for b, s in zip(self.bounds, geometry.stride, strict=True))
        elif self.bounds is not None:
            bounds = geometry.coarse_bounds(self.bounds)

        def make() -> tuple[jax.Array, Sites]:
            coords, kept, found, outside, index = _coords.coarse_sites(
                self.coords,
                self.counts,
                geometry=window,
                capacity=capacity,
                bounds=bounds,
                is_sorted=self.order == "morton",
                implementation=implementation,
            )
            self.capacities.hear(stride, found[0])
            problems = status.merge(
                self.status,
                status.report(Problem.COORDINATE_RANGE, outside[0] > 0, outside[0], _keys.axis_limit(self.dims)),
                status.report(Problem.SITES_CAPACITY, found[0] > capacity, found[0], capacity, stride),
            )
            made = Sites(coords, kept[0], problems, stride, self.capacities, self.batch_size, bounds, "morton")
            made.memo("counts", lambda: kept)
            if implementation != "xla":  # plain JAX makes no index
                made.memo("index", lambda: (index,))
            return self.status, made

        reported, made = self.memo(("coarse", window, capacity, bounds, implementation), make)
        # Sites that share this memo may have another status than those for which it was made.
        return made if reported is self.status else made.with_status(self.status)


def as_int32(name: str, values: ArrayLike) -> jax.Array:
    """Integers of the host as int32, refused where they do not fit: jax would wrap numpy's in silence."""
    if isinstance(values, int | np.integer):
        values = np.asarray(values)
    if isinstance(values, np.ndarray) and np.issubdtype(values.dtype, np.integer):
        least, most = (int(values.min()), int(values.max())) if values.size else (0, 0)
        if least < -(2**31) or most >= 2**31:
            raise ValueError(f"`{name}` holds integers from {least} to {most}, which do not fit int32.")
        values = values.astype(np.int32)
    return jnp.asarray(values)


def check_capacity(capacity: int, name: str = "`capacity`") -> None:
    """Refuses a capacity that is no number of rows."""
    if not isinstance(capacity, int | np.integer) or capacity < 1:
        raise ValueError(f"{name} (={capacity!r}) must be an integer, at least 1.")


def check_capacities(capacities: Capacities | None, dims: int) -> Capacities:
    """The capacities, or none; refuses what are no capacities for so many spatial axes."""
    if capacities is None:
        return Capacities()
    if not isinstance(capacities, Capacities):
        kind = type(capacities).__name__
        raise TypeError(f"`capacities` must be a Capacities, got {kind}; pass jaxsparse.Capacities({{stride: rows}}).")
    wrong = [grid for grid in capacities if len(grid) != dims]
    if wrong:
        raise ValueError(f"`capacities` has the grid {wrong[0]}, but strides have {dims} entries here, one an axis.")
    return capacities


def check_count(count: jax.Array | int | None, rows: int) -> tuple[jax.Array, jax.Array]:
    """The number of real rows, an int32 scalar in [0, rows] (all by default), and a report if it was outside."""
    count = as_int32("count", rows if count is None else count)
    if count.shape != () or not jnp.issubdtype(count.dtype, jnp.integer):
        raise ValueError(f"`count` must be an integer scalar, got {count.dtype}{list(count.shape)}.")
    if count.dtype.itemsize < 4:
        count = count.astype(jnp.int32)
    wrong = (count < 0) | (count > rows)  # before it becomes int32, which would wrap wider integers
    value = jnp.clip(count, max(jnp.iinfo(count.dtype).min, -(2**31)), 2**31 - 1).astype(jnp.int32)
    return jnp.clip(value, 0, rows), status.report(Problem.COUNT, wrong, value, rows)


def check_single(what: str, coords: jax.Array) -> None:
    """Refuses the coordinates of several scenes in one, as `vmap` returns them."""
    if coords.ndim != 2:
        raise ValueError(f"{what} has leading axes {coords.shape[:-2]}, several in one; call this inside jax.vmap.")


def check_batch_size(batch_size: int | None, dims: int) -> None:
    """Refuses a number of scenes that site keys cannot hold."""
    limit = _keys.batch_limit(dims)
    if batch_size is not None and not (isinstance(batch_size, int | np.integer) and 1 <= batch_size <= limit):
        raise ValueError(f"`batch_size` (={batch_size!r}) must be 1 to {limit} in {dims} dimensions.")


def _check_static(
    coords: jax.Array, stride: AxisInts, bounds: Sequence[int] | None, batch_size: int | None
) -> tuple[jax.Array, tuple[int, ...], tuple[int, ...] | None]:
    """What shapes and dtypes tell about a constructor's arguments: coordinates, stride and bounds."""
    coords = as_int32("coords", coords)
    if coords.ndim != 2 or not 2 <= coords.shape[1] <= 5:
        raise ValueError(f"`coords` must be [N, 1 + D] with D = 1 to 4, batch index first, got shape {coords.shape}.")
    if coords.dtype != jnp.int32:
        raise TypeError(
            f"`coords` must be int32 voxel indices, got {coords.dtype}; quantise points with jaxsparse.voxelize, or "
            "cast integer coordinates with .astype(jnp.int32)."
        )
    dims = coords.shape[1] - 1
    check_batch_size(batch_size, dims)
    grid = per_axis("stride", stride, dims)
    check_within_int32("stride", grid)
    return coords, grid, check_bounds(bounds, dims)


def _check_values(coords, count, batch_size, bounds) -> jax.Array:
    """What only values can tell about coordinates. Costs nothing in a compiled program that drops the status."""
    dims = coords.shape[1] - 1
    real = _keys.real_rows(count[None], coords.shape[0])
    limit, batches = _keys.axis_limit(dims), batch_size or _keys.batch_limit(dims)

    def rows_where(condition):
        return (real & condition).sum(dtype=jnp.int32)

    wrong_batch = rows_where((coords[:, 0] < 0) | (coords[:, 0] > batches - 1))
    wrong_range = rows_where(((coords[:, 1:] < -limit) | (coords[:, 1:] >= limit)).any(1))
    _, _, distinct, *_ = _coords.unique_sites(coords, count[None], capacity=1)
    duplicates = count - distinct[0]
    problems = [
        status.report(Problem.BATCH_INDEX, wrong_batch > 0, wrong_batch, min(batches, 2**31 - 1)),
        status.report(Problem.COORDINATE_RANGE, wrong_range > 0, wrong_range, limit),
        status.report(Problem.DUPLICATE_SITES, duplicates > 0, duplicates, 0),
    ]
    if bounds is not None:
        outside = rows_where(((coords[:, 1:] < 0) | (coords[:, 1:] >= np.array([bounds], np.int32))).any(1))
        problems.append(status.report(Problem.OUT_OF_BOUNDS, outside > 0, outside, 0))
    return status.merge(*problems)
