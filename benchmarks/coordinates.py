"""Coordinates alone: voxels from points, the kernel maps of a layer and of whole networks, builders, growth.

    python benchmarks/coordinates.py --data SCANS [--part scans builders growth] [--out benchmarks/results]

- scans: raw points to voxels with mean features; the map of one 3^3 submanifold layer; all maps of SparseResUNet42 (9,
  on semkitti_00_000000 at 5 cm) and SparseResNet21D (8, on nusc_10sweep) with the sites of every level. Where torch and
  spconv are installed and there is a GPU, spconv builds the same maps beside it (for inference, as its layers do).
- builders: the submanifold map of every scan at kernels 2^3, 3^3, 5^3, 7^3 and (1, 3, 1), by each builder.
- growth: 10 thousand to 4 million voxels, a scan cut down or set beside itself; and capacity 4 times the count.

Every step gets another input, a ring of turned and mirrored scans. GPU time is the sum of kernel times from a profiler
trace; wall is synchronised before and after. On a CPU only wall times are taken. Every map of this library is checked
against a binary search in numpy on the host before it gets a time; a wrong one gets none.
"""

import argparse
import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import inputs
import jax
import jax.numpy as jnp
import measure
import numpy as np
import report
import scans

import jaxsparse as js
from jaxsparse.geometry import Geometry

SCANS = {
    "semkitti_00_000000": 0.05,
    "kitti_obj_000002": 0.05,
    "nusc_key00": 0.1,
    "nusc_10sweep": (0.1, 0.1, 0.2),
    "pandaset_002_01": 0.1,
    "ouster_os0128": 0.05,
    "pcl_room_scan1": 0.02,
    "redwood_fragment": 0.02,
}
KERNELS = (2, 3, 5, 7, (1, 3, 1))
# Kernel, strides of each strided convolution, and kernels of the submanifold ones: one a grid.
SEG = ((2, 2),) * 4
DET = ((3, 2),) * 3 + (((1, 3, 1), (1, 2, 1)),)


def points_ring(folder, name, length=4):
    """The scan's points and features, mirrored in x and y."""
    with np.load(f"{folder}/{name}.npz") as arrays:
        xyz = arrays["xyz"].astype(np.float32)
    signs = [np.float32([1 - 2 * (i & 1), 1 - (i & 2), 1]) for i in range(length)]
    return [(jnp.asarray(xyz * s), jnp.asarray(np.column_stack([xyz * s, xyz[:, 0]]))) for s in signs]


def voxelizer(voxel_size, capacity):
    """A function of points and features."""
    return lambda points: js.voxelize(*points, voxel_size, capacity=capacity)


def sites_ring(folder, name):
    """Sites of a ring of scans, in the least capacity that holds them all with a tenth to spare."""
    ring = points_ring(folder, name)
    most = max(int(jax.jit(voxelizer(SCANS[name], len(p[0])))(p)[0].count) for p in ring)
    voxelize = jax.jit(voxelizer(SCANS[name], inputs.capacity_for(most)))
    return [voxelize(p)[0].check().sites for p in ring]


def layer_map(kernel, strides=1, builder="auto"):
    """A function of sites that builds one submanifold map."""

    def build(sites):
        m = js.kernel_map(sites, sites, kernel, strides, builder=builder)
        return m.table, m.masks

    return build


def network_maps(convs, last_is_submanifold, capacities):
    """A function of sites that builds all coarser sites and all maps of a network: strided, and 3^3 of each grid.

    It returns nothing that it was given: XLA would copy that.
    """

    def build(sites):
        levels, maps = [sites], []
        for (kernel, strides), capacity in zip(convs, capacities, strict=True):
            geometry = Geometry.create(3, kernel, strides)
            levels.append(levels[-1].coarse(geometry, "reachable", capacity=capacity))
            maps.append(js.kernel_map(levels[-2], levels[-1], kernel, strides))
        maps += [js.kernel_map(s, s, 3) for s in levels[: len(convs) + last_is_submanifold]]
        return (
            [(m.table, m.masks) for m in maps],
            [s.count for s in levels[1:]],
            [s.coords for s in levels[1:]],
            levels[-1].status,
        )

    return build


def keys(sites):
    """One int64 a site, for coordinates of at most 17 bits and sign."""
    b, x, y, z = sites.astype(np.int64).T
    return ((b << 18 | x + 2**17) << 18 | y + 2**17) << 18 | z + 2**17


