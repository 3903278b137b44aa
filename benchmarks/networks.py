"""Whole networks on real scans: wall time, GPU time, memory and compilations, with a check against float64.

    python benchmarks/networks.py --data SCANS [--workload seg-kitti ...] [--dtype float16] [--out benchmarks/results]
    python benchmarks/networks.py --data SCANS --workload seg-nuscenes --dtype float32 --steps 3 --share 0.25   # a CPU

Where torch and spconv are installed, spconv runs the same network with the same weights on the same voxels beside it.
seg is SparseResUNet42, det SparseResNet21D; figures of det are those of its last stage's output.

- Every step gets another input: a ring of 8 batches, the scans turned and mirrored. Inputs and weights lie on the
  device; all maps are built anew in each step. Weights are stored in the compute dtype in both libraries.
- Voxels come in the order that each library's users have them: as `voxelize` sorts them here, as measured in spconv.
- Inference uses running statistics, those of the first batch. Training is the mean squared output in float32 and its
  gradients for all weights; in float16 the loss is scaled by 2^16 in both libraries, or gradients would vanish.
- Here the model is split once and its step compiled ahead of time: `compiled` counts that program and any that XLA
  compiled while the steps ran.
- On a CPU spconv gets one thread: with more, its scatter adds race and its results are wrong.
- error: of outputs or gradients against float64 on the first batch, |difference| / |float64| in the 2-norm; a result
  beyond the limit for its dtype gets no time.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory to the library beside it

import jax
import jax.numpy as jnp
import measure
import numpy as np
import reference
import report
import scans
from flax import nnx

import jaxsparse as js
from jaxsparse.models import blocks

IN_FEATURES = 4
LOSS_SCALE = {"float16": 2.0**16, "bfloat16": 1.0, "float32": 1.0}


@dataclass(frozen=True)
class Network:
    """A model of this library, and its description for a given width, from which reference and peer are made."""

    model: type
    stages: Callable[[float], tuple[reference.Stage, ...]]


SEG = Network(js.models.SparseResUNet42, reference.seg_stages)
DET = Network(js.models.SparseResNet21D, reference.det_stages)


@dataclass(frozen=True)
class Workload:
    """A network on scans: one scan a batch entry, voxel edge in metres, or one an axis."""

    network: Network
    scans: tuple[str, ...]
    voxel_size: float | tuple[float, float, float]
    width: float = 1.0
    training: bool = False

    @property
    def stages(self):
        """Description of the network at its width."""
        return self.network.stages(self.width)


WORKLOADS = {
    "seg-kitti": Workload(SEG, ("semkitti_00_000000",), 0.05),
    "seg-kitti-half": Workload(SEG, ("semkitti_00_000000",), 0.05, width=0.5),
    "seg-nuscenes": Workload(SEG, ("nusc_key00",), 0.1),
    "seg-room": Workload(SEG, ("pcl_room_scan1",), 0.02),
    "det-nuscenes10": Workload(DET, ("nusc_10sweep",), (0.1, 0.1, 0.2)),
    "det-pandaset": Workload(DET, ("pandaset_002_01",), (0.1, 0.1, 0.15)),
    "seg-kitti-train": Workload(SEG, ("semkitti_00_000000", "semkitti_00_000001"), 0.05, training=True),
    "det-pandaset-train": Workload(DET, ("pandaset_002_01", "pandaset_002_40"), (0.1, 0.1, 0.15), training=True),
}


def error_limit(dtype, training):
    """The largest error that passes.

    With 16-bit floats and TF32 every layer rounds what it multiplies: ten roundings. In float32 the sums round, of up
    to 27 x 512 products: the square root of that, about a hundred. Gradients jump where a ReLU's input lies so close
    to 0 that rounding changes its sign; one such unit was seen to move the gradients of a small scene by 2 percent.
    """
    exact = dtype == "float32" and jax.default_backend() == "cpu"
    if training:
        return 0.05 if exact else 0.3
    if exact:
        return 100 * 2.0**-23
    return 10 * (2.0**-10 if dtype == "float32" else float(jnp.finfo(dtype).eps))


def error(found, expected):
    """|found - expected| / |expected| in the 2-norm over all leaves; infinite where the numbers of sites differ."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    if any(np.shape(f) != e.shape for f, e in pairs):
        return float("inf")
    difference = sum(float(np.sum((np.asarray(f, np.float64) - e) ** 2)) for f, e in pairs)
    return float(np.sqrt(difference / sum(float(np.sum(e**2)) for _, e in pairs)))


