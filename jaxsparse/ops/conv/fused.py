"""A convolution and what follows it: normalisation of channels, a residual, an activation, rounded once.

On CUDA, for 16-bit features, one kernel; elsewhere the same steps one after the other, on sums in float32 or wider.
Under differentiation the steps run, as products and plain JAX: forward mode and every order go through. The input is
one array, or in place of a concatenation two, which the kernel reads piece by piece and all else puts together.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxsparse import _ffi
from jaxsparse._dtypes import accumulation_dtype
from jaxsparse._keys import real_rows
from jaxsparse._primitive import Op
from jaxsparse.ops.channel_norm import ChannelNorm
from jaxsparse.ops.conv import choices, primitives
from jaxsparse.ops.conv.config import ConvConfig
from jaxsparse.ops.elementwise import ACTIVATIONS
from jaxsparse.ops.linear import linear_rows, linear_rows_reference
from jaxsparse.tensor import SparseTensor


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
        """The steps on sums `[N, C]`, in float32 or wider. Padding is set to 0 before and after."""
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


Ended = tuple[Ending, list[jax.Array]]


def inputs(x: SparseTensor) -> tuple[jax.Array, ...]:
    """The features, or two arrays that stand for their concatenation, as the kernel takes them."""
    is_served = len(x.parts) == 2 and x.dtype.itemsize == 2 and all(part.shape[1] % 8 == 0 for part in x.parts)
    return x.parts if is_served else (x.unmasked,)


def _beside(first: jax.Array, others: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate([first, *others], 1) if others else first


def _as_call(ending, operands, others):
    """What the custom call takes beyond the product's: attributes, operands of the ending, further inputs."""
    attributes = ending.attributes()
    if others:
        attributes["given"] |= 1 << len(Ending.NAMES)
    wide = [a.astype(jnp.float32) if a.dtype == jnp.float64 else a for a in operands]
    return attributes, wide, others


def _counts(rows, product: str):
    """The counts of the result's real rows: one of the map's four arrays, or the only one of "linear"."""
    return rows[{"forward": 3, "dgrad": 2, "linear": 0}[product]]


def _split(rest, rows, ending):
    """Splits the operands after x and w: `rows` arrays that describe rows, the ending's operands, further inputs."""
    end = rows + len(ending.given)
    return rest[:rows], rest[rows:end], rest[end:]


def _custom_call(platform, x, w, *rest, spec, out_dtype, product, ending):
    kernel_map, operands, others = _split(rest, 4, ending)
    call = primitives.dgrad_call if product == "dgrad" else primitives.forward_call
    if spec.dtype.itemsize == 2 and spec.uses_gemm(platform):
        ended = _as_call(ending, operands, others)
        return call(platform, x, w, *kernel_map, spec=spec, out_dtype=out_dtype, ended=ended)
    wide = accumulation_dtype(spec.dtype)
    (sums,) = call(platform, _beside(x, others), w, *kernel_map, spec=spec, out_dtype=wide)
    return [ending(sums, _counts(kernel_map, product), operands, out_dtype)]


def _reference(x, w, *rest, spec, out_dtype, product, ending):
    kernel_map, operands, others = _split(rest, 4, ending)
    reference = primitives.dgrad_reference if product == "dgrad" else primitives.forward_reference
    (sums,) = reference(_beside(x, others), w, *kernel_map, spec=spec, out_dtype=accumulation_dtype(spec.dtype))
    return [ending(sums, _counts(kernel_map, product), operands, out_dtype)]


def _shapes(x, w, table, *_, spec, out_dtype, product, **__):
    shape = (spec.in_rows, w.shape[1]) if product == "dgrad" else (table.shape[1], w.shape[2])
    return [(shape, out_dtype)]


def _linear_call(platform, x, w, *rest, dtype, out_dtype, precision, tile, ending, **params):
    (counts,), operands, others = _split(rest, 1, ending)
    rows, (c_in, c_out) = x.shape[0], w.shape
    spec = primitives.Spec(dtype, precision, rows, ConvConfig(), is_symmetric=True)
    problem = choices.Problem(spec, rows, rows, 1, c_in, c_out)
    if dtype.itemsize != 2 or not spec.uses_gemm(platform) or problem.widths(platform) != w.shape:
        params |= {"dtype": dtype, "out_dtype": out_dtype, "precision": precision, "tile": tile, "ending": ending}
        return _linear_reference(x, w, *rest, **params)
    attributes, operands, others = _as_call(ending, operands, others)
    attributes |= primitives.tile_attributes(tile or choices.conv(platform, problem).heuristic())
    struct = jax.ShapeDtypeStruct((rows, c_out), out_dtype)
    return _ffi.call(
        "jaxsparse_linear_fused_v1", [struct], x, w.astype(dtype), counts, *operands, *others, **attributes
    )


def _linear_reference(x, w, *rest, dtype, out_dtype, precision, ending, **_):
    (counts,), operands, others = _split(rest, 1, ending)
    options = {"dtype": dtype, "out_dtype": accumulation_dtype(dtype), "precision": precision}
    (sums,) = linear_rows_reference(_beside(x, others), w, counts, transposed=False, **options)
    return [ending(sums, counts, operands, out_dtype)]


op = Op("sparse_conv_fused", _shapes, _custom_call, _reference)
op.set_batching(primitives.fold_scenes(op))
linear = Op(
    "linear_fused",
    lambda x, w, *_, out_dtype, **__: [((x.shape[0], w.shape[1]), out_dtype)],
    _linear_call,
    _linear_reference,
)
linear.batch_as_reference()


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def fused(params, inputs, w, rows, operands):
    """`ending(product(inputs beside each other, w))`; padding rows of the result may hold anything.

    Args:
      params: those of `op` or `linear` as pairs, and `product`: "forward", "dgrad" or "linear".
      inputs: one array or two, see `inputs`.
      w: the weights.
      rows: the four arrays of a kernel map; for "linear" the counts.
      operands: those of the ending.
    """
    first, *others = inputs
    every, params = (first, w, *rows, *operands, *others), dict(params)
    if params["product"] == "linear":
        del params["product"]
        return linear(*every, **params)[0]
    return op(*every, **params)[0]


def _steps(params, inputs, w, rows, operands):
    """The same as a product, rounded, and the ending in plain JAX."""
    rest = dict(params)
    product, ending = rest.pop("product"), rest.pop("ending")
    first, *others = inputs
    x = _beside(first, others)
    if product == "linear":
        del rest["tile"]
        (sums,) = linear_rows(x, w, *rows, transposed=False, zero_padded=False, **rest)
    else:
        (sums,) = primitives.PRODUCTS[product](x, w, *rows, **rest)
    return ending(sums, _counts(rows, product), operands, rest["out_dtype"])


@functools.partial(fused.defjvp, symbolic_zeros=True)
def _jvp(params, primals, tangents):
    """That of the steps, along the operands that have a tangent."""
    values, tree = jax.tree.flatten(primals)
    moving = {i: t for i, t in enumerate(jax.tree.leaves(tangents)) if type(t) is not SymbolicZero}

    def along(moved):
        return _steps(params, *jax.tree.unflatten(tree, [moved.get(i, v) for i, v in enumerate(values)]))

    return jax.jvp(along, ({i: values[i] for i in moving},), (moving,))
