"""The CUDA kernels of sites and maps, run on the host, against brute force in numpy."""

import itertools

import numpy as np
import pytest
from kernel_oracles import (
    BITS,
    I32,
    ON_HOST,
    PADDING,
    U8,
    U32,
    attributes,
    call,
    fine,
    key,
    masks_of,
    random_table,
    real_rows,
    sites_array,
    taps,
)
from scenes import regular_scenes

from jaxsparse import _coords, _workspace
from jaxsparse.geometry import Geometry

pytestmark = ON_HOST


def random_coords(rng, rows, dims, spread):
    coords = rng.integers(-spread, spread, (rows, 1 + dims)).astype(I32)
    coords[:, 0] = rng.integers(0, 3, rows)
    return coords


def unique_results(points, capacity, dims):
    rows, size = ((points,), I32), _workspace.unique_sites(points)
    counts, ends, reasons = ((1,), I32), ((capacity + 1,), I32), ((_coords.REASONS,), I32)
    return [((capacity, 1 + dims), I32), counts, counts, rows, rows, ends, reasons, ((size,), U8)]


def coarse_results(rows, capacity, geometry):
    size, index = _workspace.coarse_sites(rows, geometry), _workspace.site_index(capacity)
    return [((capacity, 1 + len(geometry.kernel)), I32), *[((1,), I32)] * 3, ((index,), U8), ((size,), U8)]


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("points", "count", "capacity"),
    [(1, 1, 1), (300, 300, 40), (700, 650, 700), (5000, 4800, 6000), (20_000, 19_000, 12_000), (64, 0, 8)],
)
def test_unique_sites_are_the_distinct_valid_sites_in_key_order(dims, points, count, capacity):
    rng = np.random.default_rng(dims * points)
    coords = random_coords(rng, points, dims, {1: 900, 2: 40, 3: 9, 4: 5}[dims])
    coords[rng.random(points) < 0.05] = PADDING
    coords[rng.random(points) < 0.05, 0] = -rng.integers(1, 12)
    if dims > 1:
        coords[rng.random(points) < 0.02, 1] = 2 ** (BITS[dims] - 1)  # the first coordinate that does not fit
    keys = [key(c) if p < count else None for p, c in enumerate(coords)]
    sites = {k: tuple(c) for k, c in zip(keys, coords, strict=True) if k is not None}
    ordered = sorted(sites)
    row_of_key = {k: r if r < capacity else -1 for r, k in enumerate(ordered)}
    results = unique_results(points, capacity, dims)
    got, kept, found, row_of, order, offsets, without, _ = call("unique_sites", results, coords, np.array([count], I32))
    np.testing.assert_array_equal([kept, found], [[min(len(ordered), capacity)], [len(ordered)]])
    np.testing.assert_array_equal(without, [np.sum(coords[:count, 0] == -1 - why) for why in range(_coords.REASONS)])
    np.testing.assert_array_equal(got, sites_array([sites[k] for k in ordered], capacity, dims))
    np.testing.assert_array_equal(row_of, [-1 if k is None else row_of_key[k] for k in keys])
    grouped = np.argsort(np.where(row_of >= 0, row_of, capacity), kind="stable")
    np.testing.assert_array_equal(order, np.where(row_of[grouped] >= 0, grouped, -1))
    np.testing.assert_array_equal(offsets, np.searchsorted(np.sort(row_of[row_of >= 0]), np.arange(capacity + 1)))


@pytest.mark.parametrize("kind", ["one site", "one axis", "far ends", "one bit a digit", "batches"])
def test_unique_sites_sorts_whatever_the_keys_share(kind):
    rng = np.random.default_rng(1)
    coords = np.zeros((3000, 4), I32)
    half = 2**17
    if kind == "one axis":
        coords[:, 2] = rng.permutation(3000) - 1500
    elif kind == "far ends":
        coords[:, 1:] = rng.choice([-half, -1, 0, half - 1], (3000, 3))
    elif kind == "one bit a digit":
        coords[:, 1:] = rng.choice(2 ** np.arange(17), (3000, 3))
    elif kind == "batches":
        coords[:, 0] = rng.integers(0, 1023, 3000)
    keys = [key(c) for c in coords]
    ordered = sorted(set(keys))
    results = unique_results(3000, 3000, 3)
    got, _, found, row_of, *_ = call("unique_sites", results, coords, np.array([3000], I32))
    assert found[0] == len(ordered)
    assert [key(c) for c in got[: len(ordered)]] == ordered
    np.testing.assert_array_equal(row_of, np.searchsorted(np.array(ordered, np.uint64), np.array(keys, np.uint64)))


