"""Activation layers on sparse tensors: modules without parameters, for use in `Sequential` (Flax NNX)."""

from __future__ import annotations

from flax import nnx

from jaxsparse import ops
from jaxsparse.tensor import SparseTensor


class ReLU(nnx.Module):
    """`max(x, 0)`."""

    def __call__(self, x: SparseTensor) -> SparseTensor:
        """Features `[N, C]` to `[N, C]`."""
        return ops.relu(x)


class LeakyReLU(nnx.Module):
    """`x` where positive, else `negative_slope * x`."""

    def __init__(self, negative_slope: float = 0.01):
        self.negative_slope = negative_slope

    def __call__(self, x: SparseTensor) -> SparseTensor:
        """Features `[N, C]` to `[N, C]`."""
        return ops.leaky_relu(x, self.negative_slope)


class GELU(nnx.Module):
    """Gaussian error linear unit; `approximate` picks the tanh form."""

    def __init__(self, approximate: bool = True):
        self.approximate = approximate

    def __call__(self, x: SparseTensor) -> SparseTensor:
        """Features `[N, C]` to `[N, C]`."""
        return ops.gelu(x, self.approximate)


class SiLU(nnx.Module):
    """`x * sigmoid(x)`."""

    def __call__(self, x: SparseTensor) -> SparseTensor:
        """Features `[N, C]` to `[N, C]`."""
        return ops.silu(x)
