"""Facts that only values can tell, carried through `jit` beside the data and raised on the host.

A status is int32 `[7]`: problem, value, limit, grid stride of up to four axes. All zeros means that nothing is wrong.
The first problem of a computation is kept: later ones are mostly its consequences.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


class SiteError(ValueError):
    """A fact about sites or capacities that was found on the device; raised by `check`."""


class Problem(enum.IntEnum):
    """What can be wrong. Members are numbered for good: exported models hold the numbers."""

    VOXELIZE_CAPACITY = 1
    SITES_CAPACITY = 2
    COLLATE_CAPACITY = 3
    DENSE_CAPACITY = 4
    DUPLICATE_SITES = 5
    BATCH_INDEX = 6
    COORDINATE_RANGE = 7
    OUT_OF_BOUNDS = 8
    NON_FINITE_POINTS = 9
    UNEQUAL_SITES = 10
    COUNT = 11
    KERNEL_MAP = 12


_MESSAGES = {
    Problem.VOXELIZE_CAPACITY: "voxelize: {value} voxels do not fit `capacity` (={limit}); the first {limit} in "
    "(batch, Morton) order were kept. Set capacity to at least {value}.",
    Problem.SITES_CAPACITY: "SparseConv: {value} sites of the grid with stride {stride} do not fit its capacity "
    "(={limit}); the first {limit} in (batch, Morton) order were kept. Plan `capacities` with "
    "jaxsparse.capacities(model, samples), or set the layer's `capacity` to at least {value}.",
    Problem.COLLATE_CAPACITY: "collate: {value} sites do not fit `capacity` (={limit}); the last ones were dropped. "
    "Set capacity to at least {value}.",
    Problem.DENSE_CAPACITY: "from_dense: {value} nonzero sites do not fit `capacity` (={limit}). Set capacity to at "
    "least {value}.",
    Problem.DUPLICATE_SITES: "SparseTensor: `coords` holds {value} rows whose site another row has already; sites must "
    "be distinct. Merge equal sites first, with jaxsparse.voxelize for points.",
    Problem.BATCH_INDEX: "{value} rows have a batch index (column 0 of `coords`, or `batch` of voxelize) outside [0, "
    "{limit}); pass a larger `batch_size` or mend the indices.",
    Problem.COORDINATE_RANGE: "{value} rows have a coordinate outside [-{limit}, {limit}), the range that a 64-bit "
    "site key holds for this number of dimensions; move the origin or use a coarser voxel size.",
    Problem.OUT_OF_BOUNDS: "SparseTensor: {value} rows of `coords` lie outside `bounds`; drop them or enlarge bounds.",
    Problem.NON_FINITE_POINTS: "voxelize: {value} rows of `points` are not finite and were dropped; remove them, or "
    "lower `count` if they are padding.",
    Problem.UNEQUAL_SITES: "{value} rows of the two tensors have different sites; addition and concatenation need "
    "equal sites in equal order.",
    Problem.COUNT: "`count` (={value}) is outside [0, {limit}], the rows of the array; pass the number of real rows.",
    Problem.KERNEL_MAP: "`kernel_map` is that of other sites: one side of it has {value} real rows, where the sites "
    "have {limit}; build it from the sites of these tensors.",
}


def report(problem: Problem, wrong: jax.Array, value: jax.Array, limit: jax.Array | int, stride: Sequence[int] = ()):
    """The status that says `problem` where the scalar `wrong` is true."""
    fields = [int(problem), value, limit, *stride, *[0] * (4 - len(stride))]
    entries = jnp.stack([jnp.asarray(f).astype(jnp.int32) for f in fields])
    return jnp.where(wrong, entries, 0)


def merge(*statuses: jax.Array) -> jax.Array:
    """The first status that reports a problem."""
    out = statuses[-1]
    for status in reversed(statuses[:-1]):
        out = jnp.where(status[..., :1] != 0, status, out)
    return out


def message(status: np.ndarray) -> str | None:
    """What a status on the host says, in words; None where nothing is wrong."""
    problem, value, limit, *stride = (int(v) for v in np.asarray(status))
    if problem == 0:
        return None
    grid = tuple(s for s in stride if s)
    return _MESSAGES[Problem(problem)].format(value=value, limit=limit, stride=grid)


def check(status: jax.Array) -> None:
    """Waits for a status and raises what it reports.

    Args:
      status: int32 `[..., 7]`; leading axes come from `vmap` or from devices.

    Raises:
      SiteError: names the operation, the value and the remedy.
      TypeError: inside a traced function, which has no values yet.
    """
    if not hasattr(status, "shape") or status.shape[-1:] != (7,):
        kind = type(status).__name__
        raise TypeError(f"check: `status` must be int32 [..., 7], got {kind}; pass x.status, or call x.check().")
    if isinstance(status, jax.core.Tracer):
        raise TypeError(
            "check reads values, which a function does not have while it is traced: return `y.status` from the jitted "
            "function, and call jaxsparse.status.check on what it returns."
        )
    for entry in np.asarray(status).reshape(-1, 7):
        text = message(entry)
        if text is not None:
            raise SiteError(text)
