"""What bounds each product: Nsight Compute's counters of the kernels that the library chooses for layers.

    python benchmarks/bounds.py --data SCANS [--dtype float16] [--rows levels] [--out benchmarks/results]

Needs `ncu` on the path and leave to read the GPU's counters. The profiler runs this program once more, with `--run`,
and each kernel several times, with clocks and caches as they are; of two launches the second counts. Clocks are lower
than in `layers.py`, since the GPU idles in between: times are longer by up to a tenth. A unit's share is that of the
most it could do in the whole time of the kernel, its beginning and end included.
"""

import argparse
import csv
import pathlib
import shutil
import subprocess
import sys
import tempfile

import jax
import layers
import measure
import report
from layer_cases import DTYPES, PASSES, ROWS, Case, layers_of

KERNELS = "implicit_gemm_kernel|wgrad_partial_kernel"
LAUNCHES = 2
SECTIONS = "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats"
NS, L2_SECTORS = "gpu__time_duration.sum", "lts__t_sectors_srcunit_tex.sum"  # sectors of 32 bytes
PERCENT = ".avg.pct_of_peak_sustained_elapsed"
UNITS = {
    "L2": "lts__throughput" + PERCENT,
    "L1 and shared memory": "l1tex__data_pipe_lsu_wavefronts" + PERCENT,
    "DRAM": "gpu__dram_throughput" + PERCENT,
    "tensor cores": "sm__pipe_tensor_cycles_active" + PERCENT,
    "issue slots": "sm__inst_issued" + PERCENT,
}
STALL = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
NO_STALL = "selected", "not_selected"
WAITS = {
    "long_scoreboard": "memory",
    "short_scoreboard": "shared memory",
    "barrier": "each other",
    "wait": "their last instruction",
    "dispatch_stall": "the dispatcher",
}
BUSY = 55  # percent from which a unit is said to bound a kernel


def launches(path):
    """The profiled launches in what ncu wrote with `--csv --page raw`: a dict of metrics each, numbers as float."""

    def value(text):
        try:
            return float(text.replace(",", ""))
        except ValueError:
            return text

    lines = [line for line in pathlib.Path(path).read_text().splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))[1:]  # the first has the units
    return [{name: value(text) for name, text in row.items()} for row in rows]


def figures(launch):
    """Time, traffic, shares of the units and the commonest reason to wait, of one launch."""
    us, (start, end) = launch[NS] / 1e3, STALL
    stalls = {m.removeprefix(start).removesuffix(end): v for m, v in launch.items() if m.startswith(start)}
    return {
        "us": us,
        "l2_bytes": 32 * launch[L2_SECTORS],
        "percent": {unit: launch[metric] for unit, metric in UNITS.items()},
        "stall": max(set(stalls) - set(NO_STALL), key=stalls.__getitem__),
    }


def bound(row):
    """One sentence on what bounds a kernel."""
    unit, *others = sorted(row["percent"], key=row["percent"].__getitem__, reverse=True)
    rest = ", ".join(f"{other} {row['percent'][other]:.0f}" for other in others)
    if row["percent"][unit] >= BUSY:
        return f"{unit}: {row['percent'][unit]:.0f} % ({rest})"
    waits = WAITS.get(row["stall"], row["stall"])
    return f"latency: warps wait for {waits}; busiest is {unit}, {row['percent'][unit]:.0f} % ({rest})"


COLUMNS = {
    "layer": lambda r: r["layer"],
    "pass": lambda r: r["pass"],
    "us": lambda r: r["us"],
    "L2 to and from multiprocessors, TB/s": lambda r: r["l2_bytes"] / r["us"] / 1e6,
    "bound by": bound,
}


def run(found, args):
    """What is profiled: each pass of each layer, `LAUNCHES` times."""
    for layer in found:
        case = Case(layer, args.dtype, args)
        for name in PASSES:
            lowered = jax.jit(case.function(name, None, "auto")).lower(*case.ring[0], *case.rest)
            program = lowered.compile(layers.COMPILER)
            measure.run_steps(lambda of_ring, p=program, rest=case.rest: p(*of_ring, *rest), case.ring, LAUNCHES)


def profile(path):
    """Runs this program under the profiler, which writes `path`."""
    as_is = "--clock-control", "none", "--cache-control", "none"
    raw = "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(path)
    sections = [word for section in SECTIONS for word in ("--section", section)]
    metrics = ",".join([NS, L2_SECTORS, *UNITS.values()])
    what = "--kernel-name", f"regex:{KERNELS}", *sections, "--metrics", metrics
    subprocess.run(["ncu", *as_is, *raw, *what, sys.executable, __file__, *sys.argv[1:], "--run"], check=True)


def main():
    """Profiles the chosen rows and writes a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the scans; rows whose scan is missing are skipped")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["levels"], help="groups of layers")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--share", type=float, default=1.0, help="share of each scan to keep, for a quick look")
    parser.add_argument("--out", default=None, help="folder for the results; without it they are only printed")
    parser.add_argument("--run", action="store_true", help="only run what is to be profiled")
    args = parser.parse_args()
    if not (found := layers_of(args.rows, args.data)):
        return
    if args.run:
        run(found, args)
        return
    if shutil.which("ncu") is None:
        parser.error("`ncu`, NVIDIA Nsight Compute's command line, is not on the path")
    with tempfile.TemporaryDirectory() as folder:
        profile(pathlib.Path(folder) / "ncu.csv")
        seen = launches(pathlib.Path(folder) / "ncu.csv")[LAUNCHES - 1 :: LAUNCHES]
    of = [{"layer": str(layer), "pass": name} for layer in found for name in PASSES]
    rows = [names | figures(launch) for names, launch in zip(of, seen, strict=True)]
    report.write(args.out, f"bounds_{args.dtype}", f"What bounds single convolutions, {args.dtype}", COLUMNS, rows)


if __name__ == "__main__":
    main()
