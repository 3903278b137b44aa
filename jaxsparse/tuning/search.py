"""The search: which candidate of each decision is quickest on the maps of a function's own samples."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxsparse._primitive import lacks_kernels
from jaxsparse.tuning import measure, store
from jaxsparse.tuning.choice import Question, device_here, device_of
from jaxsparse.tuning.key import Choice, Choices, Key
from jaxsparse.tuning.measure import NEVER, Time
from jaxsparse.tuning.record import Layer, Recorded, record
from jaxsparse.tuning.result import Decision, Group, TuningResult, describe, show
from jaxsparse.tuning.work import Work, divide, other_orders, pruned


def autotune(
    fn: Callable,
    *args: Any,
    samples: Sequence[Any] = (),
    mode: str = "inference",
    budget_s: float = 60.0,
    cache: bool = True,
    progress: bool = True,
) -> TuningResult:
    """Finds the quickest kernels for the convolutions of a function, on the kernel maps of real inputs.

        result = js.autotune(net, x, samples=[x1, x2])
        with result:
            y = step(x)

    Layers whose maps are of the same sites form a group. Each layer's tiles are timed apart; what a group shares, the
    way its maps are built and whether rows are sorted, by the time of the whole group, maps included. The cost model
    says what is worth trying; a candidate whose numbers differ from plain JAX is never chosen. Where nothing is a
    hundredth faster, the heuristic's choice stays.

    Args:
      fn: a function, jitted or not, or a Flax NNX model. Layers inside `scan`, `while`, `cond` and `shard_map` are not
        seen.
      *args: its arguments, arrays and not shapes: the maps of their sites are what is tuned on.
      samples: more inputs of the same shapes: tuples of all arguments, or values of the last one.
      mode: "inference" tunes the products that `fn` computes. "training" tunes their gradients too, where `fn` computes
        none itself, as a loss or a model does.
      budget_s: seconds after which no further candidate is tried; the step that runs is finished.
      cache: whether to add the choices to the user's cache, where later programs find them without `with`. Programs
        compiled before stay as they are.
      progress: whether to write progress and remaining time to stderr.

    Raises:
      RuntimeError: in a program of several processes, which must choose alike: tune in one process alone, save the
        result, and activate it in all.
      ValueError: where arguments do not fit.
    """
    start = time.perf_counter()
    if mode not in ("inference", "training"):
        raise ValueError(f'`mode` (={mode!r}) must be "inference" or "training".')
    if budget_s <= 0:
        raise ValueError(f"`budget_s` (={budget_s!r}) must be positive.")
    if jax.process_count() > 1:
        raise RuntimeError(
            f"autotune takes no times in a program of {jax.process_count()} processes, which would choose differently; "
            "run it in one process alone, save the result, load it in all and enter it."
        )
    if not isinstance(samples, Sequence):
        kind = type(samples).__name__
        raise TypeError(f"autotune: `samples` must be a sequence of inputs, got a single {kind}; pass samples=[x].")
    platform = this_platform()
    every = [tuple(args), *[s if isinstance(s, tuple) else (*args[:-1], s) for s in samples]]
    recorded = record(fn, every)
    search = Search(recorded, platform, mode, start + budget_s, progress)
    try:
        groups = search.run()
    finally:
        measure.forget()  # they lie on the device
    device = device_of(platform)[0]
    choices = Choices(search.decided)
    if cache and choices:
        store.add_to_cache(device, choices)
    return TuningResult(choices, tuple(groups), device, mode, time.perf_counter() - start, recorded.unseen)


def this_platform() -> str:
    """ "cpu" or "cuda".

    Raises:
      RuntimeError: where plain JAX runs, and there is nothing to choose.
    """
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform not in ("cpu", "cuda"):
        raise RuntimeError(f"nothing can be tuned on {platform}: only CPU and CUDA have kernels to choose from.")
    if lacks_kernels(platform):
        raise RuntimeError("nothing can be tuned on cuda: this build of jaxsparse has no CUDA kernels to choose from.")
    return platform


@dataclasses.dataclass
class Timed:
    """Candidates of one layer's decision: times of the right ones in microseconds, reasons why others are out."""

    us: dict[Choice, Time]
    rejected: tuple[str, ...]

    def best(self, heuristic: Choice) -> Choice | None:
        """The quickest, or the heuristic's choice where that is as quick; None where nothing is right."""
        if not self.us:
            return None
        best = min(self.us, key=self.us.__getitem__)
        return best if self.us[best].beats(self.us.get(heuristic, NEVER)) else heuristic