def is_right(table, fine, coarse, kernel, strides=1):
    """Whether a table is that of the geometry, by binary search on the host."""
    geometry = Geometry.create(3, kernel, strides)
    fine_keys = keys(fine)
    order = np.argsort(fine_keys)
    for row, tap in zip(table, geometry.taps, strict=True):
        wanted = coarse.copy()
        wanted[:, 1:] = coarse[:, 1:] * geometry.stride - geometry.padding + np.array(tap) * geometry.dilation
        wanted = keys(wanted)
        at = order[np.searchsorted(fine_keys, wanted, sorter=order).clip(max=len(fine) - 1)]
        if not np.array_equal(row[: len(coarse)], np.where(fine_keys[at] == wanted, at, -1)):
            return False
    return True


def figures(step, ring, args):
    """Wall and GPU microseconds of a compiled function over a ring."""
    wall = measure.summary(measure.wall_ms(step, ring, jax.block_until_ready, args.steps))
    gpu = measure.jax_gpu_ms(step, ring, min(args.steps, 16))
    return {
        "gpu_us": None if gpu is None else 1e3 * gpu,
        "wall_us": 1e3 * wall["median"],
        "wall_quartiles_us": [1e3 * q for q in wall["quartiles"]],
    }


def row(what, scan, sites, build, ring, check, args):
    """A row of results: builds on the whole ring, checks the first, times."""
    compiled = jax.jit(build).lower(ring[0]).compile()
    if not check(compiled(ring[0])):
        return {"what": what, "scan": scan, "sites": sites, "library": "jaxsparse", "right": False}
    memory = measure.memory_mb(compiled)
    timed = figures(compiled, ring, args)
    return {
        "what": what,
        "scan": scan,
        "sites": sites,
        "library": "jaxsparse",
        "right": True,
        "memory_mb": memory,
        **timed,
    }


# --- parts ---


def voxel_rows(name, args):
    """Points to voxels, checked against numpy."""
    ring = points_ring(args.data, name)
    sizes = np.float32(1) / np.float32(SCANS[name])
    cells = [np.unique(np.floor(np.asarray(p[0]) * sizes).astype(np.int32), axis=0) for p in ring]
    count, first = max(map(len, cells)), cells[0]
    build = voxelizer(SCANS[name], inputs.capacity_for(count))

    def check(result):
        x, index = result
        found = inputs.real(x.check().sites)
        if not np.array_equal(np.unique(found[:, 1:], axis=0), first):
            return False
        sums = np.zeros((len(found), 4))
        np.add.at(sums, np.asarray(index), np.asarray(ring[0][1], np.float64))
        mean = sums / np.bincount(np.asarray(index), minlength=len(found))[:, None]
        return np.abs(np.asarray(x.feats)[: len(found)] - mean).max() <= 1e-6 * np.abs(mean).max()

    return row(f"voxels with features, {len(ring[0][0]):,} points", name, len(first), build, ring, check, args)


def network_row(name, what, convs, last_is_submanifold, args):
    """All maps of a network, each checked."""
    ring = sites_ring(args.data, name)
    probe = jax.jit(network_maps(convs, last_is_submanifold, [3 * ring[0].capacity] * len(convs)))
    counts = np.max([[int(c) for c in probe(s)[1]] for s in ring], axis=0)
    build = network_maps(convs, last_is_submanifold, [inputs.capacity_for(c) for c in counts])

    def check(result):
        maps, counts, coords, status = result
        js.status.check(status)
        levels = [inputs.real(ring[0]), *(np.asarray(c)[: int(n)] for c, n in zip(coords, counts, strict=True))]
        strided = [(f, c, *conv) for f, c, conv in zip(levels[:-1], levels[1:], convs, strict=True)]
        cases = strided + [(s, s, 3, 1) for s in levels[: len(maps) - len(convs)]]
        return all(is_right(np.asarray(m[0]), *case) for m, case in zip(maps, cases, strict=True))

    return row(what, name, int(ring[0].count), build, ring, check, args)


