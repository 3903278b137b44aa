"""Real LiDAR scans: published sizes, and products against float64. Skips where the scans are absent."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import random_kernel, row_error

import jaxsparse as js
from jaxsparse.geometry import Geometry


@pytest.mark.parametrize(
    ("name", "size", "voxels", "neighbours"),
    [
        ("semkitti_00_000000", 0.05, 91_800, 3.8),
        ("nusc_key00", 0.1, 19_100, 2.8),
        ("pcl_room_scan1", 0.05, 27_900, 6.3),
    ],
)
def test_sites_and_neighbours_are_those_published(real_scan, name, size, voxels, neighbours):
    xyz = real_scan(name)["xyz"]
    x, index = js.voxelize(xyz, xyz, size, capacity=131_072)
    x.check()
    assert int(x.count) == pytest.approx(voxels, rel=0.003)
    assert (index >= 0).all()
    pairs = (js.kernel_map(x.sites, x.sites, 3).table[:, : int(x.count)] >= 0).sum()
    assert float(pairs) / int(x.count) == pytest.approx(neighbours, rel=0.03)


def test_every_pair_of_a_map_obeys_the_index_relation(real_scan):
    xyz = real_scan("semkitti_00_000000")["xyz"]
    x, _ = js.voxelize(xyz, xyz, 0.05, capacity=98_304)
    for geometry, mode in ((Geometry.create(3, 3), None), (Geometry.create(3, 2, 2), "reachable")):
        out = x.sites if mode is None else x.sites.coarse(geometry, mode)
        table = np.asarray(js.kernel_map(x.sites, out, geometry.kernel, geometry.stride).table)[:, : int(out.count)]
        fine, coarse = np.asarray(x.coords), np.asarray(out.coords)
        present = set(map(tuple, fine[: int(x.count)].tolist()))
        for k, tap in enumerate(geometry.taps):
            m = np.flatnonzero(table[k] >= 0)
            shift = np.array(tap) - geometry.padding
            np.testing.assert_array_equal(fine[table[k, m], 1:], coarse[m, 1:] * geometry.stride + shift)
            absent = np.flatnonzero(table[k, : int(out.count)] < 0)[:2000]
            sites = np.concatenate([coarse[absent, :1], coarse[absent, 1:] * geometry.stride + shift], 1)
            assert not present & set(map(tuple, sites.tolist()))


def test_products_on_a_scan_agree_with_float64(real_scan):
    xyz = real_scan("nusc_key00")["xyz"]
    x, _ = js.voxelize(xyz, np.tile(xyz, (1, 8))[:, :16], 0.1, capacity=20_480)
    kernel = random_kernel(0, Geometry.create(3, 3), 16, 16)

    def products(x, kernel, implementation):
        def f(feats, kernel):
            options = {"kernel_size": 3, "precision": "highest", "implementation": implementation}
            return js.ops.conv(x.with_feats(feats), kernel, **options).feats

        y, vjp = jax.vjp(f, x.feats, kernel)
        return y, *vjp(y)

    ours = products(x, kernel, "auto")
    with jax.enable_x64(True):
        exact = products(x.astype(jnp.float64), kernel.astype(jnp.float64), "xla")
    for a, b in zip(ours, exact, strict=True):
        assert row_error(a, b) < 1e-6
