"""Writes the golden files of this folder: what spconv 2.3.8 computes, in this library's conventions.

    pip install torch spconv==2.3.8     # the CPU builds are enough
    python tests/golden/make_spconv_golden.py

Each case is one `.npz` that `tests/test_golden.py` reads without knowing spconv:

    spec        JSON: op ("subm" | "conv" | "transpose"), kernel_size, strides, padding, dilation (one entry an axis),
                batch_size, bounds (sizes of the input grid, or null), out_bounds (sizes of the output grid, or null)
    coords      int32 [N, 1 + D], batch first, then the axes in spconv's order (z, y, x)
    feats       float32 [N, C_in]
    kernel      float32 [K, C_in, C_out], taps row-major over the axes, the last axis fastest
    out_coords  int32 [M, 1 + D], sorted; for "transpose" these are given to the layer (its `like`)
    out_feats   float32 [M, C_out], spconv's result

spconv needs coordinates in a box that starts at 0. The index relation

    fine = stride * coarse - padding + dilation * tap

does not change when the fine grid moves by `stride * s` and the coarse grid by `s`: cases without bounds are computed
far from the walls of the box and stored moved, with coordinates of both signs. Before a case is written it is checked
against a brute-force loop over that relation, in float64.
"""

import json
import os
import pathlib
from dataclasses import dataclass

# spconv's CPU code scatters without atomics: with two threads rows lose a tap now and then. Set before it is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import spconv.pytorch as spconv
import torch

FOLDER = pathlib.Path(__file__).parent
MARGIN = 24  # sites between the scene and the walls of spconv's box, more than any kernel here reaches


@dataclass(frozen=True)
class Case:
    """One layer on one random scene. Geometry has an entry an axis; `clipped` keeps the walls of the box as bounds."""

    name: str
    op: str
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    channels: tuple[int, int] = (5, 6)
    box: tuple[int, ...] = (7, 9, 8)
    density: float = 0.15
    batch_size: int = 1
    clipped: bool = False


