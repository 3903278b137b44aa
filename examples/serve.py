"""Labels scan after scan with SparseResUNet42 from Python, as a robot or a server would; prints p50 and p99.

    python examples/serve.py                                               # synthetic streets, on any machine
    python examples/serve.py --data a.npz b.npz --width 1 --dtype float16 --voxel 0.05 --requests 1000

Two halves that could be two programs. `export` turns a Flax model into one portable program, weights included: points
in, a class and its confidence for each point out. `Server` reads that program, compiles ahead of time, and needs no
model code. Beside it stands what `nnx.jit` and a plain `jax.jit` cost. docs/deployment.md explains each step.
Weights are random here; those of a trained model serve the same way.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from segmentation import batches, scans, training
from segmentation.command_line import add_shared, choose_device, find_scans, folder, positive

import jaxsparse as js


def label_points(model: nnx.Module, grid: training.Grid, xyz, intensity, count):
    """Class int32 [P] and confidence float32 [P] of each point, -1 and 0 past `count`, and the status."""
    x, voxel_of_point = js.voxelize(
        xyz,
        training.features(xyz, intensity),
        voxel_size=grid.voxel_size,
        capacity=grid.capacity,
        count=count,
        batch_size=1,
        capacities=grid.capacities,
    )
    y = model(x)
    probability = jax.nn.softmax(y.feats.astype(jnp.float32))  # [voxels, classes]
    best = jnp.argmax(probability, axis=1).astype(jnp.int32)
    label = jnp.where(voxel_of_point >= 0, best[jnp.maximum(voxel_of_point, 0)], -1)
    return label, js.devoxelize(probability.max(axis=1, keepdims=True), voxel_of_point)[:, 0], y.status


def export(model: nnx.Module, grid: training.Grid, points: int) -> bytes:
    """The program for at most so many points, for CPU and CUDA. The model's arrays are constants in it."""

    @jax.jit
    def program(xyz, intensity, count):
        return label_points(model, grid, xyz, intensity, count)

    shapes = [((points, 3), jnp.float32), ((points,), jnp.float32), ((), jnp.int32)]
    exported = jax.export.export(program, platforms=["cpu", "cuda"], disabled_checks=js.DISABLE_JAX_EXPORT_CHECKS)(
        *(jax.ShapeDtypeStruct(*s) for s in shapes)
    )
    return bytes(exported.serialize())


class Server:
    """A program of `export` on one device, compiled when it is made."""

    def __init__(self, program: bytes, device: jax.Device):
        exported = jax.export.deserialize(program)
        self.points, self._device = exported.in_avals[0].shape[0], device
        # The intensities' memory is given away and takes the confidences: nothing is allocated for those.
        program = jax.jit(exported.call, donate_argnums=1, compiler_options=js.COMPILER_OPTIONS)
        self._compiled = program.lower(*exported.in_avals).compile()

    def send(self, scan: scans.Scan) -> list[jax.Array]:
        """Starts the copy of a scan, padded, to the device."""
        return jax.device_put(padded(scan, self.points), self._device)

    def __call__(self, sent: list[jax.Array]):
        """Starts the work on a scan that was sent, once. Returns class, confidence and status of its points."""
        return self._compiled(*sent)


def padded(scan: scans.Scan, points: int) -> list[np.ndarray]:
    """Points, intensities and their number, with zeros behind."""
    count = len(scan.xyz)
    if count > points:
        raise ValueError(f"{scan.name} has {count:,} points and the program has room for {points:,}; export for more")
    xyz, intensity = np.zeros((points, 3), np.float32), np.zeros(points, np.float32)
    xyz[:count], intensity[:count] = scan.xyz, scan.intensity
    return [xyz, intensity, np.int32(count)]


def received(result, count: int) -> np.ndarray:
    """The classes of the real points on the host, or an error where voxels did not fit."""
    label, _, status = result
    js.status.check(status)
    return np.asarray(label)[:count]


def one_by_one(run: Callable[[scans.Scan], tuple], requests: list[scans.Scan]) -> tuple[list[float], list[np.ndarray]]:
    """Milliseconds from each scan in host memory to its classes in host memory, and the classes."""
    times, labels, warmup = [], [], requests[:3]
    for scan in [*warmup, *requests]:
        start = time.perf_counter()
        labels.append(received(run(scan), len(scan.xyz)))
        times.append(1e3 * (time.perf_counter() - start))
    return times[len(warmup) :], labels[len(warmup) :]


def overlapped(server: Server, requests: list[scans.Scan]) -> Iterable[np.ndarray]:
    """The classes of each scan; the next one is on its way to the device while one is computed."""
    sent = server.send(requests[0])
    for scan, following in zip(requests, [*requests[1:], None], strict=True):
        result = server(sent)
        if following is not None:
            sent = server.send(following)
        yield received(result, len(scan.xyz))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    add_shared(parser, data_help="labelled .npz scans: labels say how many classes there are; none: synthetic streets")
    add = parser.add_argument
    add("--voxel", type=positive(float), default=0.2, help="voxel size in metres")
    add("--requests", type=positive(int), default=50, help="scans to serve, going round")
    add("--out", type=folder, default=Path("out/serve"), help="folder for the exported program")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Exports, serves and measures; returns the milliseconds of each way to call the model."""
    options = parse(arguments)
    device = choose_device(options.device)
    print(f"device: {device.device_kind}")
    scan_set = find_scans(options, scenes=3, seed=1)
    rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))
    model = js.models.SparseResUNet42(
        4, width=options.width, num_classes=len(scan_set.classes), dtype=jnp.dtype(options.dtype), rngs=rngs
    )
    model.eval()
    points = batches.bucket_sizes([max(scan_set.points)])[0]
    grids, _ = training.plan(scan_set, batches.Sampler(scan_set, 1, 0), model, options.voxel, slack=1.2)
    grid = max(grids.values(), key=lambda grid: grid.capacity)

    program = export(model, grid, points)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "program.jax").write_bytes(program)
    begun = time.perf_counter()
    server = Server(program, device)
    print(f"room for {points:,} points and {grid.capacity:,} voxels of {grid.voxel_size:g} m")
    print(f"program of {len(program) / 1e6:.1f} MB in {options.out}, compiled in {time.perf_counter() - begun:.1f} s")

    requests = [scan_set.load(i % len(scan_set)) for i in range(options.requests)]
    by_nnx = nnx.jit(label_points, static_argnums=1)
    graph, state = nnx.split(model)
    by_jit = jax.jit(lambda state, *rest: label_points(nnx.merge(graph, state), grid, *rest))
    ways = {
        "nnx.jit": lambda scan: by_nnx(model, grid, *padded(scan, points)),
        "jax.jit, state split once": lambda scan: by_jit(state, *padded(scan, points)),
        "exported, compiled ahead of time": lambda scan: server(server.send(scan)),
    }
    found = {}
    for name, run in ways.items():
        found[name], labels = one_by_one(run, requests)
        print(f"{name:34} p50 {np.percentile(found[name], 50):6.2f} ms, p99 {np.percentile(found[name], 99):6.2f} ms")
    begun = time.perf_counter()
    same = [np.array_equal(a, b) for a, b in zip(overlapped(server, requests), labels, strict=True)]
    print(f"{'the next scan sent meanwhile':34} {len(requests) / (time.perf_counter() - begun):.1f} scans/s")
    if not all(same):
        raise RuntimeError("the same scans got other classes when they were sent ahead")
    return found


if __name__ == "__main__":
    main()
