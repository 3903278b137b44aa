"""Normalisation of each channel by given numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike


def per_channel(op: str, width: int, whose: str, vectors: Mapping[str, ArrayLike | None]) -> tuple[Any, ...]:
    """The vectors as arrays of floats; refuses one that is not `[width]`. `whose` says what has that width."""
    found = []
    for name, numbers in vectors.items():
        array = None if numbers is None else jnp.asarray(numbers)
        if array is not None and array.shape != (width,):
            raise ValueError(f"{op}: `{name}` of shape {array.shape} must be [{width}], {whose}.")
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{op}: `{name}` has dtype {array.dtype}; it must be one of floats.")
        found.append(array)
    return tuple(found)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ChannelNorm:
    """`(y - mean) / sqrt(variance + epsilon) * scale + bias` for each channel; what is None is left out.

    A batch norm with known statistics, or with `scale` and `bias` alone any affine map of channels.

    Attributes:
      mean, variance, scale, bias: `[C]`, or None.
      epsilon: added to the variance.
    """

    mean: jax.Array | None = None
    variance: jax.Array | None = None
    scale: jax.Array | None = None
    bias: jax.Array | None = None
    epsilon: float = dataclasses.field(default=1e-5, metadata={"static": True})

    def __call__(self, feats: jax.Array) -> jax.Array:
        """Normalises `[N, C]`, in its dtype."""

        def row(numbers: jax.Array) -> jax.Array:
            return numbers.astype(feats.dtype)[None]

        factor = None if self.variance is None else lax.rsqrt(row(self.variance) + self.epsilon)
        if self.scale is not None:
            factor = row(self.scale) if factor is None else factor * row(self.scale)
        if self.mean is not None:
            feats = feats - row(self.mean)
        if factor is not None:
            feats = feats * factor
        return feats if self.bias is None else feats + row(self.bias)
