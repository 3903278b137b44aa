"""Single convolutions: every regime, every kernel that can serve it, forward, dgrad and wgrad, with spconv beside them.

    python benchmarks/layers.py --data SCANS [--dtype float16] [--rows levels kernels] [--out benchmarks/results]
    python benchmarks/layers.py --data SCANS --device cpu --dtype float32 --share 0.02 --steps 3     # a quick look

- Maps are given. A layer's time is that of its product alone; what it needs beyond the map (row order, pairs, the
  reversed map, transposed weights, channels padded with zeros) has its own column, "beyond us". spconv sorts rows while
  it builds its map, which is not in its figures. Its backward is one call, so it stands against dgrad plus wgrad.
- GPU time is the sum of kernel times in a profiler trace, the median of all steps, on a ring of different inputs. On a
  CPU it is wall time, and nothing is beside it.
- Candidates: every tile of `jaxsparse.ops.conv` that computes at most a quarter of its channels in vain, rows sorted or
  not; and plain JAX (`implementation="xla"`: gather and dense product a tap, by cuBLAS). The table shows the quickest,
  the .json file all.
- floor: the larger of useful FLOPs at the rate of a big matrix product and least bytes (input, output and weights once,
  4 bytes a pair) at the rate of a big copy, both measured in the same run.
- error: the largest of |found - true| / (1 ulp + s * 2^-23 * sum |x| |w|) over all elements, true being float64 on the
  same inputs, over a map that numpy finds; s is the root of the most steps of eight products that a sum has, or 8. A
  candidate above 1 gets no time. "tf32" is float32 at jax's default precision, on inputs that TF32 holds exactly;
  "float32" is precision "highest". spconv remembers kernels by shape alone: run the two in processes of their own.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import measure
import numpy as np
import report
import roofline
from layer_cases import DTYPES, PASSES, ROWS, Case, layers_of, pyramid
from reference import ONE

from jaxsparse.ops.conv import ConvConfig
from jaxsparse.ops.conv.choices import built_tiles, has_clusters, scheduled_widths
from jaxsparse.tuning.result import show

# cuBLAS as it comes, and each kernel by itself: layers are too short for CUDA graphs to matter.
COMPILER = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0, "xla_gpu_graph_min_graph_size": 10**6}
PLAIN = "plain JAX"
MOST_WASTE = 1.25  # channels that a tile may compute for each that is needed
PRODUCTS = ("conv_gemm", "wgrad_gemm")  # custom calls on a GPU; others prepare


def fitting(tiles, **sizes):
    """The tiles that compute little in vain along the given sides, or all where none does."""
    waste = [max(-(-n // (t := getattr(tile, side))) * t / n for side, n in sizes.items()) for tile in tiles]
    return [tile for tile, w in zip(tiles, waste, strict=True) if w <= max(MOST_WASTE, min(waste))]


def configs(layer, name, dtype):
    """What can compute a pass: (label, config, implementation). One table an operation: see `ConvConfig`."""
    # The kernel's input and output channels; wgrad's are always those of the finer and the coarser grid.
    swapped = (name == "dgrad") or (name == "wgrad" and layer.kind == "inverse")
    c_in, c_out = (layer.c_out, layer.c_in) if swapped else (layer.c_in, layer.c_out)
    plain = [(PLAIN, None, "xla")]
    if layer.kernel == ONE:
        return plain
    if jax.default_backend() != "gpu":
        rows = (64,) if name == "wgrad" else (32, 64, 128)
        return [(f"{r} rows", ConvConfig(tile_rows=r), "auto") for r in rows] + plain
    numbers = jnp.dtype(DTYPES[dtype])
    width, _ = scheduled_widths(numbers, c_in, c_out)
    if name == "wgrad":
        tiles = fitting(built_tiles("wgrad", numbers, width), rows=c_in, cols=c_out)
        return [(show(t), ConvConfig(wgrad=t), "auto") for t in tiles] + plain
    built = built_tiles("conv", numbers, width)
    tiles = [t for t in fitting(built, cols=c_out) if t.splits == 1 or has_clusters("cuda")]
    return [
        (show(t) + (", sorted" if sort else ""), ConvConfig(forward=t, dgrad=t, sort=sort), "auto")
        for t in tiles
        for sort in (True, False)
    ] + plain


# --- figures ---


def make_cases(layers, dtype, args, pool):
    """The cases of all layers; most of it is compilation, which goes on in parallel."""
    list(pool.map(lambda scene: pyramid(scene, args.data, args.share), {layer.scene for layer in layers}))
    return list(pool.map(lambda layer: Case(layer, dtype, args), layers))


def compile_all(cases, pool):
    """For each case its compiled candidates, (pass, label, compiled), each program under a name of its own."""
    found = []
    for case in cases:
        # 1x1 has no candidate but XLA, with the kernel that its users get.
        options = COMPILER if jax.default_backend() == "gpu" and case.layer.kernel != ONE else None
        prepared, programs = pool.submit(case.prepare), []
        chosen = [(name, *config) for name in PASSES for config in configs(case.layer, name, case.dtype)]
        for i, (name, label, *config) in enumerate(chosen):
            function = case.function(name, *config)
            function.__name__ = f"candidate_{i}"
            lowered = jax.jit(function).lower(*case.ring[0], *case.rest)
            programs.append((name, label, pool.submit(lowered.compile, options)))
        found.append((prepared, programs))
    for prepared, _ in found:
        prepared.result()
    return [[(name, label, future.result()) for name, label, future in programs] for _, programs in found]


def jaxsparse_rows(case, programs, rates, steps):
    """A row for each pass, with the times of all candidates."""
    ring = [(*operands, *case.rest) for operands in case.ring]
    errors = [case.error(name, program(*ring[0])) for name, _, program in programs]
    right = {i: program for i, (*_, program) in enumerate(programs) if errors[i] <= 1}
    plain = {i: program for i, program in right.items() if programs[i][1] == PLAIN}  # slow: fewer steps
    times = measure.program_times({i: program for i, program in right.items() if i not in plain}, ring, steps)
    times |= measure.program_times(plain, ring, min(steps, 8))
    flops, least = case.work
    rows = []
    for name in PASSES:
        row = {"layer": str(case.layer), "pass": name, "dtype": case.dtype, "sites": int(case.sites[1].count)}
        row |= {"pairs": case.pairs, "flops": flops, "bytes": least}
        row["floor_us"] = max(flops / rates["flops"], least / rates["bytes"]) * 1e6
        found = [
            {"kernel": label, "error": errors[i]} | (product_and_rest(program, times[i]) if i in times else {})
            for i, (of, label, program) in enumerate(programs)
            if of == name
        ]
        right_ones = [c for c in found if "us" in c]
        row |= min(right_ones, key=lambda c: c["us"]) if right_ones else {"error": min(c["error"] for c in found)}
        rows.append(row | {"candidates": found})
    return rows


def product_and_rest(program, times):
    """Median microseconds of the product, with quartiles, and of everything else in the program."""
    product = times.total
    calls = [i for i, (target, _) in measure.custom_calls(program).items() if target in PRODUCTS]
    if calls and times.by_instruction is not None:  # not plain JAX, and on a GPU
        product = sum(times.by_instruction[i] for i in calls)
    low, median, high = map(float, np.percentile(product, [25, 50, 75]))
    return {"us": median, "quartiles_us": [low, high], "beyond_us": float(np.median(times.total - product))}


def device_rates(steps):
    """FLOPs a second of a big bfloat16 matrix product and bytes a second of a big copy, read plus write."""
    on_gpu = jax.default_backend() == "gpu"
    n, rows = (8192, 2**28) if on_gpu else (512, 2**22)
    # Random numbers: a product of ones takes less power, and runs at a clock that nothing else reaches.
    a, b = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16), jnp.ones(rows, jnp.float32)

    def product(a, b):
        return a @ a

    def copy(a, b):
        return b + 1

    programs = {"flops": jax.jit(product).lower(a, b).compile(), "bytes": jax.jit(copy).lower(a, b).compile()}
    times, work = measure.program_times(programs, [(a, b)], steps), {"flops": 2 * n**3, "bytes": 8 * rows}
    return {key: work[key] / float(np.median(times[key].total)) * 1e6 for key in work}


def add_backward(rows, spconv):
    """dgrad and wgrad together, and spconv's figures beside each row that has one."""
    dgrad, wgrad = rows[1:]
    both = {**dgrad, "pass": "backward", "kernel": None, "error": max(dgrad["error"], wgrad["error"]), "candidates": []}
    for key in ("floor_us", "flops", "bytes", "us", "beyond_us"):
        both[key] = dgrad[key] + wgrad[key] if key in dgrad and key in wgrad else None
    rows = [*rows, both]
    for row in rows:
        row |= {f"spconv_{k}": v for k, v in spconv.get(row["pass"], {}).items()}
    return rows


