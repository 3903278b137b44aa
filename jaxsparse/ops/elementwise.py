"""Functions of each number by itself. Padding rows stay zero whatever they held."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxsparse._keys import real_rows
from jaxsparse._primitive import Op
from jaxsparse.tensor import SparseTensor, check_float, check_tensor, on_sites


def map_features(fn: Callable[[jax.Array], jax.Array], x: SparseTensor) -> SparseTensor:
    """Applies `fn` `[N, C] -> [N, C']`, which must treat rows alike, to the real rows; padding becomes zero.

    Padding rows show `fn` the first real row (ones where there is none): at any other numbers its derivative could be
    NaN, and zero times NaN would reach the gradient of what `fn` closes over.

    Raises:
      ValueError, TypeError: where `fn` returns no floats `[N, C']`.
    """
    check_tensor("map_features", x)
    real = x.sites.is_real[:, None]
    first = jax.lax.stop_gradient(jnp.where(real[:1], x.feats[:1], 1))
    y = fn(jnp.where(real, x.feats, first))
    if y.ndim != 2 or y.shape[0] != x.capacity:
        raise ValueError(f"map_features: `fn` returned shape {y.shape}, but it must return [{x.capacity}, C'].")
    check_float("map_features: result of `fn`", y)
    return on_sites(x.sites, jnp.where(real, y, 0))


def _each(op: str, fn: Callable[[jax.Array], jax.Array], x: SparseTensor) -> SparseTensor:
    """Applies a function of single numbers whose derivative at 0 is finite."""
    check_tensor(op, x)
    real = x.sites.is_real[:, None]
    return on_sites(x.sites, jnp.where(real, fn(jnp.where(real, x.feats, 0)), 0))


# A tangent where the result is positive, else 0. An op of its own, so that a backward pass keeps the result, which the
# next layer keeps too, and no mask beside it.
_where_positive = Op(
    "where_positive",
    lambda dot, y, *, implementation: [(dot.shape, dot.dtype)],
    None,
    lambda dot, y: [jnp.where(y > 0, dot, 0)],
    is_elementwise=True,
)
_where_positive.batch_as_reference()
_where_positive.set_linear_in_first(lambda ct, y, **params: _where_positive(ct, y, **params)[0])


@jax.custom_jvp
def _relu(x: jax.Array, counts: jax.Array) -> jax.Array:
    return jnp.where(real_rows(counts, x.shape[0])[:, None], jnp.maximum(x, 0), 0)


@_relu.defjvp
def _relu_jvp(primals, tangents):
    y = _relu(*primals)
    return y, _where_positive(tangents[0], y)[0]


def relu(x: SparseTensor) -> SparseTensor:
    """`max(x, 0)`; the derivative at 0 is 0."""
    check_tensor("relu", x)
    return on_sites(x.sites, _relu(x.feats, x.sites.counts))


def leaky_relu(x: SparseTensor, negative_slope: float = 0.01) -> SparseTensor:
    """`x` where positive, else `negative_slope * x`."""
    return _each("leaky_relu", lambda f: jax.nn.leaky_relu(f, negative_slope), x)


def gelu(x: SparseTensor, approximate: bool = True) -> SparseTensor:
    """Gaussian error linear unit, `jax.nn.gelu`."""
    return _each("gelu", lambda f: jax.nn.gelu(f, approximate), x)


def silu(x: SparseTensor) -> SparseTensor:
    """`x * sigmoid(x)`."""
    return _each("silu", jax.nn.silu, x)


ACTIVATIONS: dict[str | None, Callable[[jax.Array], jax.Array]] = {
    None: lambda feats: feats,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}
"""By name, with their defaults, in the order in which `cuda/conv/gemm.h` numbers them."""


def check_activation(op: str, activation: str | None) -> None:
    """Refuses a name that is no activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: `activation` (={activation!r}) must be one of {list(ACTIVATIONS)}.")


def activate(x: SparseTensor, activation: str | None) -> SparseTensor:
    """The activation of that name, with its defaults; None leaves `x` as it is."""
    check_activation("activate", activation)
    if activation is None:
        return x
    return relu(x) if activation == "relu" else _each(activation, ACTIVATIONS[activation], x)