def time_layer(
    layer: Layer,
    key: Key,
    candidates: Sequence[Choice],
    maps: Sequence[tuple],
    others: Choices,
    platform: str,
    expected: jax.Array,
) -> Timed:
    """Compiles, checks and times candidates of a layer's own decision; `others` decides what else it asks.

    `expected` is `measure.reference` of the layer on the first map.
    """
    programs = measure.compile_all(
        [
            lambda c=c: measure.layer_program(layer, maps, others | Choices({key: c}), platform)  # type: ignore[misc]
            for c in candidates
        ]
    )
    limit = measure.error_limit(layer, platform)
    right, rejected = {}, []
    for candidate, program in zip(candidates, programs, strict=True):
        if isinstance(program, Exception):
            rejected.append(f"{show(candidate)}: {_first_line(program)}")
            continue
        found = measure.error(program()[0], expected)
        if found <= limit:
            right[candidate] = program
        else:
            rejected.append(f"{show(candidate)}: wrong numbers, error {found:.1e} where {limit:.1e} passes")
    times = measure.times_us(list(right.values()), platform, measure.CALLS[platform])
    return Timed(dict(zip(right, times, strict=True)), tuple(rejected))


class Search:
    """Walks through the groups of a function until the time is up."""

    def __init__(self, recorded: Recorded, platform: str, mode: str, deadline: float, progress: bool):
        self.recorded, self.platform, self.deadline, self.progress = recorded, platform, deadline, progress
        self.works = divide(recorded, platform, mode)
        self.decided: dict[Key, Choice] = {}
        self._expected: dict[tuple, jax.Array] = {}
        # The best tiles under the other order of rows: a tile may suit one order alone.
        self._reordered: dict[tuple[Key, Choice], dict[Key, tuple[Choice, Timed]]] = {}
        self._start = time.perf_counter()
        self._steps = sum(len(work.tasks) + 2 for work in self.works)
        self._done = 0

    @property
    def is_over(self) -> bool:
        """Whether the budget is spent."""
        return time.perf_counter() >= self.deadline

    def run(self) -> list[Group]:
        """Decides; returns the report of each group that was begun."""
        groups = []
        for work in self.works:
            if self.is_over:
                break
            groups.append(self._tune_group(work))
        if self.progress:
            print(file=sys.stderr)
        return groups

    def _step(self, what: str, steps: int = 1) -> None:
        self._done += steps
        if self.progress:
            now = time.perf_counter()
            spent = now - self._start
            left = min(max(self.deadline - now, 0.0), spent / max(self._done, 1) * (self._steps - self._done))
            text = f"autotune {100 * self._done // self._steps:3} %, {spent:4.0f} s, about {left:3.0f} s left: {what}"
            print(f"\r{text:100}", end="", file=sys.stderr, flush=True)

    def _maps(self, which: int) -> list[tuple]:
        return [maps[which][1] for maps in self.recorded.maps]

    def _reference(self, layer: Layer, which: int) -> jax.Array:
        """The layer in plain JAX on the first sample's map, kept for the group at hand."""
        if (layer, which) not in self._expected:
            self._expected[layer, which] = measure.reference(layer, self._maps(which)[0])
        return self._expected[layer, which]

    def _tune_group(self, work: Work) -> Group:
        start = time.perf_counter()
        self._expected.clear()
        heuristic = work.heuristic
        chosen, measured = dict(heuristic), {}
        for key, task in sorted(work.tasks.items(), key=lambda item: -item[1].weight):
            if self.is_over:
                break
            candidates = pruned(task.question, task.neighbours)
            maps, expected = self._maps(task.which), self._reference(task.layer, task.which)
            timed = time_layer(task.layer, key, candidates, maps, Choices(chosen), self.platform, expected)
            best = timed.best(heuristic[key])
            if best is not None:
                chosen[key] = self.decided[key] = best
                measured[key] = timed
            for order in other_orders(task):
                others = Choices({**chosen, **dict([order])})
                reordered = time_layer(task.layer, key, candidates, maps, others, self.platform, expected)
                best = reordered.best(heuristic[key])
                if best is not None:
                    self._reordered.setdefault(order, {})[key] = best, reordered
            self._step(f"{work.name}, {describe(key)}")
        total, base = None, None
        shared: list[Decision] = []
        if not self.is_over and len(measured) == len(work.tasks):
            total, base, shared = self._tune_shared(work, chosen)
            for (key, value), tiles in self._reordered.items():
                if chosen.get(key) == value:
                    measured |= {k: timed for k, (_, timed) in tiles.items() if k in measured}
        self._step(f"{work.name}, maps and order of rows", 2)
        count = sum(sum(layers.values()) for layers in work.layers.values())
        name = f"{work.name}, {count} products"
        decisions = [
            _decision(describe(key), work.tasks[key].count, self.decided[key], heuristic[key], timed)
            for key, timed in measured.items()
        ]
        return Group(name, (*decisions, *shared), total, base, time.perf_counter() - start)

    def _tiles(self, key: Key, value: Choice) -> dict[Key, tuple[Choice, Timed]]:
        """The tiles that go with a shared decision, where they were tuned for it."""
        return self._reordered.get((key, value), {})

    def _tune_shared(self, work: Work, chosen: dict[Key, Choice]) -> tuple[float, float, list[Decision]]:
        """Times the whole group by the heuristic, with the layers' choices, and with each shared decision changed."""
        heuristic = work.heuristic
        changes: list[dict[Key, Choice]] = [
            {question.key: candidate, **{k: tile for k, (tile, _) in self._tiles(question.key, candidate).items()}}
            for question, n in work.shared.values()
            for candidate in pruned(question, n or None)
            if candidate != chosen[question.key]
        ]
        variants = [heuristic, chosen, *({**chosen, **change} for change in changes)]
        times, rejected = self._time_group(work, variants)
        gains = [change for change, t in zip(changes, times[2:], strict=True) if t.beats(times[1])]
        if len(gains) > 1:  # all together; the better of two changes of one decision comes last and stays
            gains.sort(key=lambda change: times[2 + changes.index(change)], reverse=True)
            variants.append({**chosen, **{k: v for change in gains for k, v in change.items()}})
            (_, combined), wrong = self._time_group(work, [chosen, variants[-1]])
            times.append(combined)
            rejected += wrong
        best = min(range(len(times)), key=times.__getitem__)
        if not times[best].beats(times[0]):
            best = 0
        for key, value in variants[best].items():
            self.decided[key] = chosen[key] = value
        decisions = []
        for question, _ in work.shared.values():
            key = question.key
            us = {chosen[key]: times[best]}
            for change, t in zip(changes, times[2:], strict=False):
                if key in change:
                    us.setdefault(change[key], t)
            us.setdefault(heuristic[key], times[0])
            timed = Timed({c: t for c, t in us.items() if t != NEVER or c == chosen[key]}, tuple(rejected))
            decisions.append(_decision(f"{describe(key)}: whole group", 0, chosen[key], heuristic[key], timed))
            rejected = []
        return times[best].median, times[0].median, decisions

    def _time_group(self, work: Work, variants: Sequence[dict[Key, Choice]]) -> tuple[list[Time], list[str]]:
        """Times of the whole group under each set of choices, `NEVER` where numbers are wrong.

        Reasons name how a set differs from the second.
        """
        distinct = list(dict.fromkeys(map(Choices, variants)))
        programs = measure.compile_all([lambda c=c: self._program(work, c) for c in distinct])  # type: ignore[misc]
        times, rejected = dict.fromkeys(distinct, NEVER), []
        right: dict[Choices, measure.Program] = {}
        for choices, program in zip(distinct, programs, strict=True):
            reason = _first_line(program) if isinstance(program, Exception) else self._wrong(work, program)
            if reason is None and not isinstance(program, Exception):
                right[choices] = program
            else:
                changed = [f"{k.op} {show(v)}" for k, v in choices.items() if v != variants[1][k]]
                rejected.append(f"{', '.join(changed) or 'the group as it is'}: {reason}")
        times.update(zip(right, measure.times_us(list(right.values()), self.platform), strict=True))
        return [times[Choices(v)] for v in variants], rejected

    def _program(self, work: Work, choices: Choices) -> measure.Program:
        calls = [
            (which, layer, copy)
            for which, layers in work.layers.items()
            for layer, count in layers.items()
            for copy in range(count)
        ]

        def function(sources, operands):
            maps = {}
            for which, (build_operands, kernel_map) in sources.items():
                build = self.recorded.builds[which]
                maps[which] = kernel_map if build is None else (*build.run(build_operands), *kernel_map[2:])
            return [layer.run(*o, maps[which]) for (which, layer, _), o in zip(calls, operands, strict=True)]

        operands = [measure.operands(layer, copy % 3, copy // 3) for _, layer, copy in calls]
        arguments = [({which: maps[which] for which in work.layers}, operands) for maps in self.recorded.maps]
        return measure.Program(function, arguments, choices)

    def _wrong(self, work: Work, program: measure.Program) -> str | None:
        """What is wrong with a group's numbers, judged by the first product of each kind; None where nothing is."""
        outputs = iter(program())
        of_tasks = {(task.layer, task.which) for task in work.tasks.values()}
        for which, layers in work.layers.items():
            for layer, count in layers.items():
                found, *_ = (next(outputs) for _ in range(count))
                if of_tasks and (layer, which) not in of_tasks:  # has the kernel of one that is compared
                    continue
                expected = self._reference(layer, which)
                limit, error = measure.error_limit(layer, self.platform), measure.error(found, expected)
                if not error <= limit:
                    return f"wrong numbers, error {error:.1e} where {limit:.1e} passes"
        return None


def tune_layer(question: Question) -> Choice:
    """Times the tiles of one layer on a synthetic scene of its size and adds the best to the user's cache.

    For `on_cache_miss="tune"`: runs in a thread of its own, since the caller is in the middle of a trace, and on the
    device that the question is of, which need not be the default one.
    """
    x64 = jax.config.values["jax_enable_x64"]

    def run() -> Choice:
        from jaxsparse.tuning.synthetic import layer_and_map

        with jax.enable_x64(x64), jax.default_device(device_here(question.platform)):
            layer, kernel_map, neighbours = layer_and_map(question)
            heuristic = question.heuristic()
            candidates = pruned(question, neighbours)
            try:
                expected = measure.reference(layer, kernel_map)
                timed = time_layer(
                    layer, question.key, candidates, [kernel_map], Choices(), question.platform, expected
                )
            finally:
                measure.forget()
            best = timed.best(heuristic)
            if best is None:
                return heuristic
            store.add_to_cache(question.key.device, Choices({question.key: best}))
            return best

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _decision(what: str, count: int, chosen: Choice, heuristic: Choice, timed: Timed) -> Decision:
    others = sorted((t, i, c) for i, (c, t) in enumerate(timed.us.items()) if c != chosen)
    runner_up_time, _, runner_up = others[0] if others else (None, 0, None)
    return Decision(
        what,
        count,
        chosen,
        timed.us[chosen].median,
        runner_up,
        None if runner_up_time is None else runner_up_time.median,
        heuristic,
        timed.us[heuristic].median if heuristic in timed.us else None,
        timed.rejected,
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
