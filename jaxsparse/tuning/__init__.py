"""Which kernels a convolution runs: chosen when a program is lowered, tuned with `autotune`, told by `explain`.

    key      what a choice depends on                  measure   takes times, checks numbers
    store    cache, shipped tables, saved results      record    the layers of a function, their maps on samples
    cost     the cost model, which is the heuristic    search    `autotune`
    choice   who decides, in which order               work      what there is to decide, in groups
                                                       result    `TuningResult`; explanation: `explain`

`ops` ask `choice`; `record` and `search` call `ops`, so they are imported late: when first asked for.
"""

from typing import Any

from jaxsparse.tuning.choice import policy

__all__ = ["TuningResult", "autotune", "explain", "policy"]


def __getattr__(name: str) -> Any:
    if name in ("TuningResult", "autotune", "explain"):
        from jaxsparse.tuning import explanation, result, search

        return {"TuningResult": result.TuningResult, "autotune": search.autotune, "explain": explanation.explain}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
