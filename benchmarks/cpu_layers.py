"""One submanifold layer on the CPU: building its kernel map, and its forward pass with the map given.

    python benchmarks/cpu_layers.py --data SCANS [--threads 1] [--steps 40] [--out benchmarks/results]

A 3^3 layer, C to C channels, float32, on the room scan at 5 cm, rows in the order in which `voxelize` puts them. Where
torch and spconv are installed, spconv stands beside it; the two take turns, so that a busy machine slows both. spconv
gets one thread: with more, the scatter adds of its CPU path race and the results are wrong. It has no backward pass
there. A result further than 1e-5 of the largest output from float64 gets no time.
"""

import argparse
import os
import time

SCAN, VOXEL_SIZE = "pcl_room_scan1", 0.05


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the scans")
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--steps", type=int, default=40, help="timed calls of each program")
    parser.add_argument("--threads", type=int, default=None, help="cores that jaxsparse may use (default: all)")
    parser.add_argument("--out", default=None, help="folder for the results; without it they are only printed")
    return parser.parse_args()


def jaxsparse_programs(voxels, kernels):
    """Functions without arguments that run to the end and return a numpy array: "map", and one for each kernel."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxsparse as js

    sites = js.SparseTensor(jnp.asarray(voxels.coords), jnp.asarray(voxels.feats), batch_size=1).sites
    build = jax.jit(lambda sites: js.kernel_map(sites, sites, 3)).lower(sites).compile()
    kernel_map = build(sites)

    @jax.jit
    def forward(x, kernel, kernel_map):
        return js.ops.conv(x, kernel, kernel_size=3, kernel_map=kernel_map).feats

    programs = {"map": lambda: np.asarray(build(sites).table)}
    for channels, (feats, kernel) in kernels.items():
        operands = js.SparseTensor(sites, jnp.asarray(feats)), jnp.asarray(kernel), kernel_map
        layer = forward.lower(*operands).compile()
        programs[channels] = lambda layer=layer, operands=operands: np.asarray(layer(*operands))
    return programs


def spconv_programs(voxels, kernels):
    """The same for spconv, or None where it is not installed."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read when OpenMP is loaded
    try:
        import spconv.pytorch as spconv
        import torch
        from spconv.pytorch import ops
    except ImportError:
        return None
    from spconv_peer import to_spconv

    torch.set_grad_enabled(False)
    coords = torch.from_numpy(voxels.coords)
    box = [int(voxels.coords[:, 1:].max()) + 1] * 3

    def build():
        three, one, zero = [3] * 3, [1] * 3, [0] * 3
        return ops.get_indice_pairs(coords, 1, box, spconv.ConvAlgo.Native, three, one, one, one, zero, subm=True)

    programs = {"map": lambda: build()[1].numpy()}
    for channels, (feats, kernel) in kernels.items():
        layer = spconv.SubMConv3d(channels, channels, 3, bias=False, indice_key="map")
        layer.weight.copy_(to_spconv(kernel, (3, 3, 3)))
        x = spconv.SparseConvTensor(torch.from_numpy(feats), coords, box, 1)
        with_map = layer(x).replace_feature(x.features)  # holds the map under its key
        programs[channels] = lambda layer=layer, x=with_map: layer(x).features.numpy()
    return programs


def main():
    """Runs the comparison."""
    args = arguments()
    if args.threads:
        # Before JAX starts its threads: it counts the cores that it may use.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    os.environ["JAX_PLATFORMS"] = "cpu"
    import numpy as np
    import reference
    import report
    import scans

    if reason := scans.missing(args.data, [SCAN]):
        print(f"skipped: {reason}")
        return
    voxels = scans.in_library_order(scans.read(args.data, SCAN, VOXEL_SIZE))
    rng = np.random.default_rng(0)
    kernels = {
        c: (rng.standard_normal((len(voxels.coords), c), np.float32), rng.standard_normal((27, c, c), np.float32))
        for c in args.channels
    }
    table = reference.table(voxels.coords, voxels.coords, reference.THREE, reference.ONE)
    expected = {c: reference.conv_output(*pair, table) for c, pair in kernels.items()}

    cores = len(os.sched_getaffinity(0))
    libraries = {
        f"jaxsparse, {cores} thread(s)": jaxsparse_programs(voxels, kernels),
        "spconv, 1 thread": spconv_programs(voxels, kernels),
    }
    libraries = {name: programs for name, programs in libraries.items() if programs}
    rows = []
    for task in ["map", *args.channels]:
        times = {name: [] for name in libraries}
        errors = dict.fromkeys(libraries)
        for step in range(3 + args.steps):
            for name, programs in libraries.items():
                start = time.perf_counter()
                out = programs[task]()
                elapsed = 1e3 * (time.perf_counter() - start)
                if step >= 3:
                    times[name].append(elapsed)
                if task != "map":
                    error = np.abs(out - expected[task]).max() / np.abs(expected[task]).max()
                    errors[name] = float(max(error, errors[name] or 0.0))
        for name in libraries:
            row = {
                "task": "kernel map" if task == "map" else f"forward, {task} channels",
                "library": name,
                "error": errors[name],
            }
            if task == "map" or errors[name] <= 1e-5:
                row |= {"least": float(min(times[name])), "median": float(np.median(times[name]))}
            rows.append(row)
    columns = {
        "": lambda r: r["task"],
        "library": lambda r: r["library"],
        "least ms": lambda r: r.get("least"),
        "median ms": lambda r: r.get("median"),
        "largest error / largest output": lambda r: r["error"],
    }
    about = (
        f"A 3^3 submanifold layer on the CPU: {SCAN} at {VOXEL_SIZE * 100:.0f} cm, {len(voxels.coords):,} sites, "
        "float32"
    )
    report.write(args.out, "cpu_layers", about, columns, rows, peers=["spconv", "torch"])


if __name__ == "__main__":
    main()
