"""Functions of each row by itself: activations, linear maps. Padding rows stay zero whatever they held."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse.ops.conv.reference import accumulation_dtype
from jaxsparse.tensor import SparseTensor, on_sites


def map_features(fn: Callable[[jax.Array], jax.Array], x: SparseTensor) -> SparseTensor:
    """Applies `fn` `[N, C] -> [N, C']`, which must treat rows alike, to the real rows.

    Padding is set to zero before `fn` as well as after: its derivative at whatever padding holds could be NaN, and zero
    times NaN would reach the gradient.
    """
    real = x.sites.is_real[:, None]
    return on_sites(x.sites, jnp.where(real, fn(jnp.where(real, x.feats, 0)), 0))


def relu(x: SparseTensor) -> SparseTensor:
    """`max(x, 0)`."""
    return map_features(jax.nn.relu, x)


def leaky_relu(x: SparseTensor, negative_slope: float = 0.01) -> SparseTensor:
    """`x` where positive, else `negative_slope * x`."""
    return map_features(lambda f: jax.nn.leaky_relu(f, negative_slope), x)


def gelu(x: SparseTensor, approximate: bool = True) -> SparseTensor:
    """Gaussian error linear unit, `jax.nn.gelu`."""
    return map_features(lambda f: jax.nn.gelu(f, approximate), x)


def silu(x: SparseTensor) -> SparseTensor:
    """`x * sigmoid(x)`."""
    return map_features(jax.nn.silu, x)


ACTIVATIONS: dict[str | None, Callable[[jax.Array], jax.Array]] = {
    None: lambda feats: feats,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}
"""By name, with their defaults, in the order in which `cuda/conv/gemm.h` numbers them."""


def activate(x: SparseTensor, activation: str | None) -> SparseTensor:
    """The activation of that name, with its defaults; None leaves `x` as it is."""
    return x if activation is None else map_features(ACTIVATIONS[activation], x)


def linear(
    x: SparseTensor, kernel: jax.Array, bias: jax.Array | None = None, *, precision: lax.PrecisionLike = None
) -> SparseTensor:
    """`x.feats @ kernel + bias` on real rows, in the dtype of `x`, accumulated in float32 or wider.

    Args:
      x: `[N, C_in]` features.
      kernel: `[C_in, C_out]`.
      bias: `[C_out]` or None.
      precision: of float32 products, as jax spells it.

    Raises:
      ValueError: where the kernel does not fit the features.
    """
    if kernel.ndim != 2 or kernel.shape[0] != x.num_features:
        raise ValueError(
            f"linear: kernel of shape {kernel.shape} does not fit x.feats with {x.num_features} features (shape "
            f"{x.feats.shape}); it must be [{x.num_features}, C_out]."
        )

    def product(feats):
        y = jnp.dot(
            feats, kernel.astype(x.dtype), precision=precision, preferred_element_type=accumulation_dtype(x.dtype)
        ).astype(x.dtype)
        return y if bias is None else y + bias.astype(x.dtype)[None]

    return map_features(product, x)
