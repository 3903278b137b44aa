"""Trains SparseResUNet42 to label LiDAR points.

    python examples/train_segmentation.py                                    # synthetic street scenes, on any machine
    python examples/train_segmentation.py --data kitti/dataset --width 1 --dtype bfloat16 --voxel 0.05 --steps 50000
    python examples/train_segmentation.py --data a.npz b.npz --width 1 --steps 600

Without --data, the scans are streets that segmentation/ray_casting.py measures as a spinning LiDAR would. The run
writes its settings, checkpoints and a picture (input, labels, prediction from above) below --out, and goes on from
the last checkpoint that it finds there, unless --fresh. Other files: segmentation/scans.py reads data,
segmentation/batches.py gives it static shapes, segmentation/training.py holds the compiled steps,
segmentation/report.py scores and draws.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import deque
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from segmentation import batches, report, scans, training
from segmentation.command_line import add_shared, choose_device, find_scans, folder, positive

import jaxsparse as js

console = Console()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    add_shared(parser, data_help="SemanticKITTI root, or .npz files or folders")
    add, whole, real = parser.add_argument, positive(int), positive(float)
    add("--sequences", nargs="+", help="which SemanticKITTI sequences, such as 00 01; none: all that have labels")
    add("--scenes", type=whole, default=6, help="how many streets to make up when there is no --data")
    add("--out", type=folder, default=Path("out/segmentation"), help="folder for checkpoints, scores and the picture")
    add("--fresh", action="store_true", help="delete the checkpoints below --out and start over")
    add("--voxel", type=real, default=None, help="voxel size in metres; none: 0.2 for streets, 0.1 for --data")
    add("--batch", type=whole, default=2, help="scans a step")
    add("--steps", type=whole, default=300, help="where training ends, counted from the first run")
    add("--lr", type=real, default=6e-3, help="highest learning rate; warm-up before it, cosine after")
    add("--class-weights", choices=("sqrt", "none"), default="sqrt", help="a class weighs 1 / sqrt(points), or 1")
    add("--slack", type=real, default=1.2, help="voxels to make room for, over those of the fullest batch")
    add("--save-every", type=whole, default=100, help="steps between checkpoints; the last step always writes one")
    about = "of the streets, the initial parameters, the order and the augmentation"
    add("--seed", type=positive(int, or_zero=True), default=1, help=about)
    options = parser.parse_args(arguments)
    if options.slack < 1:
        parser.error(f"--slack (={options.slack:g}) must be at least 1")
    if options.voxel is None:
        options.voxel = 0.1 if options.data else 0.2
    return options


class Checkpoints:
    """The last two training states below a folder, with the settings that a run must share to go on from them."""

    def __init__(self, folder: Path, settings: dict, fresh: bool):
        folder = folder.resolve()
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        record = folder / "settings.json"
        found = json.loads(record.read_text()) if record.exists() else settings
        other = [f"{k} {found.get(k)} there, {v} here" for k, v in settings.items() if found.get(k) != v]
        if other:
            raise SystemExit(f"{folder} holds another run ({'; '.join(other)}): choose another --out, or pass --fresh")
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder, options=options)
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


@dataclass
class Job:
    """What a run works on: made once by `prepare`, constant from then on."""

    options: argparse.Namespace
    scan_set: scans.ScanSet
    sampler: batches.Sampler
    grids: dict[int, training.Grid]  # by bucket
    steps: training.Steps


def prepare(options: argparse.Namespace, scan_set: scans.ScanSet) -> Job:
    """Builds the model and its steps, and plans capacities from the scans."""
    sampler = batches.Sampler(scan_set, options.batch, options.seed)
    model = js.models.SparseResUNet42(
        4,
        width=options.width,
        num_classes=len(scan_set.classes),
        dtype=jnp.dtype(options.dtype),
        # Each layer's shape compiles its own initialiser, which takes this generator a third of the default's time.
        rngs=nnx.Rngs(jax.random.key(options.seed, impl="rbg")),
    )
    grids, points = training.plan(scan_set, sampler, model, options.voxel, options.slack)
    weights = training.class_weights(points, options.class_weights)
    steps = training.Steps(model, training.adamw(options.lr, options.steps), weights, options.dtype)
    console.print(f"{len(scan_set)} scans, {sum(scan_set.points):,} points")
    for bucket, grid in grids.items():
        room = f"room for {grid.capacity:,} voxels of {grid.voxel_size:g} m"
        console.print(f"bucket of scans up to {bucket:,} points: {grid.scans} a batch, {room}")
    return Job(options, scan_set, sampler, grids, steps)


def train(job: Job, state: training.TrainState, checkpoints: Checkpoints) -> training.TrainState:
    """Runs from the state's step to the last one."""
    options, start, key = job.options, int(state.step), jax.random.key(job.options.seed)
    draws = (job.sampler.at(step) for step in range(start, options.steps))
    recent: deque = deque(maxlen=max(10, job.sampler.steps_per_epoch))  # (loss, confusion) of the latest steps
    begun, scans_seen = time.perf_counter(), 0

    columns = "[progress.description]{task.description}", BarColumn(), MofNCompleteColumn()
    with Progress(*columns, "{task.fields[measured]}", TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("training", total=options.steps, completed=start, measured="compiling ...")

        def show(step: int, measured: training.Measured) -> None:
            """Waits for a step, raises what went wrong in it, and shows what it measured."""
            training.check(measured)
            recent.append((float(measured.loss), np.asarray(measured.confusion)))
            losses, confusions = zip(*recent, strict=True)
            rate = scans_seen / (time.perf_counter() - begun - job.steps.compile_seconds)  # not compiling
            text = f"loss {np.mean(losses):.3f}  mIoU {report.mean_iou(sum(confusions)):.3f}  {rate:.2f} scans/s"
            progress.update(bar, completed=step + 1, measured=text)
            if not console.is_terminal and (step + 1) % max(1, options.steps // 10) == 0:
                console.print(f"step {step + 1}: {text}")

        before = None  # the step before the one that runs: the host reads it while the device works
        for step, (draw, batch) in enumerate(batches.load_ahead(job.scan_set, draws, options.batch), start):
            state, measured = job.steps.train(job.grids[draw.bucket], state, batch, key)
            if before is not None:
                show(*before)
            before, scans_seen = (step, measured), scans_seen + len(draw.scans)
            if (step + 1) % options.save_every == 0:
                training.check(measured)
                checkpoints.save(state)
        if before is not None:
            show(*before)
    checkpoints.save(state)
    return state


def evaluate(job: Job, state: training.TrainState) -> tuple[np.ndarray, np.ndarray]:
    """The confusion matrix of all scans as they are, and the prediction for each point of scan 0."""
    confusion, first = np.zeros((len(job.scan_set.classes),) * 2, np.int64), None
    for draw, batch in batches.load_ahead(job.scan_set, iter(job.sampler.in_order()), job.options.batch):
        measured = job.steps.evaluate(job.grids[draw.bucket], state, batch)
        training.check(measured)
        confusion += np.asarray(measured.confusion)
        if draw.scans[0] == 0:
            first = np.asarray(measured.prediction)[: job.scan_set.points[0]]
    return confusion, first


def main(arguments: list[str] | None = None) -> dict:
    """Trains, scores and draws; returns what `scores.json` holds."""
    options = parse(arguments)
    console.print(f"device: {choose_device(options.device).device_kind}")
    scan_set = find_scans(options, options.scenes, options.seed)
    classes, out = scan_set.classes, options.out
    out.mkdir(parents=True, exist_ok=True)

    made_up = f"{options.scenes} streets, {options.beams} x {options.azimuths} rays"
    settings = {name: getattr(options, name) for name in ("width", "dtype", "voxel", "seed")}
    settings |= {"classes": list(classes.names), "data": [str(path) for path in options.data] or made_up}
    with closing(Checkpoints(out / "checkpoints", settings, options.fresh)) as checkpoints:
        job = prepare(options, scan_set)
        state = checkpoints.restore(job.steps.initial_state())
        if state.step:
            done = "" if state.step < options.steps else "; nothing is left to train up to --steps"
            console.print(f"going on from step {int(state.step)} of the run in {out} (--fresh starts over){done}")
        state = train(job, state, checkpoints)
    confusion, prediction = evaluate(job, state)

    miou, scores = report.mean_iou(confusion), report.iou(confusion)
    compilations = {name: job.steps.compilations(name) for name in ("train", "evaluate")}
    results = {
        "step": int(state.step),
        "miou": miou,
        "iou": {name: float(score) for name, score in zip(classes.names, scores, strict=True) if not np.isnan(score)},
        "compilations": compilations,
    }
    (out / "scores.json").write_text(json.dumps(results, indent=1))
    title = f"SparseResUNet42 after {int(state.step)} steps on {len(scan_set)} scans: mIoU {miou:.2f}"
    report.draw_from_above(out / "prediction.png", scan_set.load(0), prediction, classes, title)
    console.print(report.iou_table(confusion, classes))
    console.print(
        f"compilations: {compilations['train']} of the train step, {compilations['evaluate']} of the evaluation step "
        f"({job.steps.compile_seconds:.0f} s), for {len(scan_set)} scans in {len(job.grids)} bucket(s)"
    )
    console.print(f"picture: {out / 'prediction.png'}")
    return results


if __name__ == "__main__":
    main()
