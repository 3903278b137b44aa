"""Sparse convolution: `api` is public, `primitives` holds the products and their derivatives, `reference` plain JAX."""

from jaxsparse.ops.conv.api import conv, conv_transpose
from jaxsparse.ops.conv.config import ConvConfig

__all__ = ["ConvConfig", "conv", "conv_transpose"]
