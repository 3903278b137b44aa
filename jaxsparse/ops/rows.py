"""Rows by index: gather, and its transpose, the sum over rows that share an index.

The sum is a custom call because XLA's own scatter adds floats atomically on GPUs, in an order that changes from run to
run.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _ffi, _workspace
from jaxsparse._dtypes import accumulation_dtype
from jaxsparse._primitive import Op
from jaxsparse.sites import as_int32
from jaxsparse.tensor import check_float


def _gather_reference(x, index, *, groups):
    if groups == 0:
        return [jnp.zeros((index.shape[0], x.shape[1]), x.dtype)]
    valid = (index >= 0) & (index < groups)
    return [jnp.where(valid[:, None], x[jnp.clip(index, 0, groups - 1)], jnp.zeros((), x.dtype))]


def _group_reference(index, *, groups):
    index = jnp.where((index >= 0) & (index < groups), index, groups)  # what is outside sorts behind the others
    order = jnp.argsort(index, stable=True).astype(jnp.int32)
    offsets = jnp.searchsorted(index[order], jnp.arange(groups + 1, dtype=jnp.int32)).astype(jnp.int32)
    return [jnp.where(index[order] < groups, order, -1), offsets]


def _group_call(platform, index, *, groups):
    positions = index.shape[0]
    structs = [
        jax.ShapeDtypeStruct((positions,), jnp.int32),
        jax.ShapeDtypeStruct((groups + 1,), jnp.int32),
        _workspace.struct(platform, _workspace.invert_index(positions)),
    ]
    return _ffi.call("jaxsparse_invert_index_v1", structs, index)[:2]


def _sum_reference(x, index, order, offsets, *, groups):
    dtype = accumulation_dtype(x.dtype)
    index = jnp.where(index >= 0, index, groups)  # past the end: dropped
    return [jax.ops.segment_sum(x.astype(dtype), index, groups).astype(x.dtype)]


def _sum_call(platform, x, index, order, offsets, *, groups):
    dtype = accumulation_dtype(x.dtype) if platform == "cpu" else x.dtype
    struct = jax.ShapeDtypeStruct((groups, x.shape[1]), dtype)
    (y,) = _ffi.call("jaxsparse_segment_sum_v1", [struct], x.astype(dtype), order, offsets)
    return [y.astype(x.dtype)]


_gather = Op(
    "gather_rows",
    lambda x, index, *, groups, implementation: [((index.shape[0], x.shape[1]), x.dtype)],
    None,
    _gather_reference,
)
_group = Op(
    "group_rows",
    lambda index, *, groups, implementation: [((index.shape[0],), jnp.int32), ((groups + 1,), jnp.int32)],
    _group_call,
    _group_reference,
)
_sum = Op(
    "sum_rows",
    lambda x, index, order, offsets, *, groups, implementation: [((groups, x.shape[1]), x.dtype)],
    _sum_call,
    _sum_reference,
)


_gather.set_linear_in_first(lambda ct, index, **params: _sum(ct, index, *_group(index, **params), **params)[0])
_sum.set_linear_in_first(lambda ct, index, order, offsets, **params: _gather(ct, index, **params)[0])


def _check_rows(op: str, x: jax.Array, index: jax.Array) -> None:
    if x.ndim != 2:
        raise ValueError(f"{op}: `x` must be [rows, C], got shape {x.shape}.")
    if index.ndim != 1 or index.dtype != jnp.int32:
        raise ValueError(f"{op}: `index` must be int32 [P], got {index.dtype}{list(index.shape)}.")


def gather_rows(x: jax.Array, index: jax.Array, *, implementation: str = "auto") -> jax.Array:
    """`y[p] = x[index[p]]`, zero where the index is outside [0, N).

    Args:
      x: `[N, C]`.
      index: int32 `[P]`.
      implementation: "auto" or "xla"; matters to the gradient, which is `sum_rows`.

    Returns:
      `[P, C]`.
    """
    x, index = jnp.asarray(x), as_int32("index", index)
    _check_rows("gather_rows", x, index)
    return _gather(x, index, groups=x.shape[0], implementation=implementation)[0]


def sum_rows(
    x: jax.Array,
    index: jax.Array,
    groups: int,
    *,
    grouped: tuple[jax.Array, jax.Array] | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """`y[v] = sum of x[p] over all p with index[p] = v`, in a fixed order, accumulated in float32 or wider.

    Args:
      x: `[P, C]`.
      index: int32 `[P]`; rows whose index is outside [0, groups) are left out, whatever they hold.
      groups: rows of the result.
      grouped: where it is known already, the index by group, int32 `order` `[P]` and `offsets` `[groups + 1]`: the rows
        of group v are `order[offsets[v] : offsets[v + 1]]`. It must agree with `index`.
      implementation: "auto" or "xla".

    Returns:
      `[groups, C]`, bitwise equal from run to run with "auto".
    """
    x, index = jnp.asarray(x), as_int32("index", index)
    _check_rows("sum_rows", x, index)
    check_float("sum_rows: x", x)
    if not isinstance(groups, int | np.integer) or groups < 0:
        raise ValueError(f"sum_rows: `groups` (={groups!r}) must be an integer, at least 0.")
    if x.shape[0] != index.shape[0]:
        raise ValueError(
            f"sum_rows: `x` has {x.shape[0]} rows but `index` has {index.shape[0]}; it needs one for each."
        )
    params = {"groups": groups, "implementation": implementation}
    return _sum(x, index, *(grouped or _group(index, **params)), **params)[0]
