"""SparseResNet21D: the residual encoder for detection of the TorchSparse papers, 21 convolutions deep."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from jaxsparse import nn
from jaxsparse.geometry import AxisInts
from jaxsparse.models.blocks import ConvBlock, ResidualBlock
from jaxsparse.tensor import SparseTensor

# Channels, kernel size and strides of the first layer, residual blocks.
_STAGES: tuple[tuple[int, AxisInts, AxisInts, int], ...] = (
    (16, 3, 1, 2),
    (32, 3, 2, 2),
    (64, 3, 2, 2),
    (128, 3, 2, 2),
    (128, (1, 3, 1), (1, 2, 1), 0),
)


class SparseResNet21D(nnx.Module):
    """Encoder for detection in voxels (TorchSparse, MLSys 2022; TorchSparse++, MICRO 2023).

    Five stages with 16, 32, 64, 128, 128 channels. Each begins with one layer: 3^3 submanifold, then 3^3 stride 2 three
    times, then (1, 3, 1) stride (1, 2, 1). Two residual blocks follow, none in the last stage. Strided layers are
    centred (taps -1, 0, 1) and compute every site that they reach. Every convolution has a norm and no bias.

        net = SparseResNet21D(in_features=4, rngs=nnx.Rngs(0))
        plan = js.capacities(net, samples)  # else a strided layer reserves twice the rows of its input
        x, _ = js.voxelize(points, feats, (0.1, 0.1, 0.2), capacity=131072, capacities=plan)
        *finer, y = net(x)
        y.feats  # [plan[8, 16, 8], 128]

    Args:
      in_features: channels of the input.
      width: multiplies every width.
      dtype: of inputs and products; parameters and statistics stay float32.
      axis_name: mesh axes over which batch norms sum their statistics.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        in_features: int,
        *,
        width: float = 1.0,
        dtype: DTypeLike | None = None,
        axis_name: Hashable | None = None,
        rngs: nnx.Rngs,
    ):
        if not 0 < width < math.inf:
            raise ValueError(f"SparseResNet21D: `width` (={width}) must be positive.")
        norm: dict[str, Any] = {"axis_name": axis_name, "rngs": rngs}
        self.stages: nnx.List[nnx.Sequential] = nnx.List()
        features = in_features
        for channels, kernel_size, strides, blocks in _STAGES:
            out_features = max(round(channels * width), 1)
            layer = nn.SubMConv if strides == 1 else nn.SparseConv
            conv = layer(
                features, out_features, kernel_size, strides=strides, dims=3, use_bias=False, dtype=dtype, rngs=rngs
            )
            residual = [ResidualBlock(out_features, out_features, dtype=dtype, **norm) for _ in range(blocks)]
            self.stages.append(nnx.Sequential(ConvBlock(conv, **norm), *residual))
            features = out_features

    def __call__(self, x: SparseTensor) -> list[SparseTensor]:
        """The output of every stage, finest first, for heads and necks that take several.

        Args:
          x: features `[N, in_features]` in three dimensions.

        Returns:
          Five tensors, features `[N_s, C_s]`. Against the grid of `x` their strides are 1, 2, 4, 8 and (8, 16, 8); the
          last one's status covers all.
        """
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs
