"""Whole networks."""

from jaxsparse.models.resunet import SparseResUNet42

__all__ = ["SparseResUNet42"]
