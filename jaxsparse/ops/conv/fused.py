"""A convolution and what follows it: normalisation of channels, a residual, an activation, rounded once.

On CUDA, for 16-bit features, one kernel; elsewhere the same steps one after the other, on sums in float32 or wider.
Under differentiation the steps run, as products and plain JAX: forward mode and every order go through.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxsparse._keys import real_rows
from jaxsparse._primitive import Op
from jaxsparse.ops.channel_norm import ChannelNorm
from jaxsparse.ops.conv import primitives
from jaxsparse.ops.conv.reference import accumulation_dtype
from jaxsparse.ops.elementwise import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class Ending:
    """What follows the sums, without its arrays.

    Attributes:
      given: which operands there are, of "mean", "variance", "scale", "bias" and "residual", in this order.
      epsilon: see `ChannelNorm`.
      activation: a name of `ACTIVATIONS`.
    """

    given: tuple[str, ...]
    epsilon: float
    activation: str | None

    NAMES = ("mean", "variance", "scale", "bias", "residual")
    is_empty = property(lambda self: not self.given and self.activation is None, doc="Whether nothing follows.")

    @staticmethod
    def of(norm: ChannelNorm, residual: jax.Array | None, activation: str | None) -> Ended:
        """The ending and its operands."""
        arrays = {name: getattr(norm, name) for name in Ending.NAMES[:4]} | {"residual": residual}
        arrays = {name: array for name, array in arrays.items() if array is not None}
        return Ending(tuple(arrays), norm.epsilon, activation), list(arrays.values())

    def __call__(self, sums: jax.Array, counts: jax.Array, operands: Sequence[jax.Array], dtype) -> jax.Array:
        """The steps on sums `[N, C]`, in float32 or wider; padding is selected away before and after."""
        numbers = dict(zip(self.given, operands, strict=True))
        residual = numbers.pop("residual", None)
        real = real_rows(counts, sums.shape[0])[:, None]

        def wide(feats: jax.Array) -> jax.Array:
            return jnp.where(real, feats, 0).astype(accumulation_dtype(dtype))

        feats = ChannelNorm(**numbers, epsilon=self.epsilon)(wide(sums))
        if residual is not None:
            feats = feats + wide(residual)
        return jnp.where(real, ACTIVATIONS[self.activation](feats), 0).astype(dtype)

    def attributes(self) -> dict[str, int | float]:
        """As the custom call takes it."""
        given = sum(1 << i for i, name in enumerate(self.NAMES) if name in self.given)
        return {
            "given": given,
            "activation": list(ACTIVATIONS).index(self.activation),
            "epsilon": float(self.epsilon),
        }


def _counts(kernel_map, transposed: bool):
    """Real rows of the result, from (table, masks, in_counts, out_counts)."""
    return kernel_map[2 if transposed else 3]


def _custom_call(platform, x, w, *rest, spec, out_dtype, transposed, ending):
    kernel_map, operands = rest[:4], rest[4:]
    call = primitives.dgrad_call if transposed else primitives.forward_call
    if spec.dtype.itemsize == 2 and spec.uses_gemm(platform):
        ended = (ending.attributes(), [a.astype(jnp.float32) if a.dtype == jnp.float64 else a for a in operands])
        return call(platform, x, w, *kernel_map, spec=spec, out_dtype=out_dtype, ended=ended)
    (sums,) = call(platform, x, w, *kernel_map, spec=spec, out_dtype=accumulation_dtype(spec.dtype))
    return [ending(sums, _counts(kernel_map, transposed), operands, out_dtype)]


def _reference(x, w, *rest, spec, out_dtype, transposed, ending):
    kernel_map, operands = rest[:4], rest[4:]
    reference = primitives.dgrad_reference if transposed else primitives.forward_reference
    (sums,) = reference(x, w, *kernel_map, spec=spec, out_dtype=accumulation_dtype(spec.dtype))
    return [ending(sums, _counts(kernel_map, transposed), operands, out_dtype)]


def _shapes(x, w, table, *_, spec, out_dtype, transposed, **__):
    shape = (spec.in_rows, w.shape[1]) if transposed else (table.shape[1], w.shape[2])
    return [(shape, out_dtype)]


Ended = tuple[Ending, list[jax.Array]]
op = Op("sparse_conv_fused", _shapes, _custom_call, _reference)
op.set_batching(primitives.fold_scenes(op))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def fused(params, x, w, kernel_map, operands):
    """`ending(product(x, w))`; params are those of `op` as pairs, kernel_map its four arrays."""
    return op(x, w, *kernel_map, *operands, **dict(params))[0]


def _steps(params, x, w, kernel_map, operands):
    """The same as a product, rounded, and the ending in plain JAX."""
    rest = dict(params)
    transposed, ending = rest.pop("transposed"), rest.pop("ending")
    product = primitives.dgrad if transposed else primitives.forward
    (sums,) = product(x, w, *kernel_map, **rest)
    return ending(sums, _counts(kernel_map, transposed), operands, rest["out_dtype"])


@functools.partial(fused.defjvp, symbolic_zeros=True)
def _jvp(params, primals, tangents):
    """That of the steps, along the operands that have a tangent."""
    values, tree = jax.tree.flatten(primals)
    moving = {i: t for i, t in enumerate(jax.tree.leaves(tangents)) if type(t) is not SymbolicZero}

    def along(moved):
        return _steps(params, *jax.tree.unflatten(tree, [moved.get(i, v) for i, v in enumerate(values)]))

    return jax.jvp(along, ({i: values[i] for i in moving},), (moving,))
