"""What tuning is worth: whole networks by heuristic, shipped table, tuning, and the best single choice for all layers.

    python benchmarks/tuning.py --data SCANS [--part networks transfer] [--workload seg-kitti ...] [--out FOLDER]
    python benchmarks/tuning.py --data SCANS --write-table jaxsparse/tuning/tables/nvidia_h200.json

- networks: each workload of `networks.py` compiled in each way; GPU time of a step over a ring of turned scans.
  With `--write-table` the table is that of all workloads tuned here, and is written too; else it is the shipped one.
  "single" is the best of the `--singles` most promising tiles, one for all layers that it serves, rows ordered as the
  heuristic has it.
- transfer: SparseResUNet42 with the choices tuned for one scan, on others, beside tuning on those.
- Every way is measured three times, in turn; the median counts.
"""

import argparse
import functools
import os
import pathlib
import statistics
import time
from contextlib import nullcontext

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import measure
import networks_jaxsparse
import reference
import report
import scans
from workloads import IN_FEATURES, LOSS_SCALE, SEG, WORKLOADS, Workload

import jaxsparse as js
from jaxsparse.ops.conv import FORWARD_TILES, WGRAD_TILES
from jaxsparse.tuning import choice, store
from jaxsparse.tuning import search as tuning_search
from jaxsparse.tuning.key import Choices
from jaxsparse.tuning.record import record
from jaxsparse.tuning.result import show
from jaxsparse.tuning.work import divide

BUDGETS = {"inference": 60.0, "training": 180.0}
ONLY = {"heuristic": {"cache": False, "table": False}, "table": {"cache": False, "table": True}}


def inputs_of(workload, args):
    """The program of `networks.py` for a workload, the ring of voxels, and that of tensors."""
    voxels = scans.ring([scans.read(args.data, s, workload.voxel_size, args.share) for s in workload.scans])
    weights = reference.random_weights(reference.layers(workload.stages, IN_FEATURES))
    task = networks_jaxsparse.Gradients if workload.training else networks_jaxsparse.Inference
    program = task(workload, weights, args.dtype)
    return program, voxels, networks_jaxsparse.tensors(voxels, program.model, args.dtype, factor=1.1)


def tune(name, workload, model, ring, args):
    """The tuning result of a workload, on two of its ring; that of an earlier run, where `--tuned` has one."""
    file = f"tuned_{name}.json"
    if args.tuned and (pathlib.Path(args.tuned) / file).exists():
        return js.tuning.TuningResult.load(pathlib.Path(args.tuned) / file)
    mode = "training" if workload.training else "inference"
    with choice.policy(**ONLY["heuristic"]):
        result = js.autotune(
            model, ring[0], samples=ring[1:2], mode=mode, budget_s=BUDGETS[mode], cache=False, progress=False
        )
    print(result, flush=True)
    if args.out:
        pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
        result.save(pathlib.Path(args.out) / file)
    return result


def compiled_step(program, ring, ways):
    """The step compiled under the given contexts."""

    def run(state, x):
        return program.run(state, x)

    with choice.policy(**ways.get("policy", ONLY["heuristic"])), ways.get("choices", nullcontext()):
        compiled = jax.jit(run).lower(program.state, ring[0]).compile()
    return lambda x: compiled(program.state, x)


def step_ms(steps_by_way, inputs, args):
    """GPU time of each way's step (wall time on a CPU), the median of three rounds in turn."""
    taken = {way: [] for way in steps_by_way}
    for _ in range(3):
        for way, step in steps_by_way.items():
            ms = measure.jax_gpu_ms(step, inputs, min(args.steps, len(inputs)))
            if ms is None:
                ms = measure.summary(measure.wall_ms(step, inputs, jax.block_until_ready, args.steps))["median"]
            taken[way].append(ms)
    return {way: statistics.median(times) for way, times in taken.items()}


def single_choices(model, x, mode):
    """For each tile that serves some layer: that tile for all layers it serves; the best by the cost model first."""
    works = divide(record(model, [(x,)]), tuning_search.this_platform(), mode)
    tasks = [task for work in works for task in work.tasks.values()]
    singles, predicted = {}, {}
    for tile in (t for t in FORWARD_TILES if t.cols >= 64):
        for wgrad in [t for t in WGRAD_TILES if t.rows == 128] if mode == "training" else [None]:
            label = show(tile) + (f" {show(wgrad)}" if wgrad else "")
            found, us = {}, 0.0
            for task in tasks:
                q = task.question
                wanted = wgrad if q.key.op == "wgrad" else tile
                found[q.key] = wanted if wanted in q.candidates else q.heuristic()
                us += task.count * q.predict(found[q.key], task.neighbours)
            singles[label], predicted[label] = Choices(found), us
    return {label: singles[label] for label in sorted(predicted, key=predicted.__getitem__)}


