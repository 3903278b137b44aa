"""`python -m jaxsparse.tuning build-table`: times the layers of common networks and writes this device's table.

python -m jaxsparse.tuning build-table --data SCANS             # scans: .npz with `xyz`, .npy, or KITTI's .bin
python -m jaxsparse.tuning build-table --out my_gpu.json        # synthetic street scenes

What is in the file already is kept, and replaced where it is timed anew. A table in `jaxsparse/tuning/tables` is read
by every program on that kind of device; one written elsewhere is activated with `jaxsparse.tuning.TuningResult.load`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxsparse as js
from jaxsparse.inspect.scan import read_points
from jaxsparse.tuning import choice, store, synthetic
from jaxsparse.tuning.key import Choices
from jaxsparse.tuning.search import autotune, this_platform

NETWORKS = {
    "SparseResUNet42": (js.models.SparseResUNet42, (0.05, 0.05, 0.05)),
    "SparseResNet21D": (js.models.SparseResNet21D, (0.1, 0.1, 0.15)),
}
IN_FEATURES = 4
_SUFFIXES = (".npz", ".npy", ".bin")
SYNTHETIC = {"synthetic-64": (64, 2000), "synthetic-32": (32, 1000)}  # beams and azimuths


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jaxsparse.tuning", description=__doc__.splitlines()[0])
    build = parser.add_subparsers(dest="command", required=True).add_parser("build-table", help="write a table")
    add = build.add_argument
    add("--data", type=Path, default=None, help="folder of scans, or one scan (default: synthetic scenes)")
    add("--scan", nargs="+", default=None, help="names of the scans to take, without suffix (default: all)")
    add("--array", default="xyz", help="name of the points in an .npz (default: xyz)")
    add("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    add("--width", nargs="+", type=float, default=[1.0], help="of the networks (default: 1)")
    add("--voxel", nargs="+", type=float, default=None, help="voxel edge in metres, or one an axis")
    add("--dtype", nargs="+", choices=["float16", "bfloat16", "float32"], default=["float16"])
    add("--mode", choices=["inference", "training"], default="training")
    add("--budget", type=float, default=180.0, help="seconds for each network, width, dtype and scan (default: 180)")
    add("--out", type=Path, default=None, help="the table (default: that of this device in the package)")
    options = parser.parse_args(arguments)
    if options.voxel is not None and len(options.voxel) not in (1, 3):
        parser.error(f"--voxel (={options.voxel}) must be one number, or one an axis")
    for name in ("width", "voxel", "budget"):
        values = getattr(options, name)
        if values is not None and not np.all(np.array(values) > 0):
            parser.error(f"--{name} (={values}) must be positive")
    if options.data is not None and not options.data.exists():
        parser.error(f"--data (={options.data}): no such file or folder")
    if options.data is not None and not _paths(options):
        parser.error(f"--data (={options.data}): holds no {', '.join(_SUFFIXES)} file (of --scan)")
    if options.out is not None and options.out.exists():
        try:
            store.decode(options.out.read_text())
        except (ValueError, OSError) as error:
            parser.error(f"--out (={options.out}): is there already and no table ({error}); name another file")
    return options


def _paths(options: argparse.Namespace) -> list[Path]:
    paths = sorted(options.data.iterdir()) if options.data.is_dir() else [options.data]
    return [p for p in paths if p.suffix in _SUFFIXES and (options.scan is None or p.stem in options.scan)]


def _scenes(options: argparse.Namespace) -> Iterator[tuple[str, np.ndarray]]:
    if options.data is None:
        for name, (beams, azimuths) in SYNTHETIC.items():
            yield name, synthetic.scan(0, beams, azimuths)
        return
    for path in _paths(options):
        points = read_points(path, options.array)
        points = points[np.isfinite(points).all(1)]
        if len(points) == 0:
            raise ValueError(f"--data: {path} holds no finite point; leave it out.")
        yield path.stem, points


def _tensor(model: nnx.Module, points: np.ndarray, voxel_size: Sequence[float], dtype: str) -> js.SparseTensor:
    """Voxels with a tenth of spare rows and planned capacities, as the docs recommend."""
    feats = np.pad(points, [(0, 0), (0, IN_FEATURES - 3)])
    voxels = len(np.unique(np.floor(points / np.array(voxel_size, np.float32)).astype(np.int32), axis=0))
    capacity = -(-int(1.1 * voxels) // 1024) * 1024

    def tensor(capacities=None):
        x, _ = js.voxelize(points, jnp.asarray(feats, dtype), voxel_size, capacity=capacity, capacities=capacities)
        return x.check()

    return tensor(js.capacities(model, [tensor()], slack=1.1))


def build_table(options: argparse.Namespace) -> Path:
    """Tunes the networks on the scenes and writes the table."""
    device, _ = choice.device_of(this_platform())
    path = options.out or store.table_path(device)
    table = store.decode(path.read_text())[0] if path.exists() else Choices()
    start = time.perf_counter()
    for scene, points in _scenes(options):
        for name in options.network:
            model_class, voxel_size = NETWORKS[name]
            if options.voxel is not None:
                voxel_size = tuple(np.broadcast_to(options.voxel, 3).tolist())
            for width in options.width:
                for dtype in options.dtype:
                    model = model_class(IN_FEATURES, width=width, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
                    x = _tensor(model, points, voxel_size, dtype)
                    with choice.policy(cache=False, table=False):
                        result = autotune(model, x, mode=options.mode, budget_s=options.budget, cache=False)
                    table = table | result.choices
                    print(f"\n{scene}, {name}, width {width:g}, {dtype}\n{result}", flush=True)
                    facts = {
                        "device": device,
                        "jaxsparse": js.__version__,
                        "about": "python -m jaxsparse.tuning build-table",
                    }
                    store.write(path.absolute(), store.encode(table, **facts))
    print(f"{len(table)} choices in {path}, {time.perf_counter() - start:.0f} s")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    try:
        build_table(_parse(arguments))
    except ValueError as error:  # what a scan or its voxels are refused for
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
