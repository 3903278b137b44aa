"""How a decision is made when a program is lowered: by whom it is made first, and who may change that.

Explicit `config=`, the active tuning result, the user's cache, the table shipped for this kind of device, the
heuristic: the first that knows decides. Answers become attributes of custom calls. Nothing here reads a device or takes
a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxsparse._compat import make_user_context
from jaxsparse.tuning import store
from jaxsparse.tuning.key import Choice, Choices, Key

DEFAULT_DEVICES = {"cpu": "cpu", "cuda": "NVIDIA H200"}
"""Whose table and model serve a platform that this process has no device of, as when exporting for it."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A decision to be made.

    Attributes:
      key: what it depends on.
      platform: "cpu" or "cuda", that of the program.
      candidates: what is built and serves, the search space.
      predict: predicted time of a candidate in microseconds, from a candidate and the neighbours a site (None where
        they are not known); the least is the heuristic's choice.
      is_here: whether the device is one of this process.
      problem: what is to be computed, for who wants to time it: `jaxsparse.ops.conv.choices.Problem`, None of a
        decision that layers share.
    """

    key: Key
    platform: str
    candidates: tuple[Choice, ...]
    predict: Callable[[Any, float | None], float]
    is_here: bool = True
    problem: Any = None

    def heuristic(self, neighbours: float | None = None) -> Choice:
        """The candidate with the least predicted time, the first of equals."""
        return min(self.candidates, key=lambda choice: self.predict(choice, neighbours))


@dataclasses.dataclass(frozen=True)
class Answer:
    """A choice and its source: "config", "result", "cache", "table", "tuned", "heuristic", or "only" of one."""

    choice: Any
    source: str


@dataclasses.dataclass(frozen=True)
class Policy:
    """Who is asked, see `policy`."""

    on_cache_miss: str = "heuristic"
    cache: bool = True
    table: bool = True


# Both are part of jit's key: a change compiles anew, an equal value does not.
_active = make_user_context(None)
_policy = make_user_context(Policy())


def active() -> Choices | None:
    """The choices of the innermost active tuning result."""
    return _active.value


def activate(choices: Choices) -> contextlib.AbstractContextManager:
    """Makes choices come first inside the context, in this thread."""
    return _active(choices)


@contextlib.contextmanager
def policy(*, on_cache_miss: str = "heuristic", cache: bool = True, table: bool = True) -> Iterator[None]:
    """Says, for programs compiled inside the context, who chooses the kernels that no active result knows.

        with js.tuning.policy(on_cache_miss="error"):
            step(x)  # raises where a layer was never tuned

    Args:
      on_cache_miss: what to do for a layer that neither active result, cache nor table knows. "heuristic" takes the
        cost model's choice. "tune" times the layer's tiles on a synthetic scene of its size while the program
        compiles, and keeps the best in the user's cache; `autotune` is better, since it sees real maps and whole
        groups. "error" raises.
      cache: whether to read the user's cache.
      table: whether to read the table shipped for this kind of device.
    """
    if on_cache_miss not in ("heuristic", "tune", "error"):
        raise ValueError(f'`on_cache_miss` (={on_cache_miss!r}) must be "heuristic", "tune" or "error".')
    with _policy(Policy(on_cache_miss, cache, table)):
        yield


def device_here(platform: str) -> jax.Device | None:
    """The device of this process that a program for this platform runs on, if it has one."""
    try:
        return jax.local_devices(backend=platform)[0]
    except RuntimeError:
        return None


def device_of(platform: str) -> tuple[str, bool]:
    """The kind of device that a program for this platform runs on, and whether this process has one."""
    device = device_here(platform)
    return (DEFAULT_DEVICES[platform], False) if device is None else (device.device_kind, True)


def answer(question: Question, explicit: Choice | None = None) -> Answer:
    """Decides. Every process of a program decides alike: with several, the cache of one machine is not asked."""
    if explicit is not None:
        return Answer(explicit, "config")
    if len(question.candidates) == 1:
        return Answer(question.candidates[0], "only")
    rules, key, is_alone = _policy.value, question.key, jax.process_count() == 1
    sources: dict[str, Choices | None] = {
        "result": active() if question.is_here else None,
        "cache": store.cached(key.device) if question.is_here and is_alone and rules.cache else None,
        "table": store.shipped(key.device) if rules.table else None,
    }
    for source, choices in sources.items():
        found = choices.find(key) if choices is not None else None
        if found in question.candidates:  # else from a version with other kernels
            return Answer(question.candidates[question.candidates.index(found)], source)
    if rules.on_cache_miss == "error":
        raise LookupError(
            f"no tuning result, cache or table knows {key}, about {2 ** (key.rows / 2):,.0f} rows; run "
            'jaxsparse.autotune on this function, or set on_cache_miss="heuristic".'
        )
    if rules.on_cache_miss == "tune" and question.problem is not None:
        if question.is_here and is_alone:
            from jaxsparse.tuning.search import tune_layer  # which needs the ops, which need this module

            return Answer(tune_layer(question), "tuned")
        warnings.warn(
            'jaxsparse: on_cache_miss="tune" takes no times in a program of several processes or for another platform; '
            "the heuristic chooses. Tune in one process, save the result, and activate it in all.",
            stacklevel=2,
        )
    return Answer(question.heuristic(), "heuristic")
