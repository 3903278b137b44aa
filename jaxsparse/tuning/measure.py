"""Times of products on a device, and whether their numbers are right.

A program holds several calls of one product on different operands. On a GPU it is launched several times behind a long
kernel: the host, which takes longer to launch a program of small kernels than the GPU to run it, is then ahead, and the
time is the GPU's. Programs to be compared take turns, and each one's median counts.
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.tuning import choice
from jaxsparse.tuning.key import Choices

CALLS = {"cpu": 1, "cuda": 9}  # of a product in one program
ROUNDS = 5
MOST_LAUNCHES = 6  # of a program behind one long kernel
LONG_ROWS = 3072  # of the square matrices whose product is the long kernel: about a millisecond on an H200

programs_timed = 0
"""How many this process has timed: 0 where choices were only looked up."""


@functools.cache
def _numbers() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(65_521).astype(np.float32)  # a prime: no two rows are alike


@functools.lru_cache(maxsize=64)
def numbers(shape: tuple[int, ...], dtype: Any, copy: int) -> jax.Array:
    """Normal numbers; another copy has others. Weights `[K, C_in, C_out]` are scaled as an initialiser would."""
    scale = 1 / math.sqrt(math.prod(shape[:-1])) if len(shape) == 3 else 1.0
    return jnp.asarray(np.resize(np.roll(_numbers(), 7919 * copy) * np.float32(scale), shape)).astype(dtype)


NOT_AUTOTUNED = {"xla_gpu_autotune_level": "0"}  # XLA's own products: to search their kernels would take longer

# Whatever XLA_FLAGS say: calls of a layer that do not wait for each other must not overlap while they are timed.
ONE_BY_ONE = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}


class Program:
    """A compiled function with its arguments; `arguments` are taken in turn."""

    def __init__(self, function: Callable, arguments: Sequence[tuple], choices: Choices, options: dict | None = None):
        self._arguments = list(arguments)
        with choice.activate(choices):
            self._lowered = jax.jit(function).lower(*self._arguments[0])
        self._options = ONE_BY_ONE | (options or {})

    def compile(self) -> Program:
        """What takes long and may run in another thread."""
        self._compiled = self._lowered.compile(self._options)
        return self

    def __call__(self, turn: int = 0) -> Any:
        """Runs it, without waiting."""
        return self._compiled(*self._arguments[turn % len(self._arguments)])


def compile_all(makers: Sequence[Callable[[], Program]]) -> list[Program | Exception]:
    """The programs, compiled side by side and run once; in place of one that fails, its error."""

    def attempt(function: Callable, *args) -> Any:
        try:
            return function(*args)
        except (RuntimeError, ValueError) as error:  # XLA's, and what a handler refuses
            return error

    lowered = [attempt(make) for make in makers]
    with concurrent.futures.ThreadPoolExecutor(max(min(8, os.cpu_count() or 1), 1)) as pool:
        compiled = list(pool.map(lambda p: p if isinstance(p, Exception) else attempt(p.compile), lowered))
    for i, program in enumerate(compiled):
        if not isinstance(program, Exception):
            failed = attempt(lambda p: jax.block_until_ready(p()) and None, program)
            compiled[i] = failed or program
    return compiled


MARGIN = 0.99  # a time counts as quicker if it is below this share of the other: less is noise


class Time(NamedTuple):
    """Of several rounds, in microseconds: the median, which is reported, and the least, which noise leaves alone."""

    median: float
    least: float

    def beats(self, other: Time) -> bool:
        """Whether this is quicker by more than noise."""
        return self.median < MARGIN * other.median and self.least < MARGIN * other.least


NEVER = Time(math.inf, math.inf)


@functools.cache
def long_program() -> Program:
    """One long kernel."""
    operand = jnp.ones((LONG_ROWS, LONG_ROWS), jnp.float32)
    product = functools.partial(jnp.dot, precision="highest")
    return Program(product, [(operand, operand)], Choices(), NOT_AUTOTUNED).compile()


def forget() -> None:
    """Frees what lies on the device for timing."""
    numbers.cache_clear()
    long_program.cache_clear()


def elapsed_us(programs: Sequence[Program], turn: int = 0) -> float:
    """From before the first launch until the last program has ended, in microseconds."""
    start = time.perf_counter()
    for i, program in enumerate(programs):
        out = program(turn + i)
    jax.block_until_ready(out)
    return 1e6 * (time.perf_counter() - start)


def times_us(programs: Sequence[Program], platform: str, calls: int = 1, rounds: int | None = None) -> list[Time]:
    """The time of a call of each program that has so many."""
    global programs_timed
    programs_timed += len(programs)
    first, launches, launch_us = [], 1, []
    if platform == "cuda" and programs:
        first = [long_program()]
        jax.block_until_ready(first[0]())
    for program in programs:
        start = time.perf_counter()
        out = program()
        launch_us.append(1e6 * (time.perf_counter() - start))
        jax.block_until_ready(out)
    if first:  # as many as the host launches while the long kernel runs
        launches = max(1, min(MOST_LAUNCHES, int(0.7 * elapsed_us(first) / statistics.median(launch_us))))
    taken: list[list[float]] = [[] for _ in programs]
    alone = []
    for r in range(rounds or ROUNDS):
        alone.append(elapsed_us(first) if first else 0.0)
        for program, times in zip(programs, taken, strict=True):
            times.append(elapsed_us([*first, *[program] * launches], r))
    share = launches * calls
    return [Time(*(max(of(times) - of(alone), 0.0) / share for of in (statistics.median, min))) for times in taken]


@jax.jit
def _error(found, expected):
    wide = jnp.float64 if expected.dtype == jnp.float64 else jnp.float32
    found, expected = found.astype(wide), expected.astype(wide)
    return jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected))


def error(found: jax.Array, expected: jax.Array) -> float:
    """The largest difference over the largest number; NaN where there is one."""
    return float(_error(found, expected))


def error_limit(layer, platform: str) -> float:
    """The largest error that passes: a few roundings of the result (or of TF32 operands), and sums in another order."""
    is_tf32 = layer.spec.dtype_name(platform) == "tf32"
    eps = max(float(jnp.finfo(layer.out_dtype).eps), 2.0**-10 if is_tf32 else 0.0)
    return 4 * eps + (1e-12 if layer.spec.dtype == jnp.float64 else 1e-4)


def operands(layer, copy: int, other: int) -> tuple[jax.Array, jax.Array]:
    """Float operands of a layer."""
    first, second = layer.first, layer.second
    return numbers(first.shape, first.dtype, copy), numbers(second.shape, second.dtype, 100 + other)


def layer_program(layer, maps: Sequence[tuple], choices: Choices, platform: str) -> Program:
    """A program of `CALLS` calls of a layer on different operands, over the maps in turn."""
    calls = CALLS[platform]
    side = math.ceil(math.sqrt(calls))
    pairs = [(i % side, i // side) for i in range(calls)]

    def function(firsts, seconds, maps):
        return [layer.run(firsts[a], seconds[b], maps[(a + b) % len(maps)]) for a, b in pairs]

    firsts = [operands(layer, i, 0)[0] for i in range(side)]
    seconds = [operands(layer, 0, i)[1] for i in range(side)]
    if platform == "cpu":  # one call a program: the samples come in turn
        return Program(function, [(firsts, seconds, [m]) for m in maps], choices)
    return Program(function, [(firsts, seconds, list(maps))], choices)


def reference(layer, kernel_map: tuple) -> jax.Array:
    """The first call of `layer_program` in plain JAX."""
    function = functools.partial(layer.run, implementation="xla")
    return Program(function, [(*operands(layer, 0, 0), kernel_map)], Choices(), NOT_AUTOTUNED).compile()()
