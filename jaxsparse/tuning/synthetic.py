"""Scenes for tuning where none are given: what a spinning LiDAR would see of streets with walls."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.geometry import Geometry
from jaxsparse.kernel_map import map_between
from jaxsparse.sites import Sites
from jaxsparse.tuning.choice import Question
from jaxsparse.tuning.record import Layer, Recorded


def scan(seed: int, beams: int = 64, azimuths: int = 2000) -> np.ndarray:
    """Points in metres, float32 `[beams * azimuths, 3]`: ground 1.7 m below the sensor, walls at random ranges."""
    rng = np.random.default_rng(seed)
    azimuth = np.linspace(-np.pi, np.pi, azimuths, endpoint=False)
    elevation = np.linspace(math.radians(-24), math.radians(3), beams)[:, None]
    wall = np.repeat(rng.uniform(5, 50, azimuths // 25 + 1), 25)[:azimuths]  # each over 25 azimuths
    ground = np.where(elevation < 0, 1.7 / np.maximum(np.tan(-elevation), 1e-3), np.inf)
    flat = np.minimum(np.minimum(wall, ground), 80) + rng.normal(0, 0.01, (beams, azimuths))
    return (
        np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), flat * np.tan(elevation)], -1)
        .astype(np.float32)
        .reshape(-1, 3)
    )


def sites(rows: int, dims: int = 3, cell: int = 1, voxel: float = 0.05) -> np.ndarray:
    """About nine tenths of `rows` distinct sites of scans, int32 `[N, 1 + dims]`, on a grid of `cell` voxels."""
    wanted, found, number = max(int(0.9 * rows), 1), np.zeros((0, 1 + dims), np.int32), 0
    while len(found) < wanted:
        points = scan(number)
        if dims > 3:
            points = np.concatenate([points, np.zeros((len(points), dims - 3), np.float32)], 1)
        index = np.unique(np.floor(points[:, :dims] / (voxel * cell)).astype(np.int32), axis=0)
        near = np.argsort(np.abs(index).max(1), kind="stable")[: wanted - len(found)]  # scans are densest there
        found = np.concatenate([found, np.insert(index[near], 0, number, axis=1)])
        number += 1
    return found.astype(np.int32)


def layer_and_map(question: Question) -> tuple[Layer, tuple[jax.Array, ...], float]:
    """A layer with the problem of a question, a kernel map for it, and its neighbours a row.

    The kernel is a cube where the number of taps is one, else a line: keys do not say more.
    """
    p = question.problem
    spec, dims = p.spec, len(p.spec.grid) or 3
    edge = round(p.taps ** (1 / dims))
    kernel = (edge,) * dims if edge**dims == p.taps else (p.taps, *[1] * (dims - 1))
    strides = spec.strides or (1,) * dims
    in_rows, out_rows = (p.rows, p.x_rows) if p.of_reverse else (p.x_rows, p.rows)
    coords = sites(in_rows, dims, max(spec.grid, default=1))
    fine = Sites.create(jnp.asarray(np.pad(coords, [(0, in_rows - len(coords)), (0, 0)])), len(coords))
    coarse = fine
    if set(strides) != {1}:
        coarse = fine.coarse(Geometry.create(dims, kernel, strides), "reachable", out_rows)
    built = map_between(fine, coarse, Geometry.create(dims, kernel, strides))
    op = "wgrad" if question.key.op == "wgrad" else "dgrad" if p.of_reverse else "forward"
    first = jax.ShapeDtypeStruct((p.x_rows, p.c_in), spec.dtype)
    second = {
        "forward": (p.taps, p.c_in, p.c_out),
        "dgrad": (p.taps, p.c_out, p.c_in),
        "wgrad": (p.rows, p.c_out),
    }[op]
    table = jax.ShapeDtypeStruct(built.table.shape, built.table.dtype)
    layer = Layer(op, spec, spec.dtype, "auto", first, jax.ShapeDtypeStruct(second, spec.dtype), table)
    kernel_map = (built.table, built.masks, built.in_counts, built.out_counts)
    recorded = Recorded([], [], [[((), kernel_map)]], 0)
    return layer, kernel_map, recorded.neighbours(0, p.of_reverse)
