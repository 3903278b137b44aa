"""Capacities of every grid of a network, from sample scenes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from jaxsparse.sites import Capacities, record_site_counts
from jaxsparse.tensor import SparseTensor


def capacities(
    model: Callable, samples: Sequence[SparseTensor], *, slack: float = 1.25, multiple: int = 256
) -> Capacities:
    """Plans the rows of each coarser grid that `model` makes, from the most that any sample needs.

        plan = js.capacities(net, [x0, x1, x2])
        x, _ = js.voxelize(points, feats, 0.05, capacity=131072, capacities=plan)

    Only the sites are computed, not the features.

    Args:
      model: a Flax NNX module or a function of a `SparseTensor`.
      samples: scenes like those to come.
      slack: the most rows seen are multiplied by this.
      multiple: and rounded up to a multiple of this.

    Returns:
      A hashable map from grid stride to rows, for `capacities=` of `SparseTensor` and `voxelize`.

    Raises:
      SiteError: where a sample itself reports a problem.
    """
    if not samples:
        raise ValueError("capacities: `samples` is empty; pass at least one scene.")
    if slack < 1 or multiple < 1:
        raise ValueError(f"capacities: `slack` (={slack}) and `multiple` (={multiple}) must be at least 1.")
    graph, state = nnx.split(model) if isinstance(model, nnx.Module) else (None, None)
    strides: list[tuple[int, ...]] = []

    @jax.jit
    def rows_needed(state, x):
        with record_site_counts() as records:
            (model if graph is None else nnx.merge(graph, state))(x)
        strides[:] = [stride for stride, _ in records]
        return [found for _, found in records]

    needed: dict[tuple[int, ...], int] = {}
    for x in samples:
        x.check()
        plan = dict(x.sites.capacities)
        while True:  # a grid that overflows hides how many rows the grids below it need: enlarge it and look again
            sites = dataclasses.replace(x.sites, capacities=Capacities(plan))
            found = rows_needed(state, SparseTensor(sites, x.feats))
            overflow = False
            for stride, rows in zip(list(strides), map(int, jax.device_get(found)), strict=True):
                needed[stride] = max(needed.get(stride, 0), rows)
                reserved = plan.get(stride, 0)
                overflow |= rows > reserved
                plan[stride] = max(reserved, rows, 1)
            if not overflow:
                break
    return Capacities({k: math.ceil(max(np.ceil(v * slack), 1) / multiple) * multiple for k, v in needed.items()})
