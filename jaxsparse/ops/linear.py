"""Linear maps of rows: a 1x1 convolution, by XLA's own products.

    rows(x, w)[m] = x[m] @ w                    [N, C_out], anything for padding
    outer(x, g) = sum_m outer(x[m], g[m])       [C_in, C_out], over the real rows

The transposes of each are the other (`rows` with w transposed too). Ops of their own, because the derivative of a plain
16-bit product with float32 sums multiplies in float32, and a masked input would be kept beside the input.

XLA masks in kernels of its own, so masks are few: one behind `rows`, which makes cotangents 0 for padding too, as
`outer` takes for granted of g. It masks x, unless `zero_padded` says that x is 0 there: what is not a number would stay
so times 0.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._dtypes import accumulation_dtype, canonical_precision
from jaxsparse._keys import real_rows
from jaxsparse._primitive import Op
from jaxsparse.ops.channel_norm import per_channel
from jaxsparse.tensor import SparseTensor, check_tensor, on_sites


def _dot(a, b, contract, dtype, out_dtype, precision):
    """Operands in `dtype`, sums in float32 or wider, rounded once."""
    dimensions = ((contract[0],), (contract[1],)), ((), ())
    options = {"precision": precision, "preferred_element_type": accumulation_dtype(dtype)}
    return lax.dot_general(a.astype(dtype), b.astype(dtype), dimensions, **options).astype(out_dtype)


def _real_alone(x, counts):
    return jnp.where(real_rows(counts, x.shape[0])[:, None], x, 0)


def linear_rows_reference(x, w, counts, *, transposed, dtype, out_dtype, precision, zero_padded=False):
    """`linear_rows` in plain JAX."""
    return [_dot(x, w, (1, 1 if transposed else 0), dtype, out_dtype, precision)]


def _outer_reference(x, g, counts, *, dtype, out_dtype, precision, zero_padded):
    return [_dot(x if zero_padded else _real_alone(x, counts), g, (0, 0), dtype, out_dtype, precision)]


linear_rows = Op(
    "linear_rows",
    lambda x, w, counts, *, transposed, out_dtype, **_: [((x.shape[0], w.shape[0 if transposed else 1]), out_dtype)],
    None,
    linear_rows_reference,
)
_outer = Op(
    "linear_outer",
    lambda x, g, counts, *, out_dtype, **_: [((x.shape[1], g.shape[1]), out_dtype)],
    None,
    _outer_reference,
)


def _input_cotangent(ct, w, counts, *, transposed, zero_padded, **params):
    return linear_rows(ct, w, counts, transposed=not transposed, zero_padded=not transposed, **params)[0]


def _weights_cotangent(ct, x, counts, *, transposed, zero_padded, **params):
    if transposed:  # x is a cotangent itself, and ct that of another
        return _outer(ct, x, counts, zero_padded=False, **params)[0]
    return _outer(x, ct, counts, zero_padded=zero_padded, **params)[0]


def _rows_of_outer(ct, rows, counts, *, transposed, **params):
    return _real_alone(linear_rows(rows, ct, counts, transposed=transposed, **params)[0], counts)


linear_rows.set_bilinear(_input_cotangent, _weights_cotangent)
_outer.set_bilinear(
    functools.partial(_rows_of_outer, transposed=True), functools.partial(_rows_of_outer, transposed=False)
)
linear_rows.batch_as_reference()
_outer.batch_as_reference()


def check_weights(op: str, kernel: jax.Array) -> None:
    """Refuses weights that are no floats, or of no channels."""
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise TypeError(f"{op}: `kernel` has dtype {kernel.dtype}; it must be one of floats.")
    if 0 in kernel.shape:
        raise ValueError(f"{op}: `kernel` of shape {kernel.shape} is empty; it needs at least one channel in and out.")


def linear(
    x: SparseTensor, kernel: jax.Array, bias: jax.Array | None = None, *, precision: lax.PrecisionLike = None
) -> SparseTensor:
    """`x.feats @ kernel + bias` on real rows, in the dtype of `x`, accumulated in float32 or wider.

    Args:
      x: `[N, C_in]` features.
      kernel: `[C_in, C_out]`; its gradient is not rounded to the dtype of `x`.
      bias: `[C_out]` or None.
      precision: of float32 products, as jax spells it.

    Raises:
      ValueError: where kernel, bias and features do not fit each other.
    """
    check_tensor("linear", x)
    kernel = jnp.asarray(kernel)
    check_weights("linear", kernel)
    if kernel.ndim != 2 or kernel.shape[0] != x.num_features:
        raise ValueError(
            f"linear: kernel of shape {kernel.shape} does not fit x.feats with {x.num_features} features (shape "
            f"{x.feats.shape}); it must be [{x.num_features}, C_out]."
        )
    (bias,) = per_channel("linear", kernel.shape[1], "the output features", {"bias": bias})
    options = {"dtype": x.dtype, "out_dtype": x.dtype, "precision": canonical_precision(precision)}
    options |= {"transposed": False, "zero_padded": x.is_masked and x.unmasked is x.feats}
    (y,) = linear_rows(x.unmasked, kernel, x.sites.counts, **options)
    if bias is not None:
        y = y + bias.astype(x.dtype)[None]
    return on_sites(x.sites, jnp.where(x.sites.is_real[:, None], y, 0))
