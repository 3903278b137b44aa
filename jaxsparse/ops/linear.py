"""Linear maps of rows: a 1x1 convolution, by XLA's own products.

    rows(x, w)[m] = x[m] @ w                    [N, C_out], 0 for padding
    outer(x, g) = sum_m outer(x[m], g[m])       [C_in, C_out], over the real rows

The transposes of each are the other (`rows` with w transposed too). Ops of their own, because the derivative of a plain
16-bit product with float32 sums multiplies in float32, and a masked input would be kept beside the input.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._keys import real_rows
from jaxsparse._primitive import Op
from jaxsparse.ops.channel_norm import check_per_channel
from jaxsparse.ops.conv.reference import accumulation_dtype, canonical_precision
from jaxsparse.tensor import SparseTensor, check_tensor, on_sites


def _dot(a, b, contract, dtype, out_dtype, precision):
    """Operands in `dtype`, sums in float32 or wider, rounded once."""
    dimensions = ((contract[0],), (contract[1],)), ((), ())
    options = {"precision": precision, "preferred_element_type": accumulation_dtype(dtype)}
    return lax.dot_general(a.astype(dtype), b.astype(dtype), dimensions, **options).astype(out_dtype)


def linear_rows_reference(x, w, counts, *, transposed, dtype, out_dtype, precision):
    """`linear_rows` in plain JAX."""
    y = _dot(x, w, (1, 1 if transposed else 0), dtype, out_dtype, precision)
    return [jnp.where(real_rows(counts, x.shape[0])[:, None], y, 0)]


def _outer_reference(x, g, counts, *, dtype, out_dtype, precision):
    real = real_rows(counts, x.shape[0])[:, None]
    return [_dot(jnp.where(real, x, 0), jnp.where(real, g, 0), (0, 0), dtype, out_dtype, precision)]


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


def _weights_cotangent(ct, x, counts, *, transposed, **params):
    return _outer(*((ct, x) if transposed else (x, ct)), counts, **params)[0]


linear_rows.set_bilinear(
    lambda ct, w, counts, *, transposed, **params: linear_rows(ct, w, counts, transposed=not transposed, **params)[0],
    _weights_cotangent,
)
_outer.set_bilinear(
    lambda ct, g, counts, **params: linear_rows(g, ct, counts, transposed=True, **params)[0],
    lambda ct, x, counts, **params: linear_rows(x, ct, counts, transposed=False, **params)[0],
)
linear_rows.batch_as_reference()
_outer.batch_as_reference()


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
    kernel, bias = jnp.asarray(kernel), None if bias is None else jnp.asarray(bias)
    if kernel.ndim != 2 or kernel.shape[0] != x.num_features:
        raise ValueError(
            f"linear: kernel of shape {kernel.shape} does not fit x.feats with {x.num_features} features (shape "
            f"{x.feats.shape}); it must be [{x.num_features}, C_out]."
        )
    check_per_channel("linear", kernel.shape[1], "the output features", {"bias": bias})
    options = {"dtype": x.dtype, "out_dtype": x.dtype, "precision": canonical_precision(precision)}
    (y,) = linear_rows(x.unmasked, kernel, x.sites.counts, transposed=False, **options)
    if bias is not None:
        y = jnp.where(x.sites.is_real[:, None], y + bias.astype(x.dtype)[None], 0)
    return on_sites(x.sites, y)