def by_site(sites, feats):
    """The features in an order that depends on their sites alone."""
    return feats[np.argsort(reference.keys(sites))]


def figures(step, ring, sync, gpu_ms, steps):
    """All times of one program."""
    times = measure.summary(measure.wall_ms(step, ring, sync, steps))
    return {
        "wall_ms": times,
        "pipelined_ms": measure.pipelined_ms(step, ring, sync, steps),
        "gpu_ms": gpu_ms(step, ring, min(steps, len(ring))),
    }


# --- jaxsparse ---


def layers_in_order(module):
    """Convolutions and norms of a network, or of a part, in running order: a block's shortcut after its second norm."""
    match module:
        case js.models.SparseResUNet42():
            encoder = zip(module.down, module.encoder, strict=True)
            decoder = zip(module.up, module.decoder, strict=True)
            parts = [module.stem, *itertools.chain(*encoder), *itertools.chain(*decoder)]
        case js.models.SparseResNet21D():
            parts = module.stages
        case nnx.Sequential():
            parts = module.layers
        case blocks.ConvBlock():
            parts = [module.conv, module.norm]
        case blocks.ResidualBlock():
            parts = [module.conv1, module.norm1, module.conv2, module.norm2]
            parts += [] if module.shortcut is None else [module.shortcut]
        case _:
            return [module]
    return [layer for part in parts for layer in layers_in_order(part)]


def jaxsparse_model(workload, weights, dtype):
    """The network with the given weights, computing in `dtype` and with its parameters stored so."""
    model = workload.network.model(IN_FEATURES, width=workload.width, dtype=dtype, rngs=nnx.Rngs(0))
    for layer, values in zip(layers_in_order(model), weights, strict=True):
        if isinstance(values, tuple):
            for variable, value in zip((layer.scale, layer.bias, layer.mean, layer.var), values, strict=True):
                variable[...] = jnp.asarray(value)
        else:
            layer.kernel[...] = jnp.asarray(values)
    nnx.update(model, jax.tree.map(lambda a: a.astype(dtype), nnx.state(model, nnx.Param)))
    return model


def last_output(model, x):
    """The output of the last stage."""
    y = model(x)
    return y[-1] if isinstance(y, list) else y


def jaxsparse_tensor(voxels, dtype, capacity, capacities=None):
    """The voxels as `voxelize` makes them, sorted; voxel centres stand in for points, so voxels stay as they are."""
    n, spare = len(voxels.coords), capacity - len(voxels.coords)
    centres = np.pad(voxels.coords[:, 1:] + np.float32(0.5), [(0, spare), (0, 0)])
    x, _ = js.voxelize(
        jnp.asarray(centres),
        jnp.asarray(np.pad(voxels.feats, [(0, spare), (0, 0)])),
        voxel_size=1.0,
        origin=(0.0, 0.0, 0.0),
        capacity=capacity,
        count=jnp.int32(n),
        batch=jnp.asarray(np.pad(voxels.coords[:, 0], (0, spare))),
        batch_size=int(voxels.coords[:, 0].max()) + 1,
        capacities=capacities,
    )
    return x.check().with_feats(x.feats.astype(dtype))


