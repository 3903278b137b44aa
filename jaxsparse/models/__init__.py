"""Whole networks."""

from jaxsparse.models.resnet import SparseResNet21D
from jaxsparse.models.resunet import SparseResUNet42

__all__ = ["SparseResNet21D", "SparseResUNet42"]