def submanifold(name, kernel, dilation=None, **more):
    """A submanifold case: stride 1, centred window."""
    dilation = dilation or (1,) * len(kernel)
    padding = tuple(d * (k // 2) for k, d in zip(kernel, dilation, strict=True))
    return Case(name, "subm", kernel, (1,) * len(kernel), padding, dilation, **more)


def strided(name, kernel, strides, padding, dilation=None, op="conv", **more):
    """A strided case, or with op="transpose" its inverse."""
    return Case(name, op, kernel, strides, padding, dilation or (1,) * len(kernel), **more)


CASES = [
    submanifold("subm3d_k3", (3, 3, 3)),
    submanifold("subm3d_k3_batch2", (3, 3, 3), batch_size=2, channels=(4, 16)),
    submanifold("subm3d_k1", (1, 1, 1)),
    submanifold("subm3d_k131", (1, 3, 1)),
    submanifold("subm3d_k331", (3, 3, 1)),
    submanifold("subm3d_k135", (1, 3, 5)),
    submanifold("subm3d_k5", (5, 5, 5), channels=(4, 5)),
    submanifold("subm3d_k3_dilation2", (3, 3, 3), (2, 2, 2)),
    submanifold("subm3d_k3_dilation123", (3, 3, 3), (1, 2, 3)),
    submanifold("subm2d_k3", (3, 3), box=(14, 17), density=0.3),
    submanifold("subm2d_k5_batch2", (5, 5), box=(11, 13), density=0.25, batch_size=2),
    submanifold("subm1d_k3", (3,), box=(60,), density=0.5),
    submanifold("subm4d_k3", (3, 3, 3, 3), box=(4, 5, 4, 5), density=0.2, channels=(3, 4)),
    strided("conv3d_k3_s2_p1", (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    strided("conv3d_k3_s2_p1_batch2", (3, 3, 3), (2, 2, 2), (1, 1, 1), batch_size=2),
    strided("conv3d_k3_s2_p0", (3, 3, 3), (2, 2, 2), (0, 0, 0)),
    strided("conv3d_k2_s2_p0", (2, 2, 2), (2, 2, 2), (0, 0, 0), channels=(6, 3)),
    strided("conv3d_k3_s212_p1", (3, 3, 3), (2, 1, 2), (1, 1, 1)),
    strided("conv3d_k3_s212_p101", (3, 3, 3), (2, 1, 2), (1, 0, 1)),
    strided("conv3d_k311_s211_p0", (3, 1, 1), (2, 1, 1), (0, 0, 0)),
    strided("conv3d_k3_s1_p1", (3, 3, 3), (1, 1, 1), (1, 1, 1), density=0.05),
    strided("conv3d_k3_s1_dilation2", (3, 3, 3), (1, 1, 1), (2, 2, 2), (2, 2, 2), density=0.05),
    strided("conv3d_k2_s3_p0", (2, 2, 2), (3, 3, 3), (0, 0, 0)),
    strided("conv2d_k3_s2_p1", (3, 3), (2, 2), (1, 1), box=(14, 17), density=0.3),
    strided("conv2d_k2_s2_p0_batch2", (2, 2), (2, 2), (0, 0), box=(11, 13), density=0.25, batch_size=2),
    strided("conv3d_k3_s2_p1_clipped", (3, 3, 3), (2, 2, 2), (1, 1, 1), clipped=True),
    strided("conv3d_k2_s2_p0_clipped", (2, 2, 2), (2, 2, 2), (0, 0, 0), clipped=True),
    strided("conv3d_k311_s211_p0_clipped", (3, 1, 1), (2, 1, 1), (0, 0, 0), clipped=True),
    strided("conv3d_k3_s1_p1_clipped", (3, 3, 3), (1, 1, 1), (1, 1, 1), clipped=True, density=0.05),
    strided("conv2d_k3_s2_p1_clipped", (3, 3), (2, 2), (1, 1), box=(14, 17), density=0.3, clipped=True),
    strided("inverse3d_k2_s2_p0", (2, 2, 2), (2, 2, 2), (0, 0, 0), op="transpose"),
    strided("inverse3d_k3_s2_p1", (3, 3, 3), (2, 2, 2), (1, 1, 1), op="transpose"),
    strided("inverse3d_k3_s2_p1_batch2", (3, 3, 3), (2, 2, 2), (1, 1, 1), op="transpose", batch_size=2),
    strided("inverse3d_k3_s212_p1", (3, 3, 3), (2, 1, 2), (1, 1, 1), op="transpose"),
    strided("inverse2d_k2_s2_p0", (2, 2), (2, 2), (0, 0), box=(14, 17), density=0.3, op="transpose"),
    strided("inverse2d_k3_s2_p1", (3, 3), (2, 2), (1, 1), box=(14, 17), density=0.3, op="transpose"),
]


def random_sites(case, rng):
    """Distinct sites of a random scene in spconv's box, int32 [N, 1 + D] in random order, and the sizes of that box."""
    occupied = rng.random((case.batch_size, *case.box)) < case.density
    sites = rng.permutation(np.argwhere(occupied)).astype(np.int32)
    if case.clipped:
        return sites, case.box
    sites[:, 1:] += MARGIN
    return sites, tuple(b + 2 * MARGIN for b in case.box)


def spconv_layer(case, kind, *args, **kwargs):
    return getattr(spconv, f"{kind}{len(case.kernel)}d")(*args, bias=False, **kwargs)


def run_spconv(case, sites, box, rng):
    """Runs one layer: input coords, input feats, weight (spconv's layout), output coords, output feats, output box."""
    c_in, c_out = case.channels
    geometry = {"stride": case.strides, "padding": case.padding, "dilation": case.dilation}
    fine = spconv.SparseConvTensor(
        torch.from_numpy(rng.standard_normal((len(sites), c_in), dtype=np.float32)),
        torch.from_numpy(sites),
        list(box),
        case.batch_size,
    )
    if case.op == "subm":
        x, layer = fine, spconv_layer(case, "SubMConv", c_in, c_out, case.kernel, **geometry)
    elif case.op == "conv":
        x, layer = fine, spconv_layer(case, "SparseConv", c_in, c_out, case.kernel, **geometry)
    else:
        # The strided layer makes the coarse sites and the pairs; fresh features then go up through the inverse layer.
        down = spconv_layer(case, "SparseConv", c_in, c_in, case.kernel, indice_key="pairs", **geometry)
        coarse = down(fine)
        x = coarse.replace_feature(torch.from_numpy(rng.standard_normal((len(coarse.indices), c_in), dtype=np.float32)))
        layer = spconv_layer(case, "SparseInverseConv", c_in, c_out, case.kernel, indice_key="pairs")
    weight = rng.standard_normal(tuple(layer.weight.shape), dtype=np.float32)
    layer.weight.copy_(torch.from_numpy(weight))
    y = layer(x)
    return x.indices.numpy(), x.features.numpy(), weight, y.indices.numpy(), y.features.numpy(), tuple(y.spatial_shape)


def brute_force(case, coords, feats, kernel, out_coords):
    """The convolution at the given output sites, float64, straight from the index relation.

    "subm" and "conv":  out[coarse] = sum over taps of feats[fine] @ kernel[tap];
    "transpose":        out[fine]   = sum over taps of feats[coarse] @ kernel[tap], the same taps, not flipped.
    """
    row_of = {tuple(site): row for row, site in enumerate(coords.tolist())}
    out = np.zeros((len(out_coords), kernel.shape[2]))
    for m, (batch, *site) in enumerate(out_coords.tolist()):
        for flat, tap in enumerate(np.ndindex(case.kernel)):
            axes = zip(site, case.strides, case.padding, case.dilation, tap, strict=True)
            if case.op == "transpose":
                scaled = [(f + p - d * t, s) for f, s, p, d, t in axes]
                if any(f % s for f, s in scaled):
                    continue
                other = (batch, *(f // s for f, s in scaled))
            else:
                other = (batch, *(s * c - p + d * t for c, s, p, d, t in axes))
            if other in row_of:
                out[m] += feats[row_of[other]].astype(np.float64) @ kernel[flat].astype(np.float64)
    return out


def reachable(case, coords, out_box):
    """Sites of the coarse grid whose window holds an input site, sorted; inside `out_box` where the case is clipped."""
    found = set()
    for batch, *fine in coords.tolist():
        for tap in np.ndindex(case.kernel):
            scaled = [
                (f + p - d * t, s)
                for f, p, d, t, s in zip(fine, case.padding, case.dilation, tap, case.strides, strict=True)
            ]
            if any(f % s for f, s in scaled):
                continue
            coarse = tuple(f // s for f, s in scaled)
            if not case.clipped or all(0 <= c < size for c, size in zip(coarse, out_box, strict=True)):
                found.add((batch, *coarse))
    return np.array(sorted(found), np.int32)


def make(case, rng):
    """Computes one case, checks it against the index relation and returns the arrays of its file."""
    sites, box = random_sites(case, rng)
    coords, feats, weight, out_coords, out_feats, out_box = run_spconv(case, sites, box, rng)
    order = np.lexsort(out_coords.T[::-1])
    out_coords, out_feats = out_coords[order], out_feats[order]
    # [C_out, *taps, C_in] -> [K, C_in, C_out]; spconv reads the memory of 1x1 kernels as [C_in, C_out] all the same.
    kernel = np.moveaxis(weight, 0, -1).reshape(-1, *case.channels)
    if len(kernel) == 1:
        kernel = weight.reshape(1, *case.channels)

    if not case.clipped:
        # A different move on each axis, so that swapped axes show; large enough to bring some coordinates below zero.
        coarse_move = np.array([(MARGIN + 3 + 2 * a) // s for a, s in enumerate(case.strides)], np.int32)
        fine_move = coarse_move * np.array(case.strides, np.int32)
        from_fine = case.op != "transpose"
        coords = coords - np.r_[0, fine_move if from_fine else coarse_move].astype(np.int32)
        out_coords = out_coords - np.r_[0, coarse_move if from_fine else fine_move].astype(np.int32)

    expected_sites = {
        "subm": lambda: np.array(sorted(coords.tolist()), np.int32),
        "conv": lambda: reachable(case, coords, out_box),
        "transpose": lambda: out_coords,  # given
    }[case.op]()
    assert np.array_equal(out_coords, expected_sites), f"{case.name}: spconv has other sites"
    oracle = brute_force(case, coords, feats, kernel, out_coords)
    error = np.abs(out_feats - oracle).max() / np.abs(oracle).max()
    assert error < 1e-6, f"{case.name}: spconv differs from the index relation by {error:.1e} of the largest output"

    spec = {
        "op": case.op,
        "kernel_size": case.kernel,
        "strides": case.strides,
        "padding": case.padding,
        "dilation": case.dilation,
        "batch_size": case.batch_size,
        "bounds": box if case.clipped else None,
        "out_bounds": out_box if case.clipped else None,
    }
    print(f"{case.name:30s} {len(coords):4d} -> {len(out_coords):4d} sites, spconv against float64 {error:.1e}")
    return {
        "spec": json.dumps(spec),
        "coords": coords,
        "feats": feats,
        "kernel": kernel,
        "out_coords": out_coords,
        "out_feats": out_feats,
    }


@torch.no_grad()
def main():
    total = 0
    for seed, case in enumerate(CASES):
        path = FOLDER / f"{case.name}.npz"
        np.savez_compressed(path, **make(case, np.random.default_rng(seed)))
        total += path.stat().st_size
    print(f"{len(CASES)} files, {total / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