def test_unique_sites_of_many_points():
    """A block's digits of the next pass overflow 16 bits unless they are handed over in between."""
    points, rng = 260_000, np.random.default_rng(0)
    coords = np.column_stack([rng.integers(0, 3, points), rng.integers(-300, 300, points)]).astype(I32)
    expected, row_of_point = np.unique(coords, axis=0, return_inverse=True)
    results = unique_results(points, len(expected), 1)
    got, _, found, row_of, order, *_ = call("unique_sites", results, coords, np.array([points], I32))
    assert found[0] == len(expected)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(row_of, row_of_point.reshape(-1))
    np.testing.assert_array_equal(order, np.argsort(row_of, kind="stable"))


GEOMETRIES = [  # kernel, stride, padding, dilation
    ((3,), (2,), (1,), (1,)),
    ((5,), (3,), (2,), (2,)),
    ((2, 2), (2, 2), (0, 0), (1, 1)),
    ((3, 4), (1, 2), (1, -1), (2, 3)),
    ((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    ((3, 1, 2), (2, 4, 1), (0, 0, 1), (1, 2, 2)),
    ((5, 3, 3), (1, 1, 1), (2, 1, 1), (1, 1, 1)),  # 45 taps: two mask words
    ((2, 3, 1, 2), (2, 2, 1, 1), (0, 1, 0, 1), (1, 1, 1, 2)),
]


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("rows", "count", "capacity"), [(60, 55, 400), (60, 60, 7), (8, 0, 4)])
def test_coarse_sites_are_all_sites_whose_window_holds_a_site(geometry, bounded, rows, count, capacity):
    kernel, stride, padding, dilation = geometry
    dims = len(kernel)
    rng = np.random.default_rng(rows + capacity)
    coords = random_coords(rng, rows, dims, 6)
    coords[0, 1:] = 2 ** (BITS[dims] - 1) - 1  # at the edge of the grid
    bounds = [5, 4, 6, 3][:dims] if bounded else []
    sites, outside = {}, 0
    for site in coords[:count]:
        for tap in taps(kernel):
            scaled = [int(f) + p - d * t for f, p, d, t in zip(site[1:], padding, dilation, tap, strict=True)]
            if any(v % s for v, s in zip(scaled, stride, strict=True)):
                continue
            coarse = [v // s for v, s in zip(scaled, stride, strict=True)]
            if bounded and not all(0 <= c < b for c, b in zip(coarse, bounds, strict=True)):
                continue
            k = key((site[0], *coarse))
            outside += k is None
            if k is not None:
                sites[k] = (int(site[0]), *coarse)
    results = coarse_results(rows, capacity, Geometry(kernel, stride, padding, dilation))
    attrs = attributes(geometry, bounds=np.array(bounds, I32), is_sorted=0)
    got, kept, found, lost, index, _ = call("coarse_sites", results, coords, np.array([count], I32), **attrs)
    np.testing.assert_array_equal([kept, found, lost], [[min(len(sites), capacity)], [len(sites)], [outside]])
    np.testing.assert_array_equal(got, sites_array([sites[k] for k in sorted(sites)], capacity, dims))
    windows = ((2,) * dims, (1,) * dims, (0,) * dims, (1,) * dims)
    kernel_map(got, kept[0], got, kept[0], windows, builder=1, index=index)


def sorted_sites(rng, rows, dims, spread):
    """Distinct sites in key order, int32 [rows or fewer, 1 + D]."""
    return np.array(sorted({tuple(c) for c in random_coords(rng, rows, dims, spread)}, key=key), I32)


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("stride", "bounded", "capacity"),
    [(2, False, 1500), (2, True, 1500), (2, False, 90), (4, True, 1500), (8, False, 90)],
)
def test_coarse_sites_of_sorted_sites_drop_their_last_bits(dims, stride, bounded, capacity):
    coords = sorted_sites(np.random.default_rng(dims), 1500, dims, {1: 2000, 2: 40, 3: 10, 4: 5}[dims])
    bounds = [3] * dims if bounded else []
    coarse = {(int(c[0]), *(int(v) // stride for v in c[1:])) for c in coords}
    expected = sorted((c for c in coarse if not bounded or all(0 <= v < 3 for v in c[1:])), key=key)
    geometry = ((stride,) * dims, (stride,) * dims, (0,) * dims, (1,) * dims)
    results = coarse_results(len(coords), capacity, Geometry(*geometry))
    attrs = attributes(geometry, bounds=np.array(bounds, I32), is_sorted=1)
    got, kept, found, outside, index, _ = call("coarse_sites", results, coords, np.array([len(coords)], I32), **attrs)
    assert (kept[0], found[0], outside[0]) == (min(len(expected), capacity), len(expected), 0)
    np.testing.assert_array_equal(got, sites_array(expected, capacity, dims))
    kernel_map(got, kept[0], got, kept[0], ((2,) * dims, (1,) * dims, (0,) * dims, (1,) * dims), builder=1, index=index)


@pytest.mark.parametrize(("dims", "stride", "rows"), [*itertools.product([1, 2, 3, 4], [1, 2, 3], [600]), (3, 1, 3000)])
def test_coarse_sites_of_sites_far_apart(dims, stride, rows):
    """Each site reaches blocks of its own: more than a list or each block of threads holds, and codes of many bits."""
    rng = np.random.default_rng(dims)
    half = 2 ** (BITS[dims] - 1)
    coords = rng.integers(-half, half, (rows, 1 + dims)).astype(I32)
    coords[:, 0] = rng.integers(0, 200, rows)
    windows = [{(b, *site) for site in itertools.product(*({-(-(c - 1) // stride), (c + 1) // stride} for c in site))}
               for b, *site in coords.tolist()]  # fmt: skip
    if stride == 1:
        windows = [w | {(b, *s) for s in itertools.product(*((c - 1, c, c + 1) for c in site))}
                   for w, (b, *site) in zip(windows, coords.tolist(), strict=True)]  # fmt: skip
    reached = [
        site
        for window, (_, *fine) in zip(windows, coords.tolist(), strict=True)
        for site in window
        if all(-1 <= f - stride * c <= 1 for f, c in zip(fine, site[1:], strict=True))
    ]
    outside = sum(key(site) is None for site in reached)
    expected = sorted({site for site in reached if key(site) is not None}, key=key)
    geometry = ((3,) * dims, (stride,) * dims, (1,) * dims, (1,) * dims)
    capacity = len(expected) + 5
    results = coarse_results(rows, capacity, Geometry(*geometry))
    attrs = attributes(geometry, bounds=np.array([], I32), is_sorted=0)
    got, kept, found, lost, index, _ = call("coarse_sites", results, coords, np.array([rows], I32), **attrs)
    assert (kept[0], found[0], lost[0]) == (len(expected), len(expected), outside)
    np.testing.assert_array_equal(got, sites_array(expected, capacity, dims))
    kernel_map(got, kept[0], got, 200, ((2,) * dims, (1,) * dims, (0,) * dims, (1,) * dims), builder=1, index=index)


# --- maps ---


def kernel_map(coords, count, out_coords, out_count, geometry, builder, index=None):
    """Checks table and masks of the real outputs, by an index that is there or by one of the builder's."""
    volume, out_rows = len(taps(geometry[0])), len(out_coords)
    in_count, of_blocks = np.array([count], I32), int(builder == 1)
    if index is None:
        size = _workspace.site_index(len(coords))
        (index,) = call("site_index", [((size,), U8)], coords, in_count, of_blocks=of_blocks)
    results = [((volume, out_rows), I32), ((out_rows, -(-volume // 32)), U32)]
    operands = coords, in_count, out_coords, np.array([out_count], I32), index
    table, masks = call("kernel_map", results, *operands, **attributes(geometry, builder=builder))
    row_of = {tuple(map(int, c)): r for r, c in reversed(list(enumerate(coords[:count])))}
    expected = np.full((volume, out_count), -1, I32)
    for (k, tap), m in itertools.product(enumerate(taps(geometry[0])), range(out_count)):
        expected[k, m] = row_of.get(fine(out_coords[m], tap, geometry), -1)
    np.testing.assert_array_equal(table[:, :out_count], expected)
    np.testing.assert_array_equal(masks[:out_count], masks_of(expected))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(
    ("rows", "count", "out_rows", "out_count"), [(90, 80, 75, 70), (20, 0, 40, 40), (33, 33, 5, 0)]
)
def test_kernel_map_finds_the_first_row_of_each_site(geometry, rows, count, out_rows, out_count):
    dims = len(geometry[0])
    rng = np.random.default_rng(rows)
    coords = random_coords(rng, rows, dims, 4)  # dense enough that sites repeat
    out_coords = random_coords(rng, out_rows, dims, 4)
    out_coords[0, 0] = -1  # no key
    kernel_map(coords, count, out_coords, out_count, geometry, builder=0)


@pytest.mark.parametrize(
    "geometry",
    [
        *GEOMETRIES,
        ((7, 7, 7), (1, 1, 1), (3, 3, 3), (1, 1, 1)),
        ((40,), (1,), (9,), (9,)),
        ((3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),  # windows over two blocks on each axis, from here on
        ((3, 3, 3), (1, 1, 1), (2, 2, 2), (2, 2, 2)),
        ((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1)),
        ((2, 2, 2), (3, 1, 2), (1, 5, -3), (1, 2, 3)),
        ((1, 3, 1), (1, 2, 1), (0, 1, 0), (1, 1, 1)),
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((2,), (1,), (0,), (1,)),
        ((2, 2, 2, 2), (1, 1, 1, 1), (0, 1, 0, 1), (1, 1, 1, 1)),
        ((2, 2, 2, 3), (1, 2, 1, 1), (0, 1, 0, 1), (1, 1, 1, 1)),
    ],
)
def test_kernel_map_by_blocks_finds_the_same(geometry):
    dims = len(geometry[0])
    rng = np.random.default_rng(dims)
    coords = sorted_sites(rng, 400, dims, {1: 300, 2: 14, 3: 6, 4: 4}[dims])
    coords[:, 1] += 2 ** (BITS[dims] - 1) - 1 - coords[:, 1].max()  # windows end at the edge of the grid
    coords = np.array(sorted(coords, key=key), I32)
    out_coords = rng.permutation(np.concatenate([coords[:120], random_coords(rng, 80, dims, 4)]))
    kernel_map(coords, len(coords) - 3, out_coords, len(out_coords) - 2, geometry, builder=1)


@pytest.mark.parametrize("size", [2, 3])
def test_blocks_are_told_apart_where_slots_hold_few_bits_of_their_hash(size):
    """In an array of 2^20 rows a slot of the index has 11 bits of a block's hash, which some pairs of blocks share."""
    at = np.unique(np.random.default_rng(0).integers(-40, 40, (6000, 3)), axis=0)
    firsts = np.column_stack([0 * at[:, 0], 4 * at])  # sites of batch 0, each the first of its block
    sites = np.array(sorted(map(tuple, firsts), key=key), I32)
    coords = np.full((2**20, 4), PADDING, I32)
    coords[: len(sites)] = sites
    next_blocks = ((size,) * 3, (1,) * 3, (4,) * 3, (4,) * 3)  # every tap but the middle one
    kernel_map(coords, len(sites), sites, len(sites), next_blocks, builder=1)


ENDS = np.array(list(itertools.product([0, 1022], *[[-(2**17), 1 - 2**17, -1, 0, 2**17 - 2, 2**17 - 1]] * 3)))
SCENES = {
    **regular_scenes(line=150, plane=14, cube=6),
    "equal low bits": np.indices((3, 4, 4, 4)).reshape(4, -1).T * [1, 2**15, 2**15, 2**15] - [0, *[2**16] * 3],
    "far ends": ENDS,
}


@pytest.mark.parametrize("name", SCENES)
def test_regular_scenes(name):
    coords = np.array(sorted(map(tuple, SCENES[name].astype(I32)), key=key), I32)
    count, capacity = np.array([len(coords)], I32), 8 * len(coords)
    geometry = ((3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3)
    shuffled = np.random.default_rng(0).permutation(coords)
    kernel_map(shuffled, len(coords), coords, len(coords), geometry, builder=0)
    kernel_map(coords, len(coords), coords, len(coords), geometry, builder=1)
    strided = ((3,) * 3, (2,) * 3, (1,) * 3, (1,) * 3)
    reached = {
        (b, *site)
        for b, *fine in coords.tolist()
        for site in itertools.product(*({c >> 1, (c + 1) >> 1} for c in fine))
    }
    expected = sorted(reached, key=key)  # half as far from 0 as the fine ones: each has a key
    results = coarse_results(len(coords), capacity, Geometry(*strided))
    for rows, is_sorted in ((coords, 1), (shuffled, 0)):
        attrs = attributes(strided, bounds=np.array([], I32), is_sorted=is_sorted)
        got, kept, found, outside, index, _ = call("coarse_sites", results, rows, count, **attrs)
        assert (kept[0], found[0], outside[0]) == (len(expected), len(expected), 0)
        np.testing.assert_array_equal(got, sites_array(expected, capacity, 3))
        kernel_map(got, kept[0], got, kept[0], geometry, builder=1, index=index)


def test_kernels_give_the_bits_of_the_cpu_handlers():
    rng = np.random.default_rng(8)
    coords = random_coords(rng, 4000, 3, 30)
    count, capacity = np.array([3900], I32), 9000
    *found, _ = call("unique_sites", unique_results(4000, capacity, 3), coords, count)
    for a, b in zip(found, _coords.unique_sites(coords, count, capacity=capacity, implementation="auto"), strict=True):
        np.testing.assert_array_equal(a, b)
    sites, number = found[:2]
    for kernel in (2, 3, (1, 3, 1)):
        geometry = Geometry.create(3, kernel, 2)
        options = {"geometry": geometry, "capacity": 4 * capacity, "bounds": None, "is_sorted": True}
        expected = _coords.coarse_sites(sites, number, implementation="auto", **options)
        results = coarse_results(capacity, 4 * capacity, geometry)
        attrs = {**geometry.attributes(), "bounds": np.array([], I32), "is_sorted": 1}
        for a, b in zip(call("coarse_sites", results, sites, number, **attrs)[:4], expected[:4], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("volume", [1, 27, 45])
@pytest.mark.parametrize("counts", [[50], [0], [64], [20, 0, 16, 7]])
def test_reverse_table_inverts_the_map_of_real_rows(volume, counts):
    rng = np.random.default_rng(volume)
    table = random_table(rng, volume, 70, 64, 0.4)
    expected = np.full((volume, 70), -1, I32)
    for k, m in itertools.product(range(volume), real_rows(64, counts)):
        if table[k, m] >= 0:
            expected[k, table[k, m]] = m
    results = [((volume, 70), I32), ((70, -(-volume // 32)), U32)]
    reverse, masks = call("reverse_table", results, table, np.array(counts, I32))
    np.testing.assert_array_equal(masks, masks_of(expected))
    np.testing.assert_array_equal(reverse[expected >= 0], expected[expected >= 0])


def test_errors_name_the_call_and_the_shapes():
    coords, count = np.zeros((8, 4), I32), np.array([8], I32)
    results = [*unique_results(8, 8, 3)[:-1], ((64,), U8)]
    with pytest.raises(Exception, match=r"unique_sites_v1: offsets must have size 10 on axis 0.*coords int32 \[8, 4\]"):
        call("unique_sites", [((9, 4), I32), *results[1:]], coords, count)
    with pytest.raises(Exception, match=r"unique_sites_v1: workspace has 64 bytes, needs \d+"):
        call("unique_sites", results, coords, count)