def scans_part(args):
    """Rows of the first part, with spconv beside each."""
    rows = [voxel_rows(name, args) for name in ("semkitti_00_000000", "nusc_10sweep")]
    sites = sites_ring(args.data, "semkitti_00_000000")
    first = inputs.real(sites[0])
    check = lambda m: is_right(np.asarray(m[0]), first, first, 3)  # noqa: E731
    rows.append(row("3^3 submanifold map", "semkitti_00_000000", len(first), layer_map(3), sites, check, args))
    rows.append(network_row("semkitti_00_000000", "9 maps of SparseResUNet42", SEG, True, args))
    rows.append(network_row("nusc_10sweep", "8 maps of SparseResNet21D", DET, False, args))
    return rows + spconv_rows(args)


def builders_part(args):
    """Every scan, kernel and builder."""
    rows = []
    for name in SCANS:
        if scans.missing(args.data, [name]):
            continue
        ring = sites_ring(args.data, name)
        first = inputs.real(ring[0])
        for kernel in KERNELS:
            check = lambda m, kernel=kernel: is_right(np.asarray(m[0]), first, first, kernel)  # noqa: B023, E731
            for builder in Geometry.create(3, kernel).builders:
                what = f"kernel {kernel} by {builder}"
                rows.append(row(what, name, len(first), layer_map(kernel, builder=builder), ring, check, args))
    return rows


