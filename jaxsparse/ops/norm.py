"""Batch normalisation over the real rows of a sparse tensor."""

from __future__ import annotations

from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._dtypes import accumulation_dtype
from jaxsparse.ops.channel_norm import per_channel
from jaxsparse.ops.channels import affine, statistics
from jaxsparse.ops.elementwise import activate, check_activation
from jaxsparse.ops.join import check_features, common_sites
from jaxsparse.ops.normalize import normalize
from jaxsparse.tensor import SparseTensor, check_tensor, on_sites


def _count(x: SparseTensor) -> jax.Array:
    """The number of real rows in the dtype of sums."""
    return jnp.clip(x.sites.counts[0], 0, x.capacity).astype(accumulation_dtype(x.dtype))


def batch_statistics(x: SparseTensor, axis_name: Hashable | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean and variance of each channel over the real rows, in float32 or wider.

    Args:
      x: features `[N, C]`.
      axis_name: mesh or `vmap` axes to sum over too. Sums and counts are added, not means: shards may hold unequal
        numbers of rows.

    Returns:
      Mean `[C]`, biased variance `[C]`, and the number of rows, a scalar. Without rows, zeros.
    """
    check_tensor("batch_statistics", x)
    mean, squares = statistics(x.feats, x.sites.counts)
    count = _count(x)
    rows = jnp.maximum(count, 1)
    if axis_name is not None:
        here = count
        count, total = lax.psum((count, here * mean), axis_name)
        rows = jnp.maximum(count, 1)
        of_all = total / rows
        squares = lax.psum(squares + here * (mean - of_all) ** 2, axis_name)
        mean = of_all
    return mean, squares / rows, count


def batch_norm(
    x: SparseTensor,
    mean: jax.Array,
    variance: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    epsilon: float = 1e-5,
    residual: SparseTensor | None = None,
    activation: str | None = None,
) -> SparseTensor:
    """`activation((x - mean) / sqrt(variance + epsilon) * scale + bias + residual)` on real rows.

    The sum is taken in float32 or wider and rounded once, the activation is that of the rounded sum.

    Args:
      x: features `[N, C]`; the result has its dtype.
      mean, variance: `[C]`, from `batch_statistics` or running ones.
      scale, bias: `[C]` or None.
      epsilon: added to the variance.
      residual: tensor on equal sites with as many features, of any dtype. Sites that differ are reported in `status`.
      activation: "relu", "leaky_relu", "gelu" or "silu"; a ReLU costs the backward pass nothing.

    Raises:
      ValueError: where one of the vectors is not as long as the features are wide, or there is no such activation.
    """
    check_tensor("batch_norm", x)
    check_activation("batch_norm", activation)
    vectors = {"mean": mean, "variance": variance, "scale": scale, "bias": bias}
    mean, variance, scale, bias = per_channel("batch_norm", x.num_features, "the features", vectors)
    sites, dtype = x.sites, accumulation_dtype(x.dtype)
    if residual is not None:
        sites = common_sites("batch_norm", (x, residual))
        check_features("batch_norm", x, residual)
    factor = lax.rsqrt(variance.astype(dtype) + epsilon)
    if scale is not None:
        factor = factor * scale.astype(dtype)

    # Around a constant of the mean's value, so that nothing cancels; the mean's derivative comes by the shift.
    mean = mean.astype(dtype)
    center = lax.stop_gradient(mean)
    shift = (center - mean) * factor
    if bias is not None:
        shift = shift + bias.astype(dtype)
    counts = x.sites.counts
    if residual is None:
        is_relu = activation == "relu"
        y = on_sites(sites, affine(x.feats, factor, shift, center, counts, relu=is_relu))
        return y if is_relu else activate(y, activation)
    wide = affine(x.feats, factor, shift, center, counts, dtype=dtype) + residual.feats.astype(x.dtype).astype(dtype)
    return activate(on_sites(sites, jnp.where(sites.is_real[:, None], wide, 0).astype(x.dtype)), activation)


def normalize_batch(
    x: SparseTensor,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    epsilon: float = 1e-5,
    residual: SparseTensor | None = None,
    activation: str | None = None,
    axis_name: Hashable | None = None,
) -> tuple[SparseTensor, jax.Array, jax.Array, jax.Array]:
    """`activation(batch_norm(x, *batch_statistics(x)[:2]) + residual)`, the sum rounded once, with the statistics.

    On GPUs this is one kernel, and its gradient is another, unless `axis_name` is given.

    Args:
      x: features `[N, C]`; the result has its dtype.
      scale, bias: `[C]` or None.
      epsilon: added to the variance.
      residual: tensor on equal sites with as many features, in any dtype. Sites that differ are reported in `status`.
      activation: "relu", "leaky_relu", "gelu" or "silu".
      axis_name: mesh or `vmap` axes over which statistics are summed, see `batch_statistics`.

    Returns:
      The result, and what `batch_statistics` returns: mean and biased variance `[C]`, and the number of rows.

    Raises:
      ValueError: as `batch_norm`, and where the residual has other features.
    """
    check_tensor("normalize_batch", x)
    check_activation("normalize_batch", activation)
    vectors = {"scale": scale, "bias": bias}
    scale, bias = per_channel("normalize_batch", x.num_features, "the features", vectors)
    if axis_name is not None:
        mean, variance, count = batch_statistics(x, axis_name)
        y = batch_norm(x, mean, variance, scale, bias, epsilon=epsilon, residual=residual, activation=activation)
        return y, mean, variance, count
    sites, others = x.sites, None
    if residual is not None:
        sites = common_sites("normalize_batch", (x, residual))
        check_features("normalize_batch", x, residual)
        others = residual.astype(x.dtype).unmasked
    dtype = accumulation_dtype(x.dtype)
    given = [v.dtype for v in (scale, bias) if v is not None]
    shared = given[0] if given and given[0] == given[-1] else dtype  # the kernel takes both in one dtype
    scale = jnp.ones(x.num_features, shared) if scale is None else scale.astype(shared)
    bias = jnp.zeros(x.num_features, shared) if bias is None else bias.astype(shared)
    is_relu, counts = activation == "relu", x.sites.counts
    feats, mean, variance = normalize(x.unmasked, scale, bias, counts, others, epsilon=epsilon, relu=is_relu)
    y = on_sites(sites, feats)
    return y if is_relu else activate(y, activation), mean, variance, _count(x)
