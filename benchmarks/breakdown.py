"""Where the GPU time of a step goes: by what each kernel's instruction computes; and stacked bars of it.

python benchmarks/breakdown.py RESULTS/networks.json      # draws networks_breakdown.png beside it
"""

import json
import pathlib
import sys
from collections import Counter

import measure

PARTS = {
    "maps": ("unique_sites", "coarse_sites", "site_index", "kernel_map"),
    "row order, pairs": ("conv_schedule", "conv_pairs", "reverse_table"),
    "forward": ("conv_gemm", "conv_fused", "conv_forward"),
    "dgrad": (),  # the same kernels, in a backward pass
    "wgrad": ("wgrad_gemm", "conv_wgrad"),
    "1x1 products": ("linear_fused",),  # and XLA's, in every pass
    "norms, elementwise": ("channel_moments", "batch_norm", "batch_norm_grad"),  # and XLA's fusions
    "rest": (),
}
# Kernels inside a CUDA graph do not say which instruction they come from.
WITHOUT_GRAPHS = {"xla_gpu_graph_min_graph_size": 10**6}


def part_of(kernel, calls):
    """The part that a kernel belongs to. `calls`: see `measure.custom_calls`."""
    target, is_backward = calls.get(kernel.instruction, (None, False))
    if target is None:
        if any(word in kernel.instruction for word in ("gemm", "dot", "cublas")):
            return "1x1 products"
        return "norms, elementwise" if "fusion" in kernel.instruction else "rest"
    part = next((name for name, targets in PARTS.items() if target in targets), "rest")
    return "dgrad" if part == "forward" and is_backward else part


def of_step(lowered, stepper, batches):
    """Milliseconds of each part of a step. `stepper` makes a step of a batch from the compiled program."""
    compiled = lowered.compile(compiler_options=WITHOUT_GRAPHS)
    step, calls = stepper(compiled), measure.custom_calls(compiled)
    measure.run_steps(step, batches, 2)
    kernels = measure.gpu_kernels(lambda: measure.run_steps(step, batches, len(batches)))
    total = Counter(dict.fromkeys(PARTS, 0.0))
    for kernel in kernels:
        total[part_of(kernel, calls)] += kernel.ns / 1e6 / len(batches)
    return dict(total)


def draw(path, rows):
    """Stacked bars of all rows that have a breakdown, or a message where matplotlib is missing."""
    rows = [row for row in rows if "breakdown_ms" in row]
    if not rows:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no matplotlib here: python benchmarks/breakdown.py networks.json draws the picture elsewhere")
        return
    figure = Figure(figsize=(9, 1 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['workload']}, {row['task']}, {row['dtype']}" for row in rows]
    left = [0.0] * len(rows)
    for part in PARTS:
        widths = [row["breakdown_ms"][part] for row in rows]
        axes.barh(names, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("GPU ms a step")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    for path in map(pathlib.Path, sys.argv[1:]):
        draw(path.with_name(f"{path.stem}_breakdown.png"), json.loads(path.read_text())["results"])
