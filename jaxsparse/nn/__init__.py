"""Flax NNX layers on sparse tensors."""

from flax.nnx import Sequential

from jaxsparse.nn.activation import GELU, LeakyReLU, ReLU, SiLU
from jaxsparse.nn.conv import After, ConvOptions, SparseConv, SparseConvTranspose, SparseInverseConv, SubMConv
from jaxsparse.nn.linear import Linear
from jaxsparse.nn.norm import BatchNorm

__all__ = [
    "GELU",
    "After",
    "BatchNorm",
    "ConvOptions",
    "LeakyReLU",
    "Linear",
    "ReLU",
    "Sequential",
    "SiLU",
    "SparseConv",
    "SparseConvTranspose",
    "SparseInverseConv",
    "SubMConv",
]
