"""Every JAX name that moves between versions, in one place (jax 0.10 to 0.12)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, DropVar, Jaxpr, Primitive, Var, get_opaque_trace_state
from jax.interpreters import ad, batching, mlir, partial_eval, xla
from jax.sharding import PartitionSpec

__all__ = [
    "DropVar",
    "Primitive",
    "ad",
    "apply_primitive",
    "batching",
    "bind_equation",
    "make_user_context",
    "mlir",
    "out_aval",
    "promote",
    "set_remat",
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


def set_remat(primitive: Primitive, again: Callable) -> None:
    """Says how `jax.checkpoint` makes a primitive's results again where its policy does not keep them.

    Args:
      primitive: one that runs in the forward pass.
      again: from its equation, an equation of the backward pass that makes some of its results, from its operands and
        others of its results, which are kept; or None, and the primitive runs again.
    """

    def rule(saveable, unknown, at_hand, eqn):
        given = {v for v, is_given in zip(eqn.invars, at_hand, strict=True) if is_given and isinstance(v, Var)}
        nothing, all_results = [False] * len(eqn.outvars), [True] * len(eqn.outvars)

        def kept_for(later):
            return [v for v in later.invars if isinstance(v, Var) and v not in given]

        if any(unknown):
            return None, eqn, all_results, all_results, kept_for(eqn)
        verdict = saveable(eqn.primitive, *[v.aval for v in eqn.invars], **eqn.params)
        if verdict is not False and type(verdict).__name__ != "RecomputeType":
            return eqn, None, nothing, nothing, []
        later = again(eqn)
        if later is None:
            return eqn, eqn, nothing, all_results, kept_for(eqn)
        here = {v for v in (*later.invars, *later.outvars) if isinstance(v, Var)}
        return eqn, later, nothing, [v in here for v in eqn.outvars], kept_for(later)

    partial_eval.partial_eval_jaxpr_custom_rules[primitive] = rule


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
