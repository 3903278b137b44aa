"""Trains SparseResUNet42 to label LiDAR points.

    python examples/train_segmentation.py                                    # synthetic street scenes, on any machine
    python examples/train_segmentation.py --data kitti/dataset --width 1 --dtype bfloat16 --voxel 0.05 --steps 50000
    python examples/train_segmentation.py --data a.npz b.npz --width 1 --steps 600

Without --data, the scans are streets that segmentation/ray_casting.py measures as a spinning LiDAR would. The run writes its
settings, checkpoints and a picture (input, labels, prediction from above) below --out, and goes on from the last checkpoint
that it finds there, unless --fresh. Other files: segmentation/scans.py reads data, segmentation/batches.py gives it static
shapes, segmentation/training.py holds the compiled steps, segmentation/report.py scores and draws.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import deque
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from segmentation import batches, report, scans, training
from segmentation.ray_casting import Lidar

import jaxsparse as js

console = Console()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, nargs="+", default=[], help="SemanticKITTI root, .npz files or a folder of them; none: streets")
    add("--sequences", nargs="+", help="which SemanticKITTI sequences, such as 00 01; none: all that have labels")
    add("--scenes", type=int, default=6, help="how many streets to make up when there is no --data")
    add("--beams", type=int, default=64, help="beams of the LiDAR that measures the streets")
    add("--azimuths", type=int, default=600, help="its measurements a turn")
    add("--out", type=Path, default=Path("out/segmentation"), help="folder for checkpoints, scores and the picture")
    add("--fresh", action="store_true", help="delete the checkpoints below --out first, rather than going on from the last")
    add("--device", choices=("auto", "cpu", "gpu"), default="auto")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the layers; parameters are float32")
    add("--width", type=float, default=0.25, help="multiplies the network's channels")
    add("--voxel", type=float, default=None, help="voxel size in metres; none: 0.2 for streets, 0.1 for --data")
    add("--batch", type=int, default=2, help="scans a step")
    add("--steps", type=int, default=200, help="where training ends, counted from the first run")
    add("--lr", type=float, default=4e-3, help="highest learning rate; a warm-up leads to it and a cosine away from it")
    add("--class-weights", choices=("sqrt", "none"), default="sqrt", help="weigh classes by 1 / sqrt(points), or not at all")
    add("--slack", type=float, default=1.2, help="voxels to make room for, over those of the fullest batch")
    add("--save-every", type=int, default=100, help="steps between checkpoints; the last step always writes one")
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def choose_device(name: str) -> jax.Device:
    """The first device of the kind asked for; ends the program if there is none."""
    if name != "auto":
        jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[name])
    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        raise SystemExit(f"--device {name}: {error}") from error
    if name != "auto" and device.platform != name:
        raise SystemExit(f"--device {name}: jax already runs on {device.platform}")
    return device


class Checkpoints:
    """The last two training states below a folder, with the settings that a run must share to go on from them."""

    def __init__(self, folder: Path, settings: dict, fresh: bool):
        folder = folder.resolve()
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder, options=options)
        record = folder / "settings.json"
        if record.exists():
            found = json.loads(record.read_text())
            differing = [f"{name} {found.get(name)!r} -> {settings[name]!r}" for name in settings if found.get(name) != settings[name]]
            if differing:
                raise SystemExit(f"{folder} holds another run ({', '.join(differing)}): choose another --out, or pass --fresh")
        record.write_text(json.dumps(settings, indent=1))

    def restore(self, state: training.TrainState) -> training.TrainState:
        """The last state saved, or `state` where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return state
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def save(self, state: training.TrainState) -> None:
        """Writes the state unless its step is there already."""
        step = int(state.step)
        if step != self._manager.latest_step():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def close(self) -> None:
        """Ends the manager's threads."""
        self._manager.close()


