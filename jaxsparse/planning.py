"""Capacities of every grid of a network, from sample scenes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
from flax import nnx

from jaxsparse.sites import Capacities, check_capacity
from jaxsparse.tensor import SparseTensor, check_tensor


class _Listener(Capacities):
    """Capacities that keep the most rows that each grid needed.

    They travel with the sites, so they hear of grids made inside `jit`, `checkpoint` and `scan` bodies too. Equal only
    to itself: nothing that is compiled with a listener is ever used without it.
    """

    def __init__(self, rows: Mapping[tuple[int, ...], int]):
        super().__init__(rows)
        self.needed: dict[tuple[int, ...], int] = {}

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def hear(self, stride: tuple[int, ...], rows: jax.Array) -> None:
        def keep(rows) -> None:
            self.needed[stride] = max(self.needed.get(stride, 0), int(rows))

        jax.debug.callback(keep, rows)


def capacities(
    model: Callable, samples: Sequence[SparseTensor], *, slack: float = 1.25, multiple: int = 256
) -> Capacities:
    """Plans the rows of each coarser grid that `model` makes, from the most that any sample needs.

        plan = js.capacities(net, [x0, x1, x2])
        x, _ = js.voxelize(points, feats, 0.05, capacity=131072, capacities=plan)

    Only the sites are computed, not the features.

    Args:
      model: a Flax NNX module or a function of a `SparseTensor`; a function that closes over a module needs it in eval
        mode, since running statistics cannot be updated from inside.
      samples: scenes like those to come.
      slack: the most rows seen are multiplied by this.
      multiple: and rounded up to a multiple of this.

    Returns:
      A hashable map from grid stride to rows, for `capacities=` of `SparseTensor` and `voxelize`.

    Raises:
      SiteError: where a sample itself reports a problem.
    """
    if not isinstance(samples, Sequence):
        kind = type(samples).__name__
        raise TypeError(f"capacities: `samples` must be a sequence of SparseTensors, got a single {kind}; pass [x].")
    if not samples:
        raise ValueError("capacities: `samples` is empty; pass at least one scene.")
    if not 1 <= slack < math.inf:
        raise ValueError(f"capacities: `slack` (={slack}) must be a number, at least 1.")
    check_capacity(multiple, "capacities: `multiple`")
    graph, state = nnx.split(model) if isinstance(model, nnx.Module) else (None, None)

    @jax.jit
    def make_sites(state, x):  # returns nothing, so that XLA leaves the features out
        (model if graph is None else nnx.merge(graph, state))(x)

    needed: dict[tuple[int, ...], int] = {}
    for x in samples:
        check_tensor("capacities", x)
        x.check()
        plan = dict(x.sites.capacities)
        while True:  # a grid that overflows hides how many rows the grids below it need: enlarge it and look again
            listener = _Listener(plan)
            make_sites(state, SparseTensor(dataclasses.replace(x.sites, capacities=listener), x.feats))
            jax.effects_barrier()
            missing = {grid: rows for grid, rows in listener.needed.items() if rows > plan.get(grid, 0)}
            if not missing:
                break
            plan |= missing
        for grid, rows in listener.needed.items():
            needed[grid] = max(needed.get(grid, 1), rows)
    return Capacities({grid: math.ceil(math.ceil(rows * slack) / multiple) * multiple for grid, rows in needed.items()})
