"""SparseTensor: features on sites."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _coords, _keys, status
from jaxsparse.geometry import AxisInts
from jaxsparse.sites import Capacities, Sites, check_batch_size, check_capacities, check_capacity, check_single
from jaxsparse.status import Problem

FLOAT_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)


def check_float(name: str, x: jax.Array) -> None:
    """Refuses a dtype that no kernel computes in."""
    if x.dtype not in [jnp.dtype(d) for d in FLOAT_DTYPES]:
        raise TypeError(
            f"`{name}` has dtype {x.dtype}; supported: float32, bfloat16, float16, float64. Cast it with .astype(...)"
        )


def check_tensor(op: str, x: object) -> None:
    """Refuses what is no SparseTensor, or several in one, as `vmap` returns them."""
    if not isinstance(x, SparseTensor):
        raise TypeError(f"{op}: expected a SparseTensor, got {type(x).__name__}.")
    check_single(f"{op}: the SparseTensor", x.coords)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, init=False, repr=False)
class SparseTensor:
    """Features on sites: a pytree that goes through `jit`, `grad`, `vmap` and `scan`.

        x = SparseTensor(coords, feats)                    # every row is real
        x = SparseTensor(coords, feats, count=n)           # rows from n on are padding
        y = SparseTensor(x.sites, other_feats)             # the same sites, maps shared

    Sites must be distinct and may come in any order. What only values can tell (equal sites, batch indices outside
    `batch_size`, coordinates outside the key range or `bounds`) is found on the device, carried in `status` by every
    later op and raised by `check`.

    Args:
      coords: int32 `[N, 1 + D]`, batch index first, D = 1 to 4; or a `Sites`, and then no further argument but feats.
      feats: `[N, C]`, float32, bfloat16, float16 or float64.
      count: number of real rows, a scalar that may be traced; all by default.
      stride: size of the grid's cells in cells of the input grid, an integer or one an axis.
      batch_size: number of scenes; needed by `to_dense`.
      bounds: sizes of the grid, one an axis; sites made later are clipped to it, and `to_dense` has its shape.
      capacities: rows to reserve for coarser grids, see `jaxsparse.capacities`.

    Raises:
      TypeError, ValueError: where shapes or dtypes are wrong; names argument, value and remedy.
    """

    sites: Sites
    feats: jax.Array
    # The arrays that hold `feats` beside each other: itself, the result of a kernel that leaves padding rows as they
    # are, or what `ops.concatenate` joined. Where layers read these in place of `feats`, the compiler drops the zeros
    # of padding and the concatenation. They are no leaves of the pytree: only `feats` crosses the boundary of a `jit`.
    parts: tuple[jax.Array, ...]
    # Whether `feats` surely is zero on padding rows: not where they come as a leaf of a pytree.
    is_masked: bool

    def __init__(
        self,
        coords: jax.Array | Sites,
        feats: jax.Array,
        count: jax.Array | int | None = None,
        *,
        stride: AxisInts = 1,
        batch_size: int | None = None,
        bounds: Sequence[int] | None = None,
        capacities: Capacities | None = None,
    ):
        feats = jnp.asarray(feats)
        check_float("feats", feats)
        if isinstance(coords, Sites):
            has_stride = not isinstance(stride, int) or stride != 1
            if has_stride or any(given is not None for given in (count, batch_size, bounds, capacities)):
                raise ValueError(
                    "`coords` is a Sites, which has its own count, stride, batch_size, bounds and capacities."
                )
            sites, rows = coords, coords.capacity
        else:
            sites = Sites.create(
                coords, count, stride=stride, batch_size=batch_size, bounds=bounds, capacities=capacities
            )
            rows = len(coords)
        if feats.ndim != 2 or feats.shape[0] != rows:
            raise ValueError(f"`feats` must be [{rows}, C], a row for each site, got shape {feats.shape}.")
        if rows == 0:  # an empty scene has one row of padding
            feats = jnp.zeros((1, feats.shape[1]), feats.dtype)
        object.__setattr__(self, "sites", sites)
        object.__setattr__(self, "feats", jnp.where(sites.is_real[:, None], feats, 0))
        object.__setattr__(self, "parts", (self.feats,))
        object.__setattr__(self, "is_masked", True)

    def tree_flatten(self):
        """Sites and features; nothing is static here."""
        return (self.sites, self.feats), None

    def tree_flatten_with_keys(self):
        """The same with names, for error messages and tools that show paths."""
        keys = (jax.tree_util.GetAttrKey(name) for name in ("sites", "feats"))
        return tuple(zip(keys, (self.sites, self.feats), strict=True)), None

    @classmethod
    def tree_unflatten(cls, static, children) -> SparseTensor:
        """The inverse of `tree_flatten`; checks nothing, since JAX passes placeholders too."""
        x = object.__new__(cls)
        object.__setattr__(x, "sites", children[0])
        object.__setattr__(x, "feats", children[1])
        object.__setattr__(x, "parts", (x.feats,))
        object.__setattr__(x, "is_masked", False)
        return x

    def __reduce__(self):
        """A pickle or a copy is a tensor of features alone."""
        return on_sites, (self.sites, self.feats)

    @property
    def unmasked(self) -> jax.Array:
        """The features, of which padding rows may hold anything: for ops that read real rows alone."""
        return self.parts[0] if len(self.parts) == 1 else self.feats

    coords = property(lambda self: self.sites.coords, doc="int32 `[N, 1 + D]`, batch index first.")
    count = property(lambda self: self.sites.count, doc="int32 scalar, how many rows are real.")
    status = property(lambda self: self.sites.status, doc="int32 `[7]`, see `jaxsparse.status`.")
    stride = property(lambda self: self.sites.stride, doc="Cell size in cells of the input grid, one an axis.")
    capacity = property(lambda self: self.sites.capacity, doc="Rows of the arrays, N.")
    dims = property(lambda self: self.sites.dims, doc="Number of spatial dimensions, D.")
    batch_size = property(lambda self: self.sites.batch_size, doc="Number of scenes, or None.")
    bounds = property(lambda self: self.sites.bounds, doc="Sizes of the grid, or None.")
    num_features = property(lambda self: self.feats.shape[-1], doc="Channels, C.")
    dtype = property(lambda self: self.feats.dtype, doc="Dtype of the features.")

    def __repr__(self) -> str:
        s = self.sites
        if not isinstance(s, Sites) or not hasattr(self.feats, "dtype"):  # jax puts other things where arrays were
            return f"SparseTensor(sites={s!r}, feats={self.feats!r})"
        return (
            f"SparseTensor({self.dtype}{list(self.feats.shape)}, count={s.count}, stride={s.stride}, "
            f"batch_size={s.batch_size}, bounds={s.bounds}, order={s.order!r})"
        )

    def check(self) -> SparseTensor:
        """Waits for the status, raises `SiteError` if it reports a problem, and returns the tensor."""
        self.sites.check()
        return self

    def with_feats(self, feats: jax.Array) -> SparseTensor:
        """Other features `[N, C]` on the same sites; padding rows are set to zero."""
        check_tensor("with_feats", self)
        return SparseTensor(self.sites, feats)

    def astype(self, dtype) -> SparseTensor:
        """The features in another dtype."""
        return self if self.dtype == dtype else self.with_feats(self.feats.astype(dtype))

    def __add__(self, other: SparseTensor) -> SparseTensor:
        """Adds features on equal sites, see `jaxsparse.ops.add`."""
        if not isinstance(other, SparseTensor):
            return NotImplemented
        from jaxsparse.ops.join import add  # ops build on tensors, so this one name comes late

        return add(self, other)

    def to_dense(self) -> jax.Array:
        """The features on the whole grid, `[batch_size, *bounds, C]`, zero where there is no site.

        Raises:
          ValueError: where `batch_size` or `bounds` is unknown.
        """
        check_tensor("to_dense", self)
        if self.batch_size is None or self.bounds is None:
            raise ValueError(
                f"to_dense needs `batch_size` (={self.batch_size}) and `bounds` (={self.bounds}); give both to "
                "SparseTensor or voxelize."
            )
        shape = (self.batch_size, *self.bounds)
        # A negative index would count from the end: send padding and rows outside the grid past it instead.
        at = jnp.where(self.sites.is_real[:, None] & (self.coords >= 0), self.coords, np.array([shape], np.int32))
        dense = jnp.zeros((*shape, self.num_features), self.dtype)
        return dense.at[tuple(at.T)].set(self.feats, mode="drop", unique_indices=False)

    @staticmethod
    def from_dense(dense: jax.Array, capacity: int, *, capacities: Capacities | None = None) -> SparseTensor:
        """The sites of `[B, *grid, C]` at which any channel is not zero, sorted by (batch, Morton code).

        Args:
          dense: `[B, *grid, C]` with one to four grid axes.
          capacity: rows of the result; more sites than that are reported in `status`, and the first in row-major order
            are kept.
          capacities: rows to reserve for coarser grids.
        """
        dense = jnp.asarray(dense)
        check_float("dense", dense)
        if not 3 <= dense.ndim <= 6 or 0 in dense.shape:
            raise ValueError(
                f"`dense` must be [B, *grid, C] with one to four grid axes, none empty, got shape {dense.shape}."
            )
        check_capacity(capacity)
        capacities = check_capacities(capacities, dense.ndim - 2)
        batch_size, *bounds = dense.shape[:-1]
        check_batch_size(batch_size, len(bounds))
        limit = _keys.axis_limit(len(bounds))
        if max(bounds) > limit:
            raise ValueError(f"`dense` of shape {dense.shape} has an axis longer than {limit}, the range of site keys.")
        occupied = (dense != 0).any(-1)
        needed = occupied.sum(dtype=jnp.int32)
        at = jnp.stack(jnp.nonzero(occupied, size=min(capacity, occupied.size)), 1).astype(jnp.int32)
        count = jnp.minimum(needed, at.shape[0])
        coords, *_ = _coords.unique_sites(at, count[None], capacity=capacity)
        too_many = status.report(Problem.DENSE_CAPACITY, needed > capacity, needed, capacity)
        stride = (1,) * len(bounds)
        sites = Sites(coords, count, too_many, stride, capacities, batch_size, tuple(bounds), "morton")
        feats = dense[tuple(jnp.where(sites.is_real[:, None], coords, 0).T)]
        return SparseTensor(sites, feats)

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The real rows on the host, coordinates and features, after `check`."""
        check_tensor("rows", self)
        self.check()
        n = int(self.count)
        return np.asarray(self.coords)[:n], np.asarray(self.feats)[:n]


def on_sites(sites: Sites, feats: jax.Array, parts: tuple[jax.Array, ...] | None = None) -> SparseTensor:
    """A tensor from features that are zero on padding rows already, and its parts; checks and masks nothing."""
    x = SparseTensor.tree_unflatten(None, (sites, feats))
    object.__setattr__(x, "is_masked", True)
    if parts is not None:
        object.__setattr__(x, "parts", parts)
    return x
