"""Points to voxels and back, and batches of scenes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _coords, _keys, status
from jaxsparse._dtypes import accumulation_dtype
from jaxsparse._primitive import check_implementation
from jaxsparse.geometry import check_bounds
from jaxsparse.ops.rows import gather_rows, sum_rows
from jaxsparse.sites import (
    Capacities,
    Sites,
    as_int32,
    check_batch_size,
    check_capacities,
    check_capacity,
    check_count,
)
from jaxsparse.status import Problem
from jaxsparse.tensor import SparseTensor, check_float, check_tensor, on_sites

_REDUCTIONS = ("mean", "sum", "max", "first")


def voxelize(
    points: jax.Array,
    feats: jax.Array,
    voxel_size: float | Sequence[float],
    *,
    capacity: int,
    count: jax.Array | int | None = None,
    batch: jax.Array | None = None,
    batch_size: int | None = None,
    origin: jax.Array | Sequence[float] | None = None,
    reduce: str = "mean",
    bounds: Sequence[int] | None = None,
    capacities: Capacities | None = None,
    implementation: str = "auto",
) -> tuple[SparseTensor, jax.Array]:
    """Gathers points into voxels.

    The voxel of a point is `floor((point - origin) * (1 / voxel_size))`, in float32, the reciprocal rounded to float32:
    one subtraction and one product, so that compiled and eager code agree. float64 points are taken from the origin in
    float64: far from zero, as UTM coordinates are, float32 would move them by more than a voxel. Without
    `jax_enable_x64` that takes numpy arrays, outside of `jit`.

    Args:
      points: `[P, D]` in metres (any unit, the voxel size's), D = 1 to 4.
      feats: `[P, C]`.
      voxel_size: edge length, or one an axis.
      capacity: rows of the result. More voxels than that are reported in `status`, the first in (batch, Morton) order
        are kept, and points of the others get index -1.
      count: number of real points, a scalar that may be traced; rows from there on are padding, whatever they hold.
      batch: int32 `[P]`, the scene of each point; all 0 by default.
      batch_size: number of scenes; 1 by default without `batch`.
      origin: `[D]`, where voxel 0 begins; 0 by default.
      reduce: how features of one voxel combine: "mean", "sum", "max" or "first" (the lowest point row).
      bounds: sizes of the grid in voxels; points outside [0, bounds) are left out, with index -1.
      capacities: rows to reserve for coarser grids, see `jaxsparse.capacities`.
      implementation: "auto" or "xla".

    Returns:
      The voxels, sorted by (batch, Morton code), and `point_to_voxel`, int32 `[P]`: the row of each point's voxel, -1
      for padding and for points left out.
    """
    given, points, feats = points, jnp.asarray(points), jnp.asarray(feats)
    check_implementation(implementation)
    check_float("points", points)
    check_float("feats", feats)
    if points.ndim != 2 or not 1 <= points.shape[1] <= 4:
        raise ValueError(f"`points` must be [P, D] with D = 1 to 4, got shape {points.shape}.")
    if feats.ndim != 2 or feats.shape[0] != points.shape[0]:
        raise ValueError(f"`feats` must be [{points.shape[0]}, C], a row for each point, got shape {feats.shape}.")
    if reduce not in _REDUCTIONS:
        raise ValueError(f"`reduce` (={reduce!r}) must be one of {_REDUCTIONS}.")
    check_capacity(capacity)
    rows, dims = points.shape
    capacities = check_capacities(capacities, dims)
    sizes = np.asarray(voxel_size)
    is_size = sizes.dtype.kind in "iuf" and sizes.shape in ((), (dims,))
    if not is_size or not (np.isfinite(sizes) & (sizes > 0)).all():
        raise ValueError(
            f"`voxel_size` (={voxel_size!r}) must be positive, a number or one for each of the {dims} axes."
        )
    scale = np.broadcast_to(1 / sizes.astype(np.float64), dims).astype(np.float32)
    if origin is not None and np.shape(origin) != (dims,):
        raise ValueError(f"`origin` must be [{dims}], a number for each axis, got shape {np.shape(origin)}.")
    is_wide = isinstance(given, np.ndarray) and given.dtype == np.float64
    if is_wide and origin is not None and not isinstance(origin, jax.Array):
        points, origin = jnp.asarray((given - np.asarray(origin, np.float64)).astype(np.float32)), None
    precise = points.dtype if points.dtype == np.float64 else np.dtype(np.float32)
    origin = jnp.zeros(dims, precise) if origin is None else jnp.asarray(origin, precise)
    grid = check_bounds(bounds, dims)
    check_batch_size(batch_size, dims)
    if batch is None:
        batch, batch_size = jnp.zeros(rows, jnp.int32), batch_size or 1
    batch = as_int32("batch", batch)
    if batch.shape != (rows,) or batch.dtype != jnp.int32:
        raise ValueError(f"`batch` must be int32 [{rows}], got {batch.dtype}{list(batch.shape)}.")
    if rows == 0:  # custom calls want rows
        points, feats, batch = (
            jnp.zeros((1, dims)),
            jnp.zeros((1, feats.shape[1]), feats.dtype),
            jnp.zeros(1, jnp.int32),
        )
    count, wrong_count = check_count(count, rows)

    # Axis by axis: XLA on GPUs computes a reduction over three columns in a kernel of its own.
    columns = [points[:, d] for d in range(dims)]
    offsets = [(columns[d].astype(precise) - origin[d]).astype(jnp.float32) for d in range(dims)]
    cells = [jnp.floor(offsets[d] * scale[d]) for d in range(dims)]
    limit, batches = float(_keys.axis_limit(dims)), batch_size or _keys.batch_limit(dims)
    is_finite = _all(jnp.isfinite(column) for column in columns)
    wanted = is_finite  # points outside bounds are left out, not wrong
    if grid is not None:
        wanted &= _all((cell >= 0) & (cell < np.float32(size)) for cell, size in zip(cells, grid, strict=True))
    in_range = _all((cell >= -limit) & (cell < limit) for cell in cells)
    in_batch = (batch >= 0) & (batch <= batches - 1)
    has_voxel = wanted & in_range & in_batch
    # What is wrong with a point, a bit each: counted where its site would be made, not by kernels of XLA's.
    wrong = (~is_finite, wanted & ~in_range, ~in_batch)
    reason = sum(jnp.where(w, np.int32(1 << i), 0) for i, w in enumerate(wrong))
    site = [jnp.where(has_voxel, batch, -1 - reason)]
    site += [jnp.where(has_voxel, cell, 0).astype(jnp.int32) for cell in cells]

    sites, kept, found, row_of, *grouped, without = _coords.unique_sites(
        jnp.stack(site, 1), count[None], capacity=capacity, implementation=implementation
    )
    has_bit = (np.arange(_coords.REASONS) >> np.arange(len(wrong))[:, None] & 1).astype(np.int32)
    non_finite, out_of_range, wrong_batch = (without[None] * has_bit).sum(1)
    problems = [
        wrong_count,
        _report_rows(Problem.NON_FINITE_POINTS, non_finite, 0),
        _report_rows(Problem.COORDINATE_RANGE, out_of_range, int(limit)),
        _report_rows(Problem.BATCH_INDEX, wrong_batch, min(batches, 2**31 - 1)),
        status.report(Problem.VOXELIZE_CAPACITY, found[0] > capacity, found[0], capacity),
    ]
    made = Sites(
        sites,
        kept[0],
        status.merge(*problems),
        (1,) * dims,
        capacities,
        batch_size,
        grid,
        "morton",
    )
    made.memo("counts", lambda: kept)
    return on_sites(made, _reduce(feats, row_of, grouped, capacity, reduce, implementation)), row_of[:rows]


def _all(conditions: Iterable[jax.Array]) -> jax.Array:
    """Where all hold."""
    return functools.reduce(jnp.logical_and, conditions)


def _report_rows(problem: Problem, number: jax.Array, limit: int) -> jax.Array:
    """Reports a number of rows, if there are any."""
    return status.report(problem, number > 0, number, limit)


def _reduce(feats, row_of, grouped, capacity, reduce, implementation):
    """Features of each voxel `[capacity, C]`, zero where it has no point."""
    order, offsets = grouped
    points_in = offsets[1:] - offsets[:-1]
    if reduce in ("mean", "sum"):
        dtype = accumulation_dtype(feats.dtype)
        total = sum_rows(feats.astype(dtype), row_of, capacity, grouped=grouped, implementation=implementation)
        if reduce == "mean":
            total = total / jnp.maximum(points_in, 1)[:, None].astype(dtype)
        return total.astype(feats.dtype)
    none = row_of.shape[0]
    if reduce == "first":
        first = jnp.where(points_in > 0, order[jnp.minimum(offsets[:-1], none - 1)], -1)
        return gather_rows(feats, first, implementation=implementation)
    target = jnp.where(row_of >= 0, row_of, capacity)  # past the end: dropped
    position = jnp.arange(none, dtype=jnp.int32)
    # Of equal maxima the lowest point wins, which makes the gradient unique.
    masked = jax.lax.stop_gradient(jnp.where(row_of[:, None] >= 0, feats, -jnp.inf))
    highest = jnp.full((capacity, feats.shape[1]), -jnp.inf, feats.dtype).at[target].max(masked, mode="drop")
    of_voxel = highest[jnp.minimum(target, capacity - 1)]  # NaN where any of its points is, and then NaN must win
    is_highest = ((masked == of_voxel) | jnp.isnan(masked)) & (row_of[:, None] >= 0)
    candidate = jnp.where(is_highest, position[:, None], none)
    winner = jnp.full((capacity, feats.shape[1]), none, jnp.int32).at[target].min(candidate, mode="drop")
    channel = jnp.arange(feats.shape[1])[None]
    return jnp.where(winner < none, feats[jnp.minimum(winner, none - 1), channel], 0)


def devoxelize(
    voxels: SparseTensor | jax.Array, point_to_voxel: jax.Array, *, implementation: str = "auto"
) -> jax.Array:
    """The features of each point's voxel.

    Args:
      voxels: a tensor on the grid of `voxelize`, or features `[N, C]`.
      point_to_voxel: int32 `[P]` from `voxelize`.
      implementation: "auto" or "xla"; matters to the gradient.

    Returns:
      `[P, C]`, zero where the index is outside [0, N). Differentiable: the gradient sums over the points of each voxel,
      in a fixed order.

    Raises:
      ValueError: where the tensor lies on a coarser grid.
    """
    check_implementation(implementation)
    if not isinstance(voxels, SparseTensor):
        return gather_rows(voxels, point_to_voxel, implementation=implementation)
    check_tensor("devoxelize", voxels)
    if set(voxels.stride) != {1}:
        raise ValueError(
            f"devoxelize: `voxels` lies on the grid with stride {voxels.stride}, whose rows `point_to_voxel` does not "
            "number; bring it back to the voxels first, as SparseConvTranspose(...)(voxels, like=x) does."
        )
    return gather_rows(voxels.unmasked, point_to_voxel, implementation=implementation)


def collate(tensors: Sequence[SparseTensor], capacity: int | None = None) -> SparseTensor:
    """Several scenes as one batch: batch indices of the i-th tensor move past those of the ones before.

    Args:
      tensors: scenes on the same grid, with equal features. One whose `batch_size` is unknown counts as a single scene.
      capacity: rows of the result; the sum of the capacities by default. More rows are reported in `status`.

    Returns:
      The real rows of each tensor in turn, then padding, with `batch_size` set and the tensors' `capacities`.
    """
    if isinstance(tensors, SparseTensor):
        raise TypeError("collate: `tensors` must be a sequence of SparseTensors, got a single one; pass [x].")
    tensors = list(tensors)
    if not tensors:
        raise ValueError("collate: `tensors` is empty; pass at least one.")
    first = tensors[0]
    for t in tensors:
        check_tensor("collate", t)
        same = (t.dims, t.stride, t.num_features, t.dtype) == (
            first.dims,
            first.stride,
            first.num_features,
            first.dtype,
        )
        if t.sites.capacities != first.sites.capacities:
            raise ValueError(
                f"collate: tensors must share `capacities`, got {first.sites.capacities} and {t.sites.capacities}; "
                "they are kept, so plan them for the batch."
            )
        if not same or t.bounds != first.bounds:
            raise ValueError(
                f"collate: tensors must share dimensions, stride, features, dtype and bounds, got ({first.dims}, "
                f"{first.stride}, {first.num_features}, {first.dtype}, {first.bounds}) and ({t.dims}, {t.stride}, "
                f"{t.num_features}, {t.dtype}, {t.bounds})."
            )
    sizes = [t.batch_size or 1 for t in tensors]
    total_rows = sum(t.capacity for t in tensors)
    capacity = total_rows if capacity is None else capacity
    check_capacity(capacity)
    check_batch_size(sum(sizes), first.dims)

    counts = jnp.stack([t.count for t in tensors])
    ends = jnp.cumsum(counts)
    row = jnp.arange(capacity, dtype=jnp.int32)
    scene = jnp.minimum(jnp.searchsorted(ends, row, side="right"), len(tensors) - 1)
    starts = np.cumsum([0, *[t.capacity for t in tensors[:-1]]])
    source = jnp.asarray(starts, jnp.int32)[scene] + row - (ends - counts)[scene]
    source = jnp.clip(source, 0, total_rows - 1)
    is_real = row < ends[-1]

    shift = jnp.asarray(np.cumsum([0, *sizes[:-1]]), jnp.int32)
    coords = jnp.concatenate([t.coords for t in tensors])[source]
    coords = coords.at[:, 0].add(shift[scene])
    coords = jnp.where(is_real[:, None], coords, _keys.PADDING_COORD)
    feats = jnp.where(is_real[:, None], jnp.concatenate([t.feats for t in tensors])[source], 0)
    problems = status.merge(
        *[t.status for t in tensors],
        *[
            _report_rows(Problem.BATCH_INDEX, (t.sites.is_real & (t.coords[:, 0] >= size)).sum(dtype=jnp.int32), size)
            for t, size in zip(tensors, sizes, strict=True)
        ],
        status.report(Problem.COLLATE_CAPACITY, ends[-1] > capacity, ends[-1], capacity),
    )
    order = "morton" if all(t.sites.order == "morton" for t in tensors) else "any"
    count = jnp.minimum(ends[-1], capacity)
    sites = Sites(coords, count, problems, first.stride, first.sites.capacities, sum(sizes), first.bounds, order)
    return on_sites(sites, feats)