def tuned_workloads(args):
    """Name, program, ring and tuning result of each workload whose scans are there."""
    found = []
    for name in args.workload:
        workload = WORKLOADS[name]
        if reason := scans.missing(args.data, workload.scans):
            print(f"skipped {name}: {reason}")
            continue
        start = time.perf_counter()
        program, _, ring = inputs_of(workload, args)
        print(f"{name}: inputs {time.perf_counter() - start:.1f} s", flush=True)
        result = tune(name, workload, program.model, ring, args)
        found.append((name, program, ring, result))
    return found


def networks_part(args):
    """A row a workload."""
    rows, tuned = [], tuned_workloads(args)
    table = {"policy": ONLY["table"]}
    if args.write_table and tuned:
        choices = functools.reduce(lambda a, b: a | b, (result for *_, result in tuned)).choices
        facts = {"device": tuned[0][-1].device, "jaxsparse": js.__version__, "about": report.context()["command"]}
        store.write(pathlib.Path(args.write_table).absolute(), store.encode(choices, **facts))
        table = {"choices": choice.activate(choices)}
    for name, program, ring, result in tuned:
        ways = {"heuristic": {"policy": ONLY["heuristic"]}, "table": table, "tuned": {"choices": result}}
        steps = {way: compiled_step(program, ring, context) for way, context in ways.items()}
        mode = "training" if WORKLOADS[name].training else "inference"
        if args.singles:
            singles = single_choices(program.model, ring[0], mode)
            for label in list(singles)[: args.singles]:
                steps[label] = compiled_step(program, ring, {"choices": choice.activate(singles[label])})
        ms = step_ms(steps, ring, args)
        single = min((label for label in ms if label not in ways), key=ms.get, default=None)
        rows.append(
            {
                "workload": name,
                "dtype": args.dtype,
                "mode": mode,
                "tuning_s": result.seconds,
                **{f"{way}_ms": ms[way] for way in ways},
                "single": single,
                "single_ms": ms.get(single),
                "all_ms": ms,
            }
        )
        print(rows[-1], flush=True)
    return rows


def over(way):
    """Percent over the tuned time."""
    return lambda r: None if r.get(f"{way}_ms") is None else 100 * (r[f"{way}_ms"] / r["tuned_ms"] - 1)


NETWORK_COLUMNS = {
    "workload": lambda r: r["workload"],
    "mode": lambda r: r["mode"],
    "tuning s": lambda r: r["tuning_s"],
    "tuned ms": lambda r: r["tuned_ms"],
    "heuristic ms": lambda r: r["heuristic_ms"],
    "over tuned %": over("heuristic"),
    "table ms": lambda r: r["table_ms"],
    "over tuned % ": over("table"),
    "best single": lambda r: r["single"],
    "its ms": lambda r: r["single_ms"],
    "over tuned %  ": over("single"),
}

TRANSFER = {  # scan and voxel edge
    "semkitti_00_000000": 0.05,
    "pandaset_002_01": 0.05,
    "ouster_os0128": 0.05,
    "nusc_10sweep": 0.1,
}


def transfer_part(args):
    """SparseResUNet42 on each scan: the choices of the first scan's tuning, and its own."""
    rows, first = [], None
    for scan, voxel in TRANSFER.items():
        workload = Workload(SEG, (scan,), voxel)
        if reason := scans.missing(args.data, workload.scans):
            print(f"skipped {scan}: {reason}")
            continue
        program, voxels, ring = inputs_of(workload, args)
        own = tune(scan, workload, program.model, ring, args)
        first = first or own
        ways = {"first": first, "own": own}
        ms = step_ms({w: compiled_step(program, ring, {"choices": r}) for w, r in ways.items()}, ring, args)
        rows.append({"scan": scan, "voxels": len(voxels[0].coords), "first_ms": ms["first"], "own_ms": ms["own"]})
        print(rows[-1], flush=True)
    return rows


TRANSFER_COLUMNS = {
    "scan": lambda r: r["scan"],
    "voxels": lambda r: f"{r['voxels']:,}",
    "tuned on the first scan, ms": lambda r: r["first_ms"],
    "tuned on this one, ms": lambda r: r["own_ms"],
    "over its own %": lambda r: 100 * (r["first_ms"] / r["own_ms"] - 1),
}


def main():
    """Runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the scans")
    parser.add_argument("--part", nargs="+", choices=["networks", "transfer"], default=["networks"])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--dtype", choices=list(LOSS_SCALE), default="float16")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--share", type=float, default=1.0, help="share of each scan to keep, for a quick look")
    parser.add_argument("--singles", type=int, default=0, help="single choices to try, best predicted first")
    parser.add_argument("--write-table", default=None, help="networks: the file for a table of all workloads")
    parser.add_argument("--tuned", default=None, help="an earlier --out: tuning results found there are taken")
    parser.add_argument("--out", default=None, help="folder for the results (default: only print)")
    args = parser.parse_args()
    if "networks" in args.part:
        report.write(args.out, "tuning", "Tuning of whole networks", NETWORK_COLUMNS, networks_part(args))
    if "transfer" in args.part:
        rows = transfer_part(args)
        report.write(
            args.out, "tuning_transfer", "SparseResUNet42 tuned on one scan, run on others", TRANSFER_COLUMNS, rows
        )


if __name__ == "__main__":
    main()
