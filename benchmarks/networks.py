"""Whole networks on real scans: wall and GPU time, tails, kernels, memory and compilation, checked against float64.

    python benchmarks/networks.py --data SCANS [--workload seg-kitti ...] [--dtype float16] [--out benchmarks/results]
    python benchmarks/networks.py --data SCANS --workload seg-nuscenes --dtype float32 --steps 3 --share 0.25   # a CPU
    python benchmarks/networks.py --data SCANS --workload seg-kitti --scans 1 2 4 8 16        # how time grows
    python benchmarks/networks.py --data SCANS --workload seg-kitti --capacity 1 1.25 4       # what padding costs
    python benchmarks/networks.py --data SCANS --concurrent --awake    # as docs/deployment.md advises

Where torch and spconv are installed, spconv runs the same network with the same weights on the same voxels beside it.
seg is SparseResUNet42, det SparseResNet21D; figures of det are those of its last stage's output.

- Every step gets another input: a ring of 8 batches, the scans turned and mirrored. They lie on the device; all maps
  are built anew in each step.
- Voxels come in the order that each library's users have them: as `voxelize` sorts them here, as measured in spconv.
- inference: weights in the compute dtype, running statistics, those of the first scan. forward + backward: the mean
  squared output in float32 and its gradients for all weights, which are in the compute dtype; in float16 the loss is
  scaled by 2^16 in both libraries, or gradients would vanish. "recomputing": with `ops.save_products`. train step: the
  same with float32 parameters (autocast in torch) and AdamW; here the state is given away.
- Here the step is compiled ahead of time, for inference with the weights as constants, for training with its state as
  a list of arrays: `compiled` counts that program and any that XLA compiled while the steps ran. Compile seconds go
  from Python to the program, without and with a filled cache on disk.
- spconv knows no bfloat16: beside this library's bfloat16 it computes in float16.
- On a CPU spconv gets one thread: with more, its scatter adds race and its results are wrong.
- error: of outputs (of the first scan) or gradients against float64 on the first batch, |difference| / |float64| in the
  2-norm; a result beyond the limit for its dtype gets no time.
- GPU ms: while kernels or copies run, from a trace.
- `--breakdown` adds where the GPU time goes, from a program without CUDA graphs, and a picture of it.
"""

import argparse
import hashlib
import itertools
import os
import pathlib
import pickle
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory to the library beside it

import breakdown
import jax
import jax.numpy as jnp
import measure
import networks_jaxsparse
import networks_spconv
import numpy as np
import reference
import report
import scans
from workloads import IN_FEATURES, LOSS_SCALE, WORKLOADS, first_scan


def in_dtype(voxels, dtype):
    """The voxels with features that the dtype holds exactly."""
    return scans.Voxels(voxels.coords, np.asarray(jnp.asarray(voxels.feats, dtype), np.float32))


def truth(workload, voxels, dtype):
    """Weights in numbers that the dtype holds exactly, and outputs or gradients of one batch in float64."""
    stages = workload.stages
    weights = reference.random_weights(reference.layers(stages, IN_FEATURES))
    *_, statistics = reference.output(stages, weights, voxels, training=True)
    weights = reference.with_statistics(weights, statistics)
    weights = jax.tree.map(lambda w: np.asarray(jnp.asarray(w, dtype), np.float32), weights)
    if workload.training:
        grads = reference.gradients(stages, weights, voxels)
        return weights, [g[:2] if isinstance(g, tuple) else g for g in grads]
    sites, feats, _ = reference.output(stages, weights, voxels)
    return weights, first_scan(sites, feats)


def cached(folder, inputs, compute):
    """The result, from a file in the folder where the same inputs and the same sources have left one."""
    if folder is None:
        return compute()
    here = pathlib.Path(__file__).parent
    sources = b"".join((here / f"{name}.py").read_bytes() for name in ("networks", "reference", "scans", "workloads"))
    key = hashlib.sha256(repr(inputs).encode() + sources).hexdigest()[:16]
    path = pathlib.Path(folder) / f"{inputs[0]}_{key}.pickle"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(compute()))
    return pickle.loads(path.read_bytes())


class Case:
    """One workload with so many scans a batch: ring, weights, and what the first batch should give."""

    def __init__(self, name, number, args):
        self.name, self.workload = name, WORKLOADS[name]
        each = [scans.read(args.data, s, self.workload.voxel_size, args.share) for s in self.workload.scans]
        self.scans = number or len(each)
        self.ring = [in_dtype(v, args.dtype) for v in scans.ring(scans.copies(each, self.scans))]
        first = self.ring[0]
        if not self.workload.training:  # scans do not see each other: the first stands for all
            first = scans.Voxels(*(a[first.coords[:, 0] == 0] for a in (first.coords, first.feats)))
        # What is computed depends on these alone.
        inputs = name, self.scans, args.dtype, args.share, *self.ring[0].coords.shape
        self.weights, self.expected = cached(args.cache, inputs, lambda: truth(self.workload, first, args.dtype))

    def rows(self, library, found, args, capacity):
        """Rows of results with what they are of; prints the time of each at once, or that it is wrong."""
        about = {"workload": self.name, "scans": self.scans, "voxels": len(self.ring[0].coords), "library": library}
        for row in found:
            row = {**about, "dtype": args.dtype, "capacity": capacity, **row}
            outcome = f"{time_cell(row)} ms" if "wall_ms" in row else f"wrong, error {row['error']:.1e}"
            print(f"{self.name}, {library}, {row['task']}: {outcome}", file=sys.stderr)
            yield row


