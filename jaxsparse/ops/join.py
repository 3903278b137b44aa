"""Several tensors on equal sites: sums and concatenations."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from jaxsparse import status
from jaxsparse.sites import Sites
from jaxsparse.status import Problem
from jaxsparse.tensor import SparseTensor, check_tensor, on_sites


def common_sites(op: str, tensors: Sequence[SparseTensor | Sites]) -> Sites:
    """The sites of the first tensor, or the first sites, with a report where another's differ."""
    for t in tensors:
        if not isinstance(t, Sites):
            check_tensor(op, t)
    sites, *others = (t if isinstance(t, Sites) else t.sites for t in tensors)
    for other in others:
        if (sites.coords.shape, sites.stride) != (other.coords.shape, other.stride):
            raise ValueError(
                f"{op}: tensors must have equal sites, got capacity and columns {sites.coords.shape} on the grid with "
                f"stride {sites.stride} and {other.coords.shape} with stride {other.stride}."
            )
        problems = [other.status]
        if not sites.same_as(other):
            differ = (sites.coords != other.coords).any(1).sum(dtype=jnp.int32)
            problems.append(status.report(Problem.UNEQUAL_SITES, differ > 0, differ, 0))
        if problems[0] is not sites.status or len(problems) > 1:
            sites = sites.with_status(*problems)
    return sites


def check_features(op: str, x: SparseTensor, y: SparseTensor) -> None:
    """Refuses tensors of unequal width."""
    if x.num_features != y.num_features:
        raise ValueError(f"{op}: tensors must have equal features, got {x.num_features} and {y.num_features}.")


def add(x: SparseTensor, y: SparseTensor) -> SparseTensor:
    """`x + y` on equal sites in equal order. Sites that differ are reported in `status`."""
    sites = common_sites("add", (x, y))
    check_features("add", x, y)
    real = sites.is_real[:, None]
    return on_sites(sites, jnp.where(real, x.feats + y.feats, 0))


def concatenate(tensors: Sequence[SparseTensor]) -> SparseTensor:
    """The features of tensors on equal sites beside each other, `[N, C_1 + C_2 + ...]`.

    Sites that differ are reported in `status`. Of two tensors of 16 bits, a convolution with a norm, a residual or an
    activation reads each from where it is, on GPUs: a compiled program where nothing else reads the concatenation has
    none.
    """
    tensors = list(tensors)
    if not tensors:
        raise ValueError("concatenate: `tensors` is empty; pass at least one.")
    sites = common_sites("concatenate", tensors)
    real = sites.is_real[:, None]
    feats = jnp.where(real, jnp.concatenate([t.unmasked for t in tensors], 1), 0)
    parts = tuple(part for t in tensors for part in t.parts)
    return on_sites(sites, feats, parts if all(part.dtype == feats.dtype for part in parts) else None)
