"""Building blocks of the networks."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from jaxsparse import nn
from jaxsparse.tensor import SparseTensor


class ConvBlock(nnx.Module):
    """Convolution without bias, batch norm, ReLU.

    Args:
      conv: the convolution layer; its `out_features` set the width.
      axis_name: see `jaxsparse.nn.BatchNorm`.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        conv: nn.SubMConv | nn.SparseConv | nn.SparseConvTranspose,
        *,
        axis_name: Hashable | None = None,
        rngs: nnx.Rngs,
    ):
        self.conv = conv
        self.norm = nn.BatchNorm(conv.out_features, axis_name=axis_name, rngs=rngs)

    def __call__(self, x: SparseTensor, **like: Any) -> SparseTensor:
        """Features `[N, C_in]` to `[N_out, C_out]`; `like=` goes to a transposed convolution."""
        return self.conv(x, norm=self.norm, activation="relu", **like)


class ResidualBlock(nnx.Module):
    """Conv, norm, ReLU, conv, norm, plus the input, ReLU (He et al., CVPR 2016), with 3^3 submanifold convolutions.

    Where the width changes, the input goes through a 1x1 convolution and norm.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dims: int = 3,
        dtype: DTypeLike | None = None,
        axis_name: Hashable | None = None,
        rngs: nnx.Rngs,
    ):
        def conv(features: int, kernel_size: int) -> nn.SubMConv:
            return nn.SubMConv(features, out_features, kernel_size, dims=dims, use_bias=False, dtype=dtype, rngs=rngs)

        def norm() -> nn.BatchNorm:
            return nn.BatchNorm(out_features, axis_name=axis_name, rngs=rngs)

        self.conv1, self.norm1 = conv(in_features, 3), norm()
        self.conv2, self.norm2 = conv(out_features, 3), norm()
        self.shortcut = nnx.Sequential(conv(in_features, 1), norm()) if in_features != out_features else None

    def __call__(self, x: SparseTensor) -> SparseTensor:
        """Features `[N, C_in]` to `[N, C_out]` on the same sites."""
        y = self.conv1(x, norm=self.norm1, activation="relu")
        shortcut = x
        if self.shortcut is not None:
            conv, norm = self.shortcut.layers
            shortcut = conv(x, norm=norm)
        return self.conv2(y, norm=self.norm2, residual=shortcut, activation="relu")