def ratio(row):
    """How many times faster than spconv."""
    return row["spconv_us"] / row["us"] if row.get("us") and row.get("spconv_us") else None


COLUMNS = {
    "layer": lambda r: r["layer"],
    "pass": lambda r: r["pass"],
    "sites": lambda r: f"{r['sites']:,}",
    "pairs": lambda r: f"{r['pairs']:,}",
    "us": lambda r: r.get("us", "wrong"),
    "beyond us": lambda r: r.get("beyond_us"),
    "spconv us": lambda r: r.get("spconv_us"),
    "ratio": ratio,
    "floor us": lambda r: r["floor_us"],
    "TFLOP/s": lambda r: r["flops"] / r["us"] / 1e6 if r.get("us") else None,
    "GB/s": lambda r: r["bytes"] / r["us"] / 1e3 if r.get("us") else None,
    "error": lambda r: r["error"],
    "spconv error": lambda r: r.get("spconv_error"),
    "kernel": lambda r: r.get("kernel"),
}


def main():
    """Runs the chosen rows in each dtype and writes a table and a roofline of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the scans; rows whose scan is missing are skipped")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="groups of layers (default: all)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float16"])
    measure.add_device(parser)
    parser.add_argument("--steps", type=int, default=32, help="timed steps; published figures take at least 30")
    parser.add_argument("--share", type=float, default=1.0, help="share of each scan to keep, for a quick look")
    parser.add_argument("--out", default=None, help="folder for the results; without it they are only printed")
    args = parser.parse_args()
    measure.choose_device(args.device)
    layers = layers_of(args.rows, args.data)
    rates = device_rates(args.steps)
    found = {}
    for dtype in args.dtype:
        found[dtype] = timed_cases(layers, dtype, rates, args)
        if args.out:  # a run that is cut short keeps them
            publish(dtype, found[dtype][1], [{}] * len(found[dtype][0]), rates, args)
    for dtype, (cases, ours) in found.items():
        # Afterwards: once torch's profiler has run, JAX's gets no more events.
        with measure.stage(f"{dtype}, spconv"):
            beside = peer_figures(cases, args.steps)
        publish(dtype, ours, beside, rates, args)


def publish(dtype, ours, beside, rates, args):
    """Prints our rows with spconv's figures, and writes them with a roofline."""
    rows = [row for case, peer in zip(ours, beside, strict=True) for row in add_backward(case, peer)]
    measured = f"{rates['flops'] / 1e12:.0f} TFLOP/s, {rates['bytes'] / 1e12:.2f} TB/s"
    about = f"Single convolutions, {dtype}; a big product and a big copy reach {measured}"
    report.write(args.out, f"layers_{dtype}", about, COLUMNS, rows, ["spconv-cu126", "torch"], rates=rates)
    roofline.draw(args.out, f"layers_{dtype}", rows, rates)


def timed_cases(layers, dtype, rates, args):
    """The cases of one dtype, and our rows of each."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        with measure.stage(f"{dtype}, inputs"):
            cases = make_cases(layers, dtype, args, pool)
        with measure.stage(f"{dtype}, compiling"):
            programs = compile_all(cases, pool)
    with measure.stage(f"{dtype}, timing"):
        return cases, [jaxsparse_rows(*pair, rates, args.steps) for pair in zip(cases, programs, strict=True)]


def peer_figures(cases, steps):
    """spconv's time and error for forward and backward of each layer; empty where it cannot run."""
    if jax.default_backend() != "gpu":
        return [{} for _ in cases]
    try:
        import spconv_layers
    except ImportError as error:
        print(f"no spconv beside it: {error}")
        return [{} for _ in cases]
    return [spconv_layers.figures(case, steps) for case in cases]


if __name__ == "__main__":
    main()
