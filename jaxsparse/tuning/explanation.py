"""Which kernels a function's layers run, who chose them, and what they cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxsparse.tuning import measure
from jaxsparse.tuning.choice import active, answer
from jaxsparse.tuning.key import Choice, Choices
from jaxsparse.tuning.record import record
from jaxsparse.tuning.result import describe, show
from jaxsparse.tuning.search import this_platform
from jaxsparse.tuning.work import divide


@dataclasses.dataclass(frozen=True)
class Row:
    """One decision.

    Attributes:
      what: op and sizes; the grid.
      layers: how many products it serves, 0 for what a group shares.
      choice, source: what was chosen, and by whom: "config", "result", "cache", "table", "heuristic".
      predicted_us: by the cost model from the map's own neighbours; of one product.
      measured_us: on this device, None where it was not measured.
    """

    what: str
    layers: int
    choice: Choice
    source: str
    predicted_us: float
    measured_us: float | None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The decisions of a function, printable."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        head = f"{'decision':60} {'layers':>6} {'choice':>12} {'from':>10} {'predicted us':>12} {'measured us':>12}"
        lines = [
            f"{r.what:60} {r.layers or '':>6} {show(r.choice):>12} {r.source:>10} {r.predicted_us:12.1f} "
            + (f"{'-':>12}" if r.measured_us is None else f"{r.measured_us:12.1f}")
            for r in self.rows
        ]
        return "\n".join([head, *lines])


def explain(fn: Callable, *args: Any, measured: bool | None = None) -> Explanation:
    """Says for each layer of a function what would be chosen now, by whom, and what it costs.

        print(js.tuning.explain(net, x))

    Args:
      fn, *args: a function or model and its arguments, as in `jaxsparse.autotune`.
      measured: whether to time each product; by default on a GPU.
    """
    platform = this_platform()
    recorded = record(fn, [args])
    if measured is None:
        measured = platform == "cuda"
    rows = []
    for work in divide(recorded, platform, "inference"):
        for question, neighbours in work.shared.values():
            found = answer(question)
            us = question.predict(found.choice, neighbours or None)
            rows.append(Row(f"{work.name}: {describe(question.key)}", 0, found.choice, found.source, us, None))
        for which, layers in work.layers.items():
            for layer, count in layers.items():
                own = layer.questions(platform).get("own")
                if own is None:
                    continue
                question, explicit = own
                found = answer(question, explicit)
                us = question.predict(found.choice, recorded.neighbours(which, layer.problem.of_reverse))
                time = None
                if measured:
                    maps = [recorded.maps[0][which][1]]
                    program = measure.layer_program(layer, maps, active() or Choices(), platform).compile()
                    time = measure.times_us([program], platform, measure.CALLS[platform])[0].median
                what = f"{work.name}: {layer.op}, {describe(question.key)}"
                rows.append(Row(what, count, found.choice, found.source, us, time))
    measure.forget()
    return Explanation(tuple(rows))