def jaxsparse_ring(ring, model, dtype):
    """Resident tensors of one shape, a tenth more rows than the largest needs, with capacities planned for all."""
    largest = max(len(v.coords) for v in ring)
    capacity = -(-int(1.1 * largest) // 1024) * 1024
    capacities = js.capacities(model, [jaxsparse_tensor(v, dtype, capacity) for v in ring])
    return [jaxsparse_tensor(v, dtype, capacity, capacities) for v in ring]


def jaxsparse_inference(workload, weights, ring, dtype):
    """The compiled step, its weights, the ring, and a function that gives the first batch's output for comparison."""
    model = jaxsparse_model(workload, weights, dtype)
    model.eval()
    inputs = jaxsparse_ring(ring, model, dtype)
    graph, state = nnx.split(model)

    def run(state, x):
        y = last_output(nnx.merge(graph, state), x)
        return y.feats, y.status

    compiled = jax.jit(run).lower(state, inputs[0]).compile()

    def first_output():
        feats, status = compiled(state, inputs[0])
        js.status.check(status)
        sites = jax.jit(lambda state, x: last_output(nnx.merge(graph, state), x).sites)(state, inputs[0])
        real = slice(int(sites.count))
        return by_site(np.asarray(sites.coords)[real], np.asarray(feats, np.float64)[real])

    return compiled, state, inputs, first_output


def jaxsparse_training(workload, weights, ring, dtype):
    """The same for loss and gradients; the first batch's gradients come as `reference.gradients` gives them."""
    model = jaxsparse_model(workload, weights, dtype)
    model.train()
    inputs = jaxsparse_ring(ring, model, dtype)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    scale = LOSS_SCALE[dtype]

    def loss(params, rest, x):
        model = nnx.merge(graph, params, rest, copy=True)  # norms update their own copy of the running statistics
        y = last_output(model, x)
        mean = jnp.sum(jnp.square(y.feats.astype(jnp.float32))) / (y.count * y.feats.shape[1])
        return scale * mean, (y.status, nnx.state(model, nnx.BatchStat))

    def run(state, x):
        return jax.value_and_grad(loss, has_aux=True)(*state, x)

    compiled = jax.jit(run).lower((params, rest), inputs[0]).compile()

    def first_output():
        (_, (status, _)), grads = compiled((params, rest), inputs[0])
        js.status.check(status)
        found = []
        for layer in layers_in_order(nnx.merge(graph, grads, rest)):
            names = ("scale", "bias") if isinstance(layer, js.nn.BatchNorm) else ("kernel",)
            values = [np.asarray(getattr(layer, name)[...], np.float64) / scale for name in names]
            found.append(tuple(values) if len(values) > 1 else values[0])
        return found

    return compiled, (params, rest), inputs, first_output


def run_jaxsparse(workload, weights, ring, dtype, steps, expected):
    """The row of results of one workload."""
    build = jaxsparse_training if workload.training else jaxsparse_inference
    # Everything that compiles before the step, such as the ring's voxelize, is not the network's.
    compiled, state, inputs, first_output = build(workload, weights, ring, dtype)
    with measure.count_compilations() as compilations:
        row = {"error": error(first_output(), expected)}
        if row["error"] <= error_limit(dtype, workload.training):
            step = lambda x: compiled(state, x)  # noqa: E731
            compilations.clear()
            row |= figures(step, inputs, jax.block_until_ready, measure.jax_gpu_ms, steps)
        row |= {"compiled": 1 + len(compilations), "memory_mb": measure.memory_mb(compiled)}
    return row


# --- spconv ---


def run_spconv(workload, weights, ring, dtype, steps, expected):
    """The same for spconv, or None where it cannot run: not installed, or training without a GPU."""
    if jax.default_backend() == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"  # with more threads its scatter adds race, and rows lose taps
    try:
        import spconv_peer
        import torch
    except ImportError:
        return None
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    if device == "cpu" and (workload.training or dtype != "float32"):
        return None  # spconv's CPU path has neither gradients nor 16-bit floats
    net = spconv_peer.build(workload.stages, weights, IN_FEATURES, dtype, device).train(workload.training)
    inputs = spconv_peer.inputs(ring, dtype, device)

    def infer(x):
        with torch.no_grad():
            return net(spconv_peer.tensor(x))

    def train(x):
        net.zero_grad(set_to_none=True)
        loss = net(spconv_peer.tensor(x)).features.float().square().mean() * LOSS_SCALE[dtype]
        loss.backward()
        return loss

    def first_output():
        if not workload.training:
            y = infer(inputs[0])
            return by_site(y.indices.cpu().numpy(), y.features.double().cpu().numpy())
        train(inputs[0])
        return jax.tree.map(lambda g: g.astype(np.float64) / LOSS_SCALE[dtype], spconv_peer.gradients(net))

    step = train if workload.training else infer
    sync = (lambda _: torch.cuda.synchronize()) if device == "cuda" else (lambda _: None)
    row = {"error": error(first_output(), expected)}
    if row["error"] <= error_limit(dtype, workload.training):
        row |= figures(step, inputs, sync, measure.torch_gpu_ms, steps)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(inputs[0])
        row["memory_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return row


# --- the command ---


def run_workload(name, args):
    """Rows of one workload, a library each."""
    workload = WORKLOADS[name]
    if reason := scans.missing(args.data, workload.scans):
        print(f"skipped {name}: {reason}")
        return []
    ring = scans.ring([scans.read(args.data, s, workload.voxel_size, args.share) for s in workload.scans])
    weights = reference.random_weights(reference.layers(workload.stages, IN_FEATURES))
    *_, statistics = reference.output(workload.stages, weights, ring[0], training=True)
    weights = reference.with_statistics(weights, statistics)
    # All get numbers that their dtype holds exactly, the reference too.
    weights = jax.tree.map(lambda w: np.asarray(jnp.asarray(w, args.dtype), np.float32), weights)
    ring = [scans.Voxels(v.coords, np.asarray(jnp.asarray(v.feats, args.dtype), np.float32)) for v in ring]
    if workload.training:
        grads = reference.gradients(workload.stages, weights, ring[0])
        expected = [g[:2] if isinstance(g, tuple) else g for g in grads]
    else:
        sites, feats, _ = reference.output(workload.stages, weights, ring[0])
        expected = by_site(sites, feats)

    rows = []
    for library, run in {"jaxsparse": run_jaxsparse, "spconv": run_spconv}.items():
        row = run(workload, weights, ring, args.dtype, args.steps, expected)
        if row is None:
            print(f"{name}: no {library} beside it")
            continue
        row = {"workload": name, "voxels": len(ring[0].coords), "library": library, "dtype": args.dtype, **row}
        if "wall_ms" not in row:
            print(f"{name}: {library} is wrong, error {row['error']:.1e}", file=sys.stderr)
        rows.append(row)
    return rows


def time_cell(row):
    """Median and quartiles of the wall time."""
    if "wall_ms" not in row:
        return "wrong"
    low, high = row["wall_ms"]["quartiles"]
    return f"{row['wall_ms']['median']:.3g} ({low:.3g} to {high:.3g})"


COLUMNS = {
    "workload": lambda r: r["workload"],
    "voxels": lambda r: f"{r['voxels']:,}",
    "library": lambda r: r["library"],
    "dtype": lambda r: r["dtype"],
    "wall ms, median (quartiles)": time_cell,
    "pipelined ms": lambda r: r.get("pipelined_ms"),
    "GPU ms": lambda r: r.get("gpu_ms"),
    "memory MB": lambda r: r.get("memory_mb"),
    "compiled": lambda r: r.get("compiled"),
    "error": lambda r: r["error"],
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
    parser.add_argument("--device", choices=["cpu", "gpu"], default=None, help="where to run (default: JAX's default)")
    parser.add_argument("--dtype", choices=list(LOSS_SCALE), default="float16")
    parser.add_argument("--steps", type=int, default=50, help="timed steps; published figures take at least 30")
    parser.add_argument("--share", type=float, default=1.0, help="share of each scan to keep, for a quick look")
    parser.add_argument("--out", default=None, help="folder for networks.json and .md (default: only print)")
    args = parser.parse_args()
    if args.device:
        jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[args.device])

    rows = [row for name in args.workload for row in run_workload(name, args)]
    if rows:
        peers = ["spconv-cu126", "spconv", "torch"]
        report.write(args.out, "networks", "Networks on real scans", COLUMNS, rows, peers)


if __name__ == "__main__":
    main()
