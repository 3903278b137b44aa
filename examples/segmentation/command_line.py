"""What the command lines of the examples share: options, the device, the scans. What is wrong ends the program."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import jax

from . import scans
from .ray_casting import Lidar


def positive(kind: Callable[[str], float], or_zero: bool = False) -> Callable[[str], float]:
    """A parser of `int` or `float` numbers that refuses those that are not positive (or 0) and finite."""

    def parse(word: str) -> float:
        number = kind(word)
        if not (0 < number < math.inf or (or_zero and number == 0)):
            raise argparse.ArgumentTypeError(f"{word} must be positive{' or 0' if or_zero else ''}")
        return number

    parse.__name__ = kind.__name__  # argparse names it where the word is no number
    return parse


def folder(word: str) -> Path:
    """A parser of the name of a folder, there already or to be made."""
    path = Path(word)
    if any(p.exists() and not p.is_dir() for p in (path, *path.parents)):
        raise argparse.ArgumentTypeError(f"{word} is, or lies below, a file; name a folder")
    return path


def add_shared(parser: argparse.ArgumentParser, data_help: str) -> None:
    """Adds the options of scans, device and network."""
    add = parser.add_argument
    add("--data", type=Path, nargs="+", default=[], help=data_help)
    add("--beams", type=positive(int), default=64, help="beams of the LiDAR that measures the streets")
    add("--azimuths", type=positive(int), default=600, help="its measurements a turn")
    add("--device", choices=("auto", "cpu", "gpu"), default="auto")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="parameters stay float32")
    add("--width", type=positive(float), default=0.25, help="multiplies the network's channels")


def find_scans(options: argparse.Namespace, scenes: int, seed: int) -> scans.ScanSet:
    """The scans that `--data` names, or streets made up."""
    try:
        if options.data:
            return scans.open_scans(options.data, getattr(options, "sequences", None))
        return scans.synthetic_streets(scenes, seed, Lidar(options.beams, options.azimuths))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def choose_device(name: str) -> jax.Device:
    """The first device of the kind asked for."""
    if name == "cpu":
        jax.config.update("jax_platforms", "cpu")  # leaves the memory of a GPU alone
    try:
        device = jax.devices(None if name == "auto" else name)[0]
    except RuntimeError as error:
        raise SystemExit(f"error: --device {name}: {error}") from error
    if device.platform != jax.default_backend():
        raise SystemExit(f"error: --device {name}: jax already runs on {jax.default_backend()}")
    return device
