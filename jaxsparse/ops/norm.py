"""Batch normalisation over the real rows of a sparse tensor."""

from __future__ import annotations

from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse.ops.channels import ChannelNorm
from jaxsparse.ops.conv.reference import accumulation_dtype
from jaxsparse.ops.elementwise import map_features
from jaxsparse.tensor import SparseTensor


def batch_statistics(x: SparseTensor, axis_name: Hashable | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean and variance of each channel over the real rows, in float32 or wider.

    Args:
      x: features `[N, C]`.
      axis_name: mesh or `vmap` axes to sum over too. Sums and counts are added, not means: shards may hold unequal
        numbers of rows.

    Returns:
      Mean `[C]`, biased variance `[C]`, and the number of rows, a scalar. Without rows, zeros.
    """
    real = x.sites.is_real[:, None]
    feats = jnp.where(real, x.feats, 0).astype(accumulation_dtype(x.dtype))
    count = x.sites.is_real.sum(dtype=feats.dtype)
    total, count = _sum_over(axis_name, feats.sum(0), count)
    rows = jnp.maximum(count, 1)
    mean = total / rows
    # Around the mean, not E[x^2] - mean^2, which cancels where the mean is large.
    (square,) = _sum_over(axis_name, jnp.where(real, (feats - mean[None]) ** 2, 0).sum(0))
    return mean, square / rows, count


def _sum_over(axis_name, *values):
    return values if axis_name is None else lax.psum(values, axis_name)


def batch_norm(
    x: SparseTensor,
    mean: jax.Array,
    variance: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    epsilon: float = 1e-5,
) -> SparseTensor:
    """`(x - mean) / sqrt(variance + epsilon) * scale + bias` on real rows, computed in float32 or wider.

    Args:
      x: features `[N, C]`; the result has its dtype.
      mean, variance: `[C]`, from `batch_statistics` or running ones.
      scale, bias: `[C]` or None.
      epsilon: added to the variance.
    """
    norm = ChannelNorm(mean, variance, scale, bias, epsilon)
    return map_features(lambda feats: norm(feats.astype(accumulation_dtype(x.dtype))).astype(x.dtype), x)
