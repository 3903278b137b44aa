"""`python -m jaxsparse.inspect`: each statistic against a loop, the command line, its errors."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js
from jaxsparse.geometry import Geometry
from jaxsparse.inspect import scan as scan_module
from jaxsparse.inspect.__main__ import main
from jaxsparse.inspect.scan import pyramid, read_points
from jaxsparse.inspect.statistics import FILL_TILES, READ_TILES, distinct_rows, fill_cost, mask_order, measure

KERNELS = [(3, 3, 3), (5, 3, 5)]  # one word of tap mask, and three


def random_points(seed=0, points=700):
    """Points in a box of 12 x 12 x 4 metres around the origin, none on the edge of a cell of 1 m."""
    cells = np.random.default_rng(seed).integers([-6, -6, -2], [6, 6, 2], (points, 3))
    return (cells + 0.5).astype(np.float32)


def loop_taps(sites, kernel):
    """For each site the list of (tap, row) of its neighbours, by a dictionary."""
    rows, taps = {tuple(site): row for row, site in enumerate(sites.tolist())}, Geometry.create(3, kernel).taps
    shifts = [tuple(t - (k - 1) // 2 for t, k in zip(tap, kernel, strict=True)) for tap in taps]
    moved = [[tuple(a + b for a, b in zip(site, shift, strict=True)) for shift in shifts] for site in sites.tolist()]
    return [[(k, rows[site]) for k, site in enumerate(of_row) if site in rows] for of_row in moved]


def arrays_of(taps, volume):
    """The loop's taps as a table and masks."""
    table, masks = np.full((volume, len(taps)), -1, np.int32), np.zeros((len(taps), -(-volume // 32)), np.uint32)
    for m, of_row in enumerate(taps):
        for k, row in of_row:
            table[k, m] = row
            masks[m, k // 32] |= np.uint32(1 << k % 32)
    return table, masks


@pytest.fixture(scope="module", params=KERNELS, ids=str)
def scene(request):
    """Distinct sites in random order: taps of each by a loop, table, masks, kernel."""
    sites = np.unique(random_points(1).astype(np.int32), axis=0)
    np.random.default_rng(2).shuffle(sites)
    taps = loop_taps(sites, request.param)
    return taps, *arrays_of(taps, int(np.prod(request.param))), request.param


def tiles_of(order, size):
    return [order[i : i + size].tolist() for i in range(0, len(order), size)]


def test_pairs_tap_shares_and_bytes_are_those_of_a_loop(scene):
    taps, table, masks, kernel = scene
    found = measure(table, masks, kernel)
    assert found.sites == len(taps)
    assert found.pairs == sum(map(len, taps))
    assert found.neighbours == pytest.approx(sum(map(len, taps)) / len(taps))
    for k, tap in enumerate(Geometry.create(3, kernel).taps):
        assert found.tap_share[tap] == pytest.approx(sum(k in dict(of_row) for of_row in taps) / len(taps))
    assert found.table_bytes == 4 * len(taps) * np.prod(kernel)
    assert found.mask_bytes == 4 * len(taps) * (1 if kernel == (3, 3, 3) else 3)


@pytest.mark.parametrize("tile", [1, 7, 64, 10_000])
def test_fill_cost_is_that_of_a_loop(scene, tile):
    taps, _, masks, _ = scene
    order = np.random.default_rng(3).permutation(len(taps))
    executed = sum(len(rows) * len({k for m in rows for k, _ in taps[m]}) for rows in tiles_of(order, tile))
    assert fill_cost(masks, order, tile) == pytest.approx(executed / sum(map(len, taps)))
    assert tile > 1 or executed == sum(map(len, taps))


@pytest.mark.parametrize("tile", [1, 7, 64, 10_000])
def test_distinct_rows_are_those_of_a_loop(scene, tile):
    taps, table, _, _ = scene
    order = np.random.default_rng(3).permutation(len(taps))
    tiles = tiles_of(order, tile)
    whole = [rows for rows in tiles if len(rows) == tile] or tiles
    expected = np.mean([len({row for m in rows for _, row in taps[m]}) for rows in whole])
    assert distinct_rows(table, order, tile) == pytest.approx(expected)


@pytest.mark.parametrize("window", [1, 50, 10_000])
def test_mask_order_sorts_each_window_and_keeps_ties(scene, window):
    taps, _, masks, _ = scene
    integers = [sum(1 << k for k, _ in of_row) for of_row in taps]
    windows = tiles_of(np.arange(len(taps)), window)
    expected = [m for rows in windows for m in sorted(rows, key=lambda m: -integers[m])]
    assert mask_order(masks, window).tolist() == expected


def test_measure_takes_the_orders_and_tiles_that_it_names(scene):
    taps, table, masks, kernel = scene
    found = measure(table, masks, kernel, {"reversed": np.arange(len(taps))[::-1]})
    orders = {
        "reversed": np.arange(len(taps))[::-1],
        "Morton order": np.arange(len(taps)),
        "sorted in windows of 256": mask_order(masks, 256),
        "sorted in windows of 4,096": mask_order(masks, 4096),
        "sorted over everything": mask_order(masks, len(taps)),
    }
    assert list(found.fill_cost) == list(found.distinct_rows) == list(orders)
    for name, order in orders.items():
        assert found.fill_cost[name] == {t: fill_cost(masks, order, t) for t in FILL_TILES}
        assert found.distinct_rows[name] == {t: distinct_rows(table, order, t) for t in READ_TILES}


def test_pyramid_counts_the_halved_grids_and_nothing_past_count(monkeypatch):
    def map_with_noise(in_sites, out_sites, kernel):
        m, is_real = js.kernel_map(in_sites, out_sites, kernel), out_sites.is_real
        assert not is_real.all()
        table, masks = jnp.where(is_real[None], m.table, 5), jnp.where(is_real[:, None], m.masks, jnp.uint32(2**27 - 1))
        return dataclasses.replace(m, table=table, masks=masks)

    monkeypatch.setattr(scan_module, "kernel_map", map_with_noise)
    points = random_points(4)  # more points than voxels: the arrays have padding rows
    cells = np.floor(points).astype(np.int32)
    levels = list(pyramid(points, (1.0, 1.0, 1.0), (3, 3, 3), 3))
    assert [level.stride for level in levels] == [1, 2, 4]
    assert [level.voxel_size for level in levels] == [(1.0,) * 3, (2.0,) * 3, (4.0,) * 3]
    for level in levels:
        sites = np.unique(cells // level.stride, axis=0)
        morton, _ = js.voxelize(sites + np.float32(0.5), np.ones((len(sites), 1), np.float32), 1.0, capacity=len(sites))
        taps = loop_taps(np.asarray(morton.coords)[:, 1:], (3, 3, 3))
        table, masks = arrays_of(taps, 27)
        expected = measure(table, masks, (3, 3, 3))
        assert level.statistics.sites == len(sites)
        assert level.statistics.pairs == expected.pairs
        np.testing.assert_array_equal(level.statistics.tap_share, expected.tap_share)
        for name in expected.fill_cost:
            assert level.statistics.fill_cost[name] == expected.fill_cost[name]
            assert level.statistics.distinct_rows[name] == expected.distinct_rows[name]


def test_scan_order_is_that_of_the_first_points():
    points = random_points(5)
    level = next(pyramid(points, (1.0, 1.0, 1.0), (3, 3, 3), 1))
    sites = np.array(list(dict.fromkeys(map(tuple, np.floor(points).astype(int).tolist()))))
    table, masks = arrays_of(loop_taps(sites, (3, 3, 3)), 27)
    in_order = np.arange(len(sites))
    assert level.statistics.fill_cost["scan order"] == {t: fill_cost(masks, in_order, t) for t in FILL_TILES}
    assert level.statistics.distinct_rows["scan order"] == {t: distinct_rows(table, in_order, t) for t in READ_TILES}


def test_a_scan_has_the_published_statistics(real_scan):
    levels = list(pyramid(real_scan("semkitti_00_000000")["xyz"], (0.05,) * 3, (3, 3, 3), 5))
    sites = [level.statistics.sites for level in levels]
    assert sites == pytest.approx([91_800, 60_100, 31_800, 14_500, 5_900], rel=0.005)
    published = {  # Morton codes from another origin: a few per cent in what depends on the order
        (0, "scan order"): ([3.11, 3.84, 4.61, 5.39], [88, 174, 346]),
        (0, "Morton order"): ([3.30, 4.00, 4.67, 5.25], [82, 153, 290]),
        (0, "sorted in windows of 256"): ([2.48, 3.15, 3.89, 4.69], None),
        (0, "sorted in windows of 4,096"): ([1.89, 2.30, 2.77, 3.31], None),
        (0, "sorted over everything"): ([1.51, 1.71, 1.91, 2.15], None),
        (2, "Morton order"): ([2.64, 2.99, 3.28, 3.49], [104, 182, 328]),
        (2, "sorted over everything"): ([1.67, 1.84, 2.01, 2.17], None),
    }
    for (level, order), (cost, rows) in published.items():
        found = levels[level].statistics
        assert list(found.fill_cost[order].values()) == pytest.approx(cost, rel=0.025), (level, order)
        if rows is not None:
            assert list(found.distinct_rows[order].values()) == pytest.approx(rows, rel=0.025), (level, order)


# --- files ---


def test_points_are_the_same_from_every_kind_of_file(tmp_path):
    points = random_points(6, 20)
    with_more = np.concatenate([points, np.ones((20, 1), np.float32)], 1)
    np.savez(tmp_path / "a.npz", cloud=with_more)
    np.save(tmp_path / "a.npy", points.astype(np.float64))
    with_more.tofile(tmp_path / "a.bin")
    for name, array in (("a.npz", "cloud"), ("a.npy", "xyz"), ("a.bin", "xyz")):
        found = read_points(tmp_path / name, array)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, points)


# --- command line ---


@pytest.fixture
def scan(tmp_path):
    """A small scan in a folder of its own, three points of it not finite."""
    points = random_points(7)
    points[[3, 5, 8], 1] = np.nan
    path = tmp_path / "scan.npz"
    np.savez(path, xyz=points, label=np.zeros(len(points), np.int32))
    return path


def test_command_prints_tables_and_writes_the_picture(scan):
    command = [sys.executable, "-m", "jaxsparse.inspect", scan.name, "--voxel", "1", "--levels", "2"]
    out = subprocess.run(command, cwd=scan.parent, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    first, last = out.stdout.strip().splitlines()[0], out.stdout.strip().splitlines()[-1]
    assert first.startswith("scan.npz: 697 points, voxel 1, kernel 3 x 3 x 3")
    assert "3 points that are not finite left out" in first
    assert last == "picture: inspect.png"
    for words in ("LEVELS", "ROW ORDERS", "TAPS", "scan order", "Morton order", "sorted over everything", "level 1"):
        assert words in out.stdout
    assert (scan.parent / "inspect.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options",
    [
        ["--voxel", "1", "1", "2", "--kernel", "5", "3", "5", "--levels", "1"],
        ["--voxel", "0.3", "--kernel", "1", "--levels", "4"],
        ["--voxel", "100", "--kernel", "2"],
    ],
    ids=" ".join,
)
def test_every_kernel_and_size_is_drawn(scan, options, capsys):
    picture = scan.parent / "levels.png"
    main([str(scan), *options, "--out", str(picture)])
    assert picture.stat().st_size > 10_000
    assert f"picture: {picture}" in capsys.readouterr().out


def test_without_matplotlib_the_tables_are_printed_and_the_extra_is_named(scan, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "jaxsparse.inspect.draw", raising=False)
    monkeypatch.delattr("jaxsparse.inspect.draw", raising=False)
    with pytest.raises(SystemExit, match=r"no picture: .*matplotlib.*jaxsparse\[examples\]"):
        main([str(scan), "--voxel", "1", "--levels", "1"])
    assert "ROW ORDERS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nowhere.npz", "--voxel", "1"], ["nowhere.npz", "no such file"]),
        (["words.txt", "--voxel", "1"], ["words.txt", ".npz"]),
        (["broken.npz", "--voxel", "1"], ["broken.npz", "not a sound .npz file"]),
        (["short.bin", "--voxel", "1"], ["short.bin", "KITTI"]),
        (["flat.npy", "--voxel", "1"], ["flat.npy", "float64[7]", "[P, 3]"]),
        (["empty.npy", "--voxel", "1"], ["empty.npy", "none of its 0 points"]),
        (["scan.npz", "--voxel", "1", "--array", "points"], ["'points'", "xyz, label", "--array"]),
        (["scan.npz", "--voxel", "1", "--array", "label"], ["int32[700]", "--array"]),
        (["scan.npz", "--voxel", "1e-6"], ["--voxel (=1e-06", "coarser voxel size"]),
        (["scan.npz", "--voxel", "0"], ["--voxel (=0 0 0)", "positive"]),
        (["scan.npz", "--voxel", "nan"], ["--voxel", "positive"]),
        (["scan.npz", "--voxel", "1", "2"], ["--voxel (=1 2)", "one an axis"]),
        (["--voxel", "1", "scan.npz"], ["--voxel", "'scan.npz' is not a number", "scan first"]),
        (["scan.npz"], ["--voxel"]),
        (["scan.npz", "--voxel", "1", "--kernel", "0"], ["--kernel", "at least 1"]),
        (["scan.npz", "--voxel", "1", "--kernel", "2.5"], ["--kernel", "'2.5' is not an integer"]),
        (["scan.npz", "--voxel", "1", "--levels", "0"], ["--levels (=0)", "1 to 12"]),
        (["scan.npz", "--voxel", "1", "--out", "no/where.png"], ["--out (=no/where.png)", "no folder no"]),
        (["scan.npz", "--voxel", "1", "--out", "levels.words"], ["--out (=levels.words)", ".png"]),
        (["scan.npz", "--voxel", "9", "--levels", "1", "--out", "folder.png"], ["--out (=folder.png)", "directory"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_name_argument_value_and_remedy(scan, monkeypatch, capsys, arguments, parts):
    monkeypatch.chdir(scan.parent)
    (scan.parent / "folder.png").mkdir()
    for name in ("words.txt", "broken.npz"):
        (scan.parent / name).write_text("words")
    np.zeros(7, np.float32).tofile("short.bin")
    np.save("flat.npy", np.zeros(7))
    np.save("empty.npy", np.zeros((0, 3)))
    with pytest.raises(SystemExit) as info:
        main(arguments)
    told = capsys.readouterr().err + str(info.value)
    for part in parts:
        assert part in told
