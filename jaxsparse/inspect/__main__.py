"""`python -m jaxsparse.inspect scan.npz --voxel 0.05`: tables of what a scan costs to convolve, and a picture of them.

python -m jaxsparse.inspect scan.npz --voxel 0.05
python -m jaxsparse.inspect scan.npy --voxel 0.1 0.1 0.2 --kernel 3 3 1 --levels 3 --out levels.png
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxsparse.geometry import Geometry
from jaxsparse.inspect import report
from jaxsparse.inspect.scan import pyramid, read_points
from jaxsparse.status import SiteError

_AXES, _MOST_LEVELS = 3, 12


def _number(kind: Callable, what: str) -> Callable[[str], float]:
    """A parser of numbers whose message helps where options swallow the scan's name."""

    def parse(word: str):
        try:
            return kind(word)
        except ValueError:
            message = f"{word!r} is not {what}; name the scan first, options after it"
            raise argparse.ArgumentTypeError(message) from None

    return parse


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, values checked, `voxel` and `kernel` with an entry for each axis."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxsparse.inspect", description="What a scan costs to convolve, level by level."
    )
    add, number, integer = parser.add_argument, _number(float, "a number"), _number(int, "an integer")
    add("scan", type=Path, help=".npz, .npy or KITTI's .bin")
    add("--voxel", type=number, nargs="+", required=True, help="voxel edge in the unit of the points, or one an axis")
    add("--kernel", type=integer, nargs="+", default=[3], help="taps of the kernel, or one number an axis (default: 3)")
    add("--levels", type=integer, default=5, help="levels of the pyramid, each half as fine as before (default: 5)")
    add("--array", default="xyz", help="name of the points in an .npz (default: xyz)")
    add("--out", type=Path, default=Path("inspect.png"), help="the picture (default: inspect.png in this folder)")
    options = parser.parse_args(arguments)

    for name in ("voxel", "kernel"):
        values = getattr(options, name)
        if len(values) not in (1, _AXES):
            parser.error(f"--{name} (={_words(values)}) must be one number or {_AXES}, one an axis")
        setattr(options, name, tuple(values * _AXES if len(values) == 1 else values))
    if not all(math.isfinite(v) and v > 0 for v in options.voxel):
        parser.error(f"--voxel (={_words(options.voxel)}) must be positive; give an edge in the unit of the points")
    try:
        Geometry.create(_AXES, options.kernel)
    except ValueError as error:
        parser.error(f"--kernel: {error}")
    if not 1 <= options.levels <= _MOST_LEVELS:
        parser.error(f"--levels (={options.levels}) must be 1 to {_MOST_LEVELS}")
    if options.out.suffix != ".png":
        parser.error(f"--out (={options.out}) must end in .png")
    if not options.out.parent.is_dir():
        parser.error(f"--out (={options.out}): there is no folder {options.out.parent}; make it, or choose another")
    return options


def _words(values: Sequence[float]) -> str:
    return " ".join(f"{v:g}" for v in values)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables and writes the picture; ends the program where either cannot be done."""
    options = _parse(arguments)
    try:
        points = read_points(options.scan, options.array)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    finite = points[np.isfinite(points).all(1)]
    if not len(finite):
        raise SystemExit(f"error: `scan` (={options.scan}): none of its {len(points)} points is finite; name another.")
    try:
        levels = list(pyramid(finite, options.voxel, options.kernel, options.levels))
    except SiteError as error:
        raise SystemExit(f"error: --voxel (={_words(options.voxel)}): {error}") from error

    left_out = len(points) - len(finite)
    kernel = " x ".join(map(str, options.kernel))
    title = f"{options.scan.name}: {len(finite):,} points, voxel {report.edges(levels[0])}, kernel {kernel}"
    print(title + (f" ({left_out:,} points that are not finite left out)" if left_out else ""))
    print()
    print(report.text(levels))
    print()
    sys.stdout.flush()
    try:
        from jaxsparse.inspect import draw
    except ModuleNotFoundError as error:
        raise SystemExit(f"no picture: {error}; it comes with the extra, pip install 'jaxsparse[examples]'") from error
    try:
        draw.draw(options.out, levels, title)
    except OSError as error:
        raise SystemExit(f"error: --out (={options.out}): {error}") from error
    print(f"picture: {options.out}")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # a look at a scan leaves the memory of a GPU alone
    main()