def run(args):
    """Times and writes all workloads. spconv comes last: torch's profiler and JAX's get into each other's way."""
    cases, rows = [], []
    for name, number in itertools.product(args.workload, args.scans):
        if reason := scans.missing(args.data, WORKLOADS[name].scans):
            print(f"skipped {name}: {reason}")
            continue
        with measure.stage(f"{name}, float64"):
            cases.append(case := Case(name, number, args))
        for factor in args.capacity:
            with measure.stage(f"{name}, jaxsparse"):
                found = networks_jaxsparse.rows(case.workload, case.weights, case.ring, args, factor, case.expected)
            rows += case.rows("jaxsparse", found, args, factor)
    if not rows:
        return
    if args.out:  # a run that is cut short keeps them
        publish(rows, args)
    for case in cases:
        with measure.stage(f"{case.name}, spconv"):
            found = networks_spconv.rows(case.workload, case.weights, case.ring, args, case.expected)
        if not found:
            print(f"{case.name}: no spconv beside it")
        rows += case.rows("spconv", found, args, None)
    publish(sorted(rows, key=lambda row: (args.workload.index(row["workload"]), row["scans"])), args)


def publish(rows, args):
    """Prints the rows, and writes them with a picture."""
    report.write(args.out, "networks", "Networks on real scans", COLUMNS, rows, ["spconv-cu126", "spconv", "torch"])
    if args.out is not None:
        breakdown.draw(pathlib.Path(args.out) / "networks_breakdown.png", rows)


def time_cell(row):
    """Median and quartiles of the wall time."""
    if "wall_ms" not in row:
        return "wrong"
    low, high = row["wall_ms"]["quartiles"]
    return f"{row['wall_ms']['median']:.3g} ({low:.3g} to {high:.3g})"


COLUMNS = {
    "workload": lambda r: r["workload"],
    "task": lambda r: r["task"],
    "scans": lambda r: r["scans"],
    "voxels": lambda r: f"{r['voxels']:,}",
    "library": lambda r: r["library"],
    "dtype": lambda r: r["dtype"],
    "capacity": lambda r: r["capacity"],
    "wall ms, median (quartiles)": time_cell,
    "p50, p99 ms": lambda r: f"{r['p50_ms']:.3g}, {r['p99_ms']:.3g}" if "p50_ms" in r else None,
    "pipelined ms": lambda r: r.get("pipelined_ms"),
    "GPU ms": lambda r: r.get("gpu_ms"),
    "kernels": lambda r: r.get("kernels"),
    "memory MB": lambda r: r.get("memory_mb"),
    "compiled": lambda r: r.get("compiled"),
    "compile s, cold, cached": lambda r: "{:.3g}, {:.3g}".format(*r["compile_s"]) if "compile_s" in r else None,
    "error": lambda r: r.get("error"),
}


def main():
    """Runs the workloads and writes their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the scans; without it every workload is skipped")
    parser.add_argument(
        "--workload",
        nargs="+",
        choices=WORKLOADS,
        default=list(WORKLOADS),
        metavar="NAME",
        help=f"one or more of {', '.join(WORKLOADS)} (default: all)",
    )
    measure.add_device(parser)
    parser.add_argument("--dtype", choices=list(LOSS_SCALE), default="float16")
    parser.add_argument("--scans", type=int, nargs="+", default=[None], help="scans a batch (default: the workload's)")
    parser.add_argument("--capacity", type=float, nargs="+", default=[1.1], help="rows for each voxel of the largest")
    parser.add_argument("--steps", type=int, default=50, help="timed steps; published figures take at least 30")
    parser.add_argument("--calls", type=int, default=0, help="further steps here, for p50 and p99; published: 1,000")
    parser.add_argument("--concurrent", action="store_true", help="compile with jaxsparse.COMPILER_OPTIONS")
    parser.add_argument("--awake", action="store_true", help="keep cores awake, for both libraries (examples/awake.py)")
    parser.add_argument("--breakdown", action="store_true", help="where the GPU time goes (compiles once more)")
    parser.add_argument("--share", type=float, default=1.0, help="share of each scan to keep, for a quick look")
    parser.add_argument("--cache", default=None, help="folder that keeps the float64 results from run to run")
    parser.add_argument("--out", default=None, help="folder for networks.json and .md (default: only print)")
    args = parser.parse_args()
    measure.choose_device(args.device)
    with measure.awake_cores(args.awake):
        run(args)


if __name__ == "__main__":
    main()