def train(
    steps: training.Steps, state: training.TrainState, scan_set: scans.ScanSet, sampler: batches.Sampler,
    grids: dict[int, training.Grid], checkpoints: Checkpoints, options: argparse.Namespace,
) -> training.TrainState:  # fmt: skip
    """Runs from the state's step to the last one."""
    start, key = int(state.step), jax.random.key(options.seed)
    draws = (sampler.at(step) for step in range(start, options.steps))
    recent: deque = deque(maxlen=max(10, sampler.steps_per_epoch))  # confusion of the latest steps
    losses: deque = deque(maxlen=10)
    seen, begun = 0, time.perf_counter()
    columns = "[progress.description]{task.description}", BarColumn(), MofNCompleteColumn()
    fields = TextColumn("loss {task.fields[loss]:.3f}  mIoU {task.fields[miou]:.3f}  {task.fields[rate]:.2f} scans/s")
    with Progress(*columns, fields, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("training", total=options.steps, completed=start, loss=np.nan, miou=np.nan, rate=0.0)

        def show(step: int, measured: training.Measured) -> None:
            """Waits for a step and raises what went wrong in it."""
            training.check(measured)
            losses.append(float(measured.loss))
            recent.append(np.asarray(measured.confusion))
            rate = seen / (time.perf_counter() - begun - steps.compile_seconds)  # compilation is not throughput
            miou = report.mean_iou(sum(recent))
            progress.update(bar, completed=step + 1, loss=np.mean(losses), miou=miou, rate=rate)
            if not console.is_terminal and (step + 1) % max(1, options.steps // 10) == 0:
                console.print(f"step {step + 1}: loss {np.mean(losses):.3f}  mIoU {miou:.3f}  {rate:.2f} scans/s")

        before = None  # the step before the one that runs: the host reads it while the device works
        for step, (draw, batch) in enumerate(batches.load_ahead(scan_set, draws, options.batch), start):
            state, measured = steps.train(grids[draw.bucket], state, batch, key)
            if before is not None:
                show(*before)
            before, seen = (step, measured), seen + len(draw.scans)
            if (step + 1) % options.save_every == 0:
                training.check(measured)
                checkpoints.save(state)
        if before is not None:
            show(*before)
    checkpoints.save(state)
    return state


def evaluate(
    steps: training.Steps, state: training.TrainState, scan_set: scans.ScanSet, sampler: batches.Sampler,
    grids: dict[int, training.Grid], options: argparse.Namespace,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The confusion matrix of all scans as they are, and the prediction for each point of scan 0."""
    confusion, first = 0, None
    for draw, batch in batches.load_ahead(scan_set, iter(sampler.in_order()), options.batch):
        measured = steps.evaluate(grids[draw.bucket], state, batch)
        training.check(measured)
        confusion = confusion + np.asarray(measured.confusion, np.int64)
        if draw.scans[0] == 0:
            first = np.asarray(measured.prediction)[: scan_set.points[0]]
    return confusion, first


def main(arguments: list[str] | None = None) -> dict:
    """Trains, scores and draws; returns the scores that `scores.json` holds."""
    options = parse(arguments)
    device = choose_device(options.device)
    if options.voxel is None:
        options.voxel = 0.1 if options.data else 0.2
    try:
        if options.data:
            scan_set = scans.open_scans(options.data, options.sequences)
        else:
            scan_set = scans.synthetic_streets(options.scenes, options.seed, Lidar(options.beams, options.azimuths))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    sampler = batches.Sampler(scan_set, options.batch, options.seed)
    console.print(f"{len(scan_set)} scans, {sum(scan_set.points):,} points, {len(sampler.buckets)} bucket(s); {device.device_kind}")

    model = js.models.SparseResUNet42(
        4, width=options.width, num_classes=len(scan_set.classes), dtype=jnp.dtype(options.dtype), rngs=nnx.Rngs(options.seed)
    )
    grids, points = training.plan(scan_set, sampler, model, options.voxel, options.slack)
    for bucket, grid in grids.items():
        console.print(f"bucket of {bucket:,} points: {grid.scans} scans a batch, room for {grid.capacity:,} voxels of {grid.voxel_size:g} m")
    weights = training.class_weights(points, options.class_weights)
    optimizer = training.adamw(options.lr, options.steps, options.dtype)
    steps = training.Steps(model, optimizer, weights, loss_scale=1024.0 if options.dtype == "float16" else 1.0)

    settings = {"width": options.width, "classes": list(scan_set.classes.names), "dtype": options.dtype, "voxel": options.voxel}
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(options.out / "checkpoints", settings, options.fresh)
    state = checkpoints.restore(steps.initial_state())
    if state.step:
        console.print(f"going on from step {int(state.step)} in {options.out} (--fresh starts over)")
    try:
        state = train(steps, state, scan_set, sampler, grids, checkpoints, options)
    finally:
        checkpoints.close()
    confusion, prediction = evaluate(steps, state, scan_set, sampler, grids, options)

    miou = report.mean_iou(confusion)
    console.print(report.iou_table(confusion, scan_set.classes))
    scores = {
        "step": int(state.step),
        "miou": miou,
        "iou": {n: round(float(v), 4) for n, v in zip(scan_set.classes.names, report.iou(confusion)) if v == v},
        "compilations": {name: steps.compilations(name) for name in ("train", "evaluate")},
    }
    (options.out / "scores.json").write_text(json.dumps(scores, indent=1))
    picture = options.out / "segmentation.png"
    title = f"SparseResUNet42 on {scan_set.names[0]}, mIoU {miou:.2f} over {len(scan_set)} scans"
    report.draw_from_above(picture, scan_set.load(0), prediction, scan_set.classes, title)
    console.print(
        "compilations: {train} of the train step, {evaluate} of the evaluation step".format(**scores["compilations"])
        + f" ({steps.compile_seconds:.0f} s) for {len(scan_set)} scans in {len(sampler.buckets)} bucket(s)"
    )
    console.print(f"picture: {picture}")
    return scores


if __name__ == "__main__":
    main()
