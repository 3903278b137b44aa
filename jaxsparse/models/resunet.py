"""SparseResUNet42: the U-Net with residual blocks of the TorchSparse papers, 42 layers deep."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from jaxsparse import nn, ops
from jaxsparse.models.blocks import ConvBlock, ResidualBlock
from jaxsparse.tensor import SparseTensor

_STEM, _ENCODER, _DECODER = 32, (32, 64, 128, 256), (256, 128, 96, 96)


class SparseResUNet42(nnx.Module):
    """Segmentation network for voxels (TorchSparse, MLSys 2022; TorchSparse++, MICRO 2023).

    A stem of two 3^3 submanifold convolutions with 32 channels; four encoder stages (2^3 stride 2 convolution at the
    incoming width, two residual blocks) with 32, 64, 128, 256 channels; four decoder stages (inverse 2^3 stride 2
    convolution, concatenation of the skip, two residual blocks) with 256, 128, 96, 96 channels. Every convolution has a
    norm and no bias.

        net = SparseResUNet42(in_features=4, num_classes=19, rngs=nnx.Rngs(0))
        logits = net(x).feats  # [N, 19]

    Args:
      in_features: channels of the input.
      num_classes: width of the linear head; None returns features, `[N, 96 * width]`.
      width: multiplies every width.
      dims: number of spatial axes.
      dtype: of inputs and products; parameters and statistics stay float32.
      axis_name: mesh axes over which batch norms sum their statistics.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int | None = None,
        *,
        width: float = 1.0,
        dims: int = 3,
        dtype: DTypeLike | None = None,
        axis_name: Hashable | None = None,
        rngs: nnx.Rngs,
    ):
        if not 0 < width < math.inf:
            raise ValueError(f"SparseResUNet42: `width` (={width}) must be positive.")

        def wide(features: int) -> int:
            return max(round(features * width), 1)

        def stage(layer: type, features: int, out_features: int, kernel_size: int, strides: int = 1) -> ConvBlock:
            conv = layer(
                features, out_features, kernel_size, strides=strides, dims=dims, use_bias=False, dtype=dtype, rngs=rngs
            )
            return ConvBlock(conv, axis_name=axis_name, rngs=rngs)

        def residual(features: int, out_features: int) -> nnx.Sequential:
            options: dict[str, Any] = {"dims": dims, "dtype": dtype, "axis_name": axis_name, "rngs": rngs}
            return nnx.Sequential(
                ResidualBlock(features, out_features, **options), ResidualBlock(out_features, out_features, **options)
            )

        stem = wide(_STEM)
        self.stem = nnx.Sequential(stage(nn.SubMConv, in_features, stem, 3), stage(nn.SubMConv, stem, stem, 3))
        skips, features = [stem], stem
        self.down: nnx.List[ConvBlock] = nnx.List()
        self.encoder: nnx.List[nnx.Sequential] = nnx.List()
        for out_features in map(wide, _ENCODER):
            self.down.append(stage(nn.SparseConv, features, features, 2, strides=2))
            self.encoder.append(residual(features, out_features))
            features = out_features
            skips.append(features)
        self.up: nnx.List[ConvBlock] = nnx.List()
        self.decoder: nnx.List[nnx.Sequential] = nnx.List()
        for out_features, skip in zip(map(wide, _DECODER), reversed(skips[:-1]), strict=True):
            self.up.append(stage(nn.SparseInverseConv, features, out_features, 2, strides=2))
            self.decoder.append(residual(out_features + skip, out_features))
            features = out_features
        self.head = None if num_classes is None else nn.Linear(features, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: SparseTensor) -> SparseTensor:
        """Features `[N, in_features]` to logits `[N, num_classes]` or features, on the same sites."""
        x = self.stem(x)
        skips = []
        for down, encoder in zip(self.down, self.encoder, strict=True):
            skips.append(x)
            x = encoder(down(x))
        for up, decoder in zip(self.up, self.decoder, strict=True):
            skip = skips.pop()
            x = decoder(ops.concatenate([up(x, like=skip), skip]))
        return x if self.head is None else self.head(x)
