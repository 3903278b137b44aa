"""Every JAX name that moves between versions, in one place (jax 0.10 to 0.12)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive, get_opaque_trace_state
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import PartitionSpec

__all__ = [
    "Primitive",
    "ad",
    "apply_primitive",
    "batching",
    "bind_equation",
    "make_user_context",
    "mlir",
    "out_aval",
    "promote",
    "sub_jaxprs",
    "trace_state",
    "zero_tangent",
]

apply_primitive = xla.apply_primitive
make_user_context = jax.make_user_context


def trace_state():
    """What tells one trace from another; equal states may share traced values."""
    return get_opaque_trace_state()


def _varying_axes(x) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def promote(operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Makes the operands of one bind agree inside `shard_map`: each varies over the union of all their mesh axes.

    A primitive that skips this gives wrong gradients there without an error: the transpose of the cast is the sum over
    devices. On an explicit mesh the operands are made replicated first, since a custom call sees whole arrays.
    """
    union = frozenset().union(*map(_varying_axes, operands))
    out = []
    for x in operands:
        sharding = jax.typeof(x).sharding
        if any(entry is not None for entry in sharding.spec):
            x = jax.sharding.reshard(x, sharding.update(spec=PartitionSpec(*[None] * x.ndim)))
        missing = tuple(sorted(union - _varying_axes(x)))
        out.append(lax.pcast(x, missing, to="varying") if missing else x)
    return out


def out_aval(like, shape: Sequence[int], dtype):
    """The abstract value of a result: `like`'s mesh and varying axes, another shape and dtype."""
    sharding = like.sharding.update(spec=PartitionSpec(*[None] * len(shape)))
    return like.update(
        shape=tuple(shape), dtype=jax.dtypes.canonicalize_dtype(dtype), sharding=sharding, weak_type=False
    )


def zero_tangent(primal) -> ad.Zero:
    """The symbolic zero that stands for the tangent of a value."""
    return ad.Zero(jax.typeof(primal).to_tangent_aval())


def sub_jaxprs(eqn) -> list[ClosedJaxpr]:
    """The bodies of an equation of a jaxpr, such as those of `jit`, `scan` and `cond`."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, ClosedJaxpr):
                found.append(item)
            elif isinstance(item, Jaxpr):
                found.append(ClosedJaxpr(item, ()))
    return found


def bind_equation(eqn, values: Sequence) -> list:
    """Runs one equation of a jaxpr."""
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]
