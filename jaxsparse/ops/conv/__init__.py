"""Sparse convolution: `api` is public, `primitives` holds the products and their derivatives, `reference` plain JAX."""

from jaxsparse.ops.conv.api import conv, conv_transpose
from jaxsparse.ops.conv.config import (
    FLOAT_TILES,
    FLOAT_WGRAD_TILES,
    FORWARD_TILES,
    NARROW_TILES,
    WGRAD_TILES,
    ConvConfig,
    Tile,
)

__all__ = [
    "FLOAT_TILES",
    "FLOAT_WGRAD_TILES",
    "FORWARD_TILES",
    "NARROW_TILES",
    "WGRAD_TILES",
    "ConvConfig",
    "Tile",
    "conv",
    "conv_transpose",
]
