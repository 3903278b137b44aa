"""What a tuning found: choices to activate, and the report of how they were found."""

from __future__ import annotations

import dataclasses
import pathlib
import threading
from collections.abc import Mapping
from typing import Any

from jaxsparse.tuning import choice, store
from jaxsparse.tuning.key import Choice, Choices, Key, tile_from_json

_entered = threading.local()


@dataclasses.dataclass(frozen=True)
class Decision:
    """One decision of a group.

    Attributes:
      what: op and sizes.
      layers: how many products it serves.
      chosen, chosen_us: the winner, and its time in microseconds.
      runner_up, runner_up_us: the next best, None of one candidate.
      heuristic, heuristic_us: what runs without a result; None where its numbers are wrong.
      rejected: candidates that gave wrong numbers or failed, each with the reason.
    """

    what: str
    layers: int
    chosen: Choice
    chosen_us: float
    runner_up: Choice | None
    runner_up_us: float | None
    heuristic: Choice
    heuristic_us: float | None
    rejected: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers whose maps are of the same sites.

    Attributes:
      name: grid, rows and number of layers.
      decisions: those made; fewer than the group has where the budget ended.
      total_us, heuristic_us: maps and layers together, as chosen and by the heuristic; None where the budget ended.
      seconds: spent on the group.
    """

    name: str
    decisions: tuple[Decision, ...]
    total_us: float | None
    heuristic_us: float | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class TuningResult:
    """Choices of kernels for a function, and how they were found. A context manager, printable, kept as JSON.

        result = js.autotune(net, x)
        print(result)
        result.save("net.json")
        with js.tuning.TuningResult.load("net.json") | other:
            step(x)  # compiled with these choices; compiled anew only where they differ from those before

    Attributes:
      choices: what `with` activates, in the thread that enters it.
      groups: the report.
      device: kind of device that was tuned on.
      mode: "inference" or "training".
      seconds: spent in all.
      unseen: products in bodies of `scan`, `cond` and the like, which tuning does not see.
    """

    choices: Choices
    groups: tuple[Group, ...] = ()
    device: str = ""
    mode: str = "inference"
    seconds: float = 0.0
    unseen: int = 0

    def __enter__(self) -> TuningResult:
        context = choice.activate(self.choices)
        context.__enter__()
        _stack().append(context)
        return self

    def __exit__(self, *error: Any) -> None:
        _stack().pop().__exit__(*error)

    def __or__(self, other: TuningResult) -> TuningResult:
        """Both results; where they choose differently, the right one's choice."""
        if not isinstance(other, TuningResult):
            return NotImplemented
        return TuningResult(
            self.choices | other.choices,
            self.groups + other.groups,
            " and ".join(dict.fromkeys([self.device, other.device])),
            " and ".join(dict.fromkeys([self.mode, other.mode])),
            self.seconds + other.seconds,
            self.unseen + other.unseen,
        )

    def save(self, path: str | pathlib.Path) -> None:
        """Writes choices and report as JSON."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("choices", "groups")}
        groups = [dataclasses.asdict(group) for group in self.groups]
        store.write(pathlib.Path(path).absolute(), store.encode(self.choices, **facts, groups=groups))

    @classmethod
    def load(cls, path: str | pathlib.Path) -> TuningResult:
        """The inverse of `save`; reads tables too, which have no report.

        Raises:
          OSError, ValueError: where the file cannot be read or is none; says what is wrong with it.
        """
        try:
            choices, facts = store.decode(pathlib.Path(path).read_text())
            facts = {f.name: facts[f.name] for f in dataclasses.fields(cls) if f.name in facts}
            return cls(choices, tuple(map(_group_from_json, facts.pop("groups", []))), **facts)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no tuning result: {error}; make it with TuningResult.save.") from None

    def __str__(self) -> str:
        lines = [f"tuned on {self.device} for {self.mode}: {len(self.choices)} choices in {self.seconds:.1f} s"]
        for group in self.groups:
            total = ""
            if group.total_us is not None and group.heuristic_us is not None:
                gain = 100 * (1 - group.total_us / group.heuristic_us)
                total = f": {group.total_us:.0f} us, heuristic {group.heuristic_us:.0f} us, gain {gain:.0f} %"
            lines.append(f"\n{group.name}{total}; {group.seconds:.1f} s")
            for d in group.decisions:
                lines.append(
                    f"  {d.what:44} x{d.layers:<3} {show(d.chosen):>12} {d.chosen_us:8.1f} us   next "
                    f"{show(d.runner_up):>12} {_us(d.runner_up_us)}   heuristic {show(d.heuristic):>12} "
                    f"{_us(d.heuristic_us)}"
                )
                lines += [f"    rejected {reason}" for reason in d.rejected]
        if self.unseen:
            lines.append(f"\nnot seen: {self.unseen} products in bodies of scan, while, cond or shard_map")
        return "\n".join(lines)


def show(value: Choice | None) -> str:
    """A choice in few characters: 64x32/3 is a tile of 64 rows, 32 columns and 3 stages, 64x32/3x2 one of 2 splits."""
    match value:
        case None:
            return "-"
        case True | False:
            return "yes" if value else "no"
        case (rows, cols, stages, splits):
            return f"{rows}x{cols}/{stages}" + (f"x{splits}" if splits > 1 else "")
    return str(value)


def describe(key: Key) -> str:
    """Op and sizes of a key."""
    channels = f" {key.c_in} to {key.c_out}" if key.c_in else ""
    taps = f", {key.taps} taps" if key.taps else ""
    over = "" if key.direction == "same" or key.op == "builder" else f", {key.direction}"
    return f"{key.op}{channels}{taps}{over}" + (f", {key.dtype}" if key.dtype else "")


def _us(value: float | None) -> str:
    return f"{'-':>11}" if value is None else f"{value:8.1f} us"


def _stack() -> list:
    if not hasattr(_entered, "stack"):
        _entered.stack = []
    return _entered.stack


def _group_from_json(entry: Mapping[str, Any]) -> Group:
    def plain(name: str, value: Any) -> Any:
        if name == "rejected":
            return tuple(value)
        return tile_from_json(value) if isinstance(value, list) else value

    decisions = tuple(Decision(**{n: plain(n, v) for n, v in d.items()}) for d in entry["decisions"])
    return Group(**{**entry, "decisions": decisions})