def tiled(coords, count):
    """So many sites: the scan's first ones, or copies of it side by side."""
    wide = coords[:, 1].max() - coords[:, 1].min() + 8
    copies = -(-count // len(coords))
    tiles = np.concatenate([coords + np.int32([0, wide * (i - copies // 2), 0, 0]) for i in range(copies)])
    return tiles[:count]


def growth_part(args):
    """Voxels, coarse sites and the 3^3 map from 10 thousand to 4 million sites."""
    base = inputs.real(sites_ring(args.data, "semkitti_00_000000")[0])
    rows = []
    for count, factor in ((10_000, 1), (100_000, 1), (100_000, 4), (1_000_000, 1), (4_000_000, 1)):
        coords, capacity = tiled(base, count), inputs.capacity_for(count, factor)
        points = np.pad(coords[:, 1:] + np.float32(0.5), [(0, capacity - count), (0, 0)])
        ring = [(jnp.asarray(points), jnp.asarray(points[:, :1]), jnp.int32(count))]
        voxelize = lambda p, capacity=capacity: js.voxelize(p[0], p[1], 1.0, capacity=capacity, count=p[2])  # noqa: E731
        sites = [jax.jit(voxelize)(ring[0])[0].check().sites]
        first = inputs.real(sites[0])
        scan = f"tiled, capacity {capacity:,}"
        same = lambda r, first=first: np.array_equal(inputs.real(r[0].sites), first)  # noqa: E731
        rows.append(row("voxels", scan, count, voxelize, ring, same, args))
        check = lambda m, first=first: is_right(np.asarray(m[0]), first, first, 3)  # noqa: E731
        rows.append(row("3^3 submanifold map", scan, count, layer_map(3), sites, check, args))
        for kernel in (2, 3):
            coarse = lambda s, kernel=kernel: s.coarse(Geometry.create(3, kernel, 2), "reachable")  # noqa: E731
            right = lambda c, kernel=kernel, first=first: reaches(inputs.real(c), first, kernel)  # noqa: E731
            rows.append(row(f"coarse sites, kernel {kernel}, stride 2", scan, count, coarse, sites, right, args))
    return rows


def reaches(coarse, fine, kernel):
    """Whether the coarse sites are those that a kernel with stride 2 reaches."""
    geometry = Geometry.create(3, kernel, 2)
    found = []
    for tap in geometry.taps:
        scaled = fine[:, 1:] + np.array(geometry.padding) - np.array(tap)
        whole = (scaled % 2 == 0).all(1)
        found.append(np.unique(keys(np.column_stack([fine[whole, 0], scaled[whole] // 2]))))
    return np.array_equal(np.unique(np.concatenate(found)), np.sort(keys(coarse)))


def spconv_rows(args):
    """spconv's maps and voxels on the same scans, or nothing where it cannot run."""
    if jax.default_backend() != "gpu":
        return []
    try:
        import spconv.pytorch as spconv
        import torch
        from spconv.pytorch import ops
        from spconv.pytorch.utils import PointToVoxel
    except ImportError:
        return []

    def box_and_coords(sites):
        coords = inputs.real(sites).copy()
        coords[:, 1:] -= coords[:, 1:].min(0) - 1
        box = [int(-(-(m + 2) // 16) * 16) for m in coords[:, 1:].max(0)]
        return torch.tensor(coords, device="cuda"), box

    def pairs(coords, box, kernel, strides, subm):
        size = list(Geometry.create(3, kernel, strides).kernel)
        strides = list(Geometry.create(3, kernel, strides).stride)
        padding = [(k - 1) // 2 for k in size]
        algo = spconv.ConvAlgo.MaskImplicitGemm
        out = ops.get_indice_pairs_implicit_gemm(
            coords, 1, box, algo, size, strides, padding, [1] * 3, [0] * 3, subm=subm, is_train=not subm
        )
        return out[0], ops.get_conv_output_size(box, size, strides, padding, [1] * 3) if not subm else box

    def network(convs, last_is_submanifold):
        def build(batch):
            coords, box = batch
            for conv in convs:
                pairs(coords, box, 3, 1, True)
                coords, box = pairs(coords, box, *conv, False)
            if last_is_submanifold:
                pairs(coords, box, 3, 1, True)

        return build

    def timed(what, scan, sites, step, ring):
        wall = measure.summary(measure.wall_ms(step, ring, lambda _: torch.cuda.synchronize(), args.steps))
        gpu = measure.torch_gpu_ms(step, ring, min(args.steps, 16))
        out = {"what": what, "scan": scan, "sites": sites, "library": "spconv", "right": None, "gpu_us": 1e3 * gpu}
        return {**out, "wall_us": 1e3 * wall["median"], "wall_quartiles_us": [1e3 * q for q in wall["quartiles"]]}

    rows = []
    for name in ("semkitti_00_000000", "nusc_10sweep"):
        ring = [torch.tensor(np.asarray(feats), device="cuda") for _, feats in points_ring(args.data, name)]
        size = np.broadcast_to(np.asarray(SCANS[name], float), 3).tolist()
        low = np.floor(min(float(p[:, :3].min()) for p in ring)) - 1
        high = np.ceil(max(float(p[:, :3].max()) for p in ring)) + 1
        to_voxel = PointToVoxel(size, [low] * 3 + [high] * 3, 4, len(ring[0]), 8, device=torch.device("cuda"))

        def voxelize(p, to_voxel=to_voxel):
            voxels, _, number = to_voxel(p)
            return voxels.sum(1) / number[:, None]

        sites = len(voxelize(ring[0]))
        rows.append(timed(f"voxels with features, {len(ring[0]):,} points", name, sites, voxelize, ring))
    semkitti = [box_and_coords(s) for s in sites_ring(args.data, "semkitti_00_000000")]
    nusc = [box_and_coords(s) for s in sites_ring(args.data, "nusc_10sweep")]
    n, m = len(semkitti[0][0]), len(nusc[0][0])
    subm = lambda batch: pairs(*batch, 3, 1, True)  # noqa: E731
    rows.append(timed("3^3 submanifold map", "semkitti_00_000000", n, subm, semkitti))
    rows.append(timed("9 maps of SparseResUNet42", "semkitti_00_000000", n, network(SEG, True), semkitti))
    rows.append(timed("8 maps of SparseResNet21D", "nusc_10sweep", m, network(DET, False), nusc))
    return rows


COLUMNS = {
    "what": lambda r: r["what"],
    "scan": lambda r: r["scan"],
    "sites": lambda r: f"{r['sites']:,}",
    "library": lambda r: r["library"],
    "GPU us": lambda r: "wrong" if r["right"] is False else r["gpu_us"],
    "wall us, median": lambda r: r.get("wall_us"),
    "memory MB": lambda r: r.get("memory_mb"),
}
PARTS = {"builders": builders_part, "growth": growth_part, "scans": scans_part}  # torch's profiler comes last


def main():
    """Runs the parts and writes a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the scans")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    measure.add_device(parser)
    parser.add_argument("--steps", type=int, default=40, help="timed steps; published figures take at least 30")
    parser.add_argument("--out", default=None, help="folder for the results; without it they are only printed")
    args = parser.parse_args()
    measure.choose_device(args.device)
    if reason := scans.missing(args.data, ["semkitti_00_000000", "nusc_10sweep"]):
        print(f"skipped: {reason}")
        return
    for part in (part for part in PARTS if part in args.part):
        rows = PARTS[part](args)
        report.write(args.out, f"coordinates_{part}", f"Coordinates: {part}", COLUMNS, rows, ["spconv-cu126", "torch"])


if __name__ == "__main__":
    main()
