"""The CUDA kernels, run on the host, against brute force in numpy."""

import contextlib
import itertools

import cuda_on_host
import jax
import ml_dtypes
import numpy as np
import pytest
from scenes import regular_scenes

from jaxsparse.geometry import Geometry
from jaxsparse.ops import _coords, _workspace
from jaxsparse.ops.conv import FLOAT_TILES, FLOAT_WGRAD_TILES, FORWARD_TILES, NARROW_TILES, WGRAD_TILES

pytestmark = pytest.mark.skipif(cuda_on_host.compiler() is None, reason="needs a C++ compiler")

PADDING = np.iinfo(np.int32).min
BITS = {1: 31, 2: 24, 3: 18, 4: 14}
I32, U32, U8 = np.int32, np.uint32, np.uint8
F16, BF16, F32, F64 = np.float16, ml_dtypes.bfloat16, np.float32, np.float64


@pytest.fixture(scope="session", autouse=True)
def library(tmp_path_factory):
    cuda_on_host.load(tmp_path_factory.mktemp("cuda_on_host"))


call = cuda_on_host.call


# --- oracles ---


def key(site):
    """The 64-bit key of (batch, coordinates), None where a field does not fit."""
    batch, *coords = (int(v) for v in site)
    dims = len(coords)
    bits = BITS[dims]
    max_batch = 2**31 - 1 if dims == 1 else 2 ** (64 - dims * bits) - 2
    half = 2 ** (bits - 1)
    if not 0 <= batch <= max_batch or not all(-half <= c < half for c in coords):
        return None
    code = 0
    for bit in reversed(range(bits)):
        for c in coords:
            code = code << 1 | (c + half) >> bit & 1
    return batch << (dims * bits) | code


def taps(kernel):
    return list(itertools.product(*(range(k) for k in kernel)))


def fine(site, tap, geometry):
    rest = [s * int(c) - p + d * t for c, t, s, p, d in zip(site[1:], tap, *geometry[1:], strict=True)]
    return (int(site[0]), *(int(v) for v in rest))


def attributes(geometry, **more):
    return dict(zip(("kernel", "stride", "padding", "dilation"), geometry, strict=True), **more)


def sites_array(sites, rows, dims):
    out = np.full((rows, 1 + dims), PADDING, I32)
    out[: min(len(sites), rows)] = np.array(sites[:rows], I32).reshape(-1, 1 + dims)
    return out


def real_rows(rows, counts):
    per = rows // len(counts)
    return [s * per + r for s, count in enumerate(counts) for r in range(min(max(count, 0), per))]


def masks_of(table):
    volume, rows = table.shape
    masks = np.zeros((rows, -(-volume // 32)), U32)
    for k, m in zip(*np.nonzero(table >= 0), strict=True):
        masks[m, k // 32] |= U32(1 << (k % 32))
    return masks


# --- sites ---


def random_coords(rng, rows, dims, spread):
    coords = rng.integers(-spread, spread, (rows, 1 + dims)).astype(I32)
    coords[:, 0] = rng.integers(0, 3, rows)
    return coords


def unique_results(points, capacity, dims):
    rows, size = ((points,), I32), _workspace.unique_sites(points)
    counts, ends, reasons = ((1,), I32), ((capacity + 1,), I32), ((_coords.REASONS,), I32)
    return [((capacity, 1 + dims), I32), counts, counts, rows, rows, ends, reasons, ((size,), U8)]


def coarse_results(rows, capacity, geometry):
    size = _workspace.coarse_sites(rows, geometry)
    return [((capacity, 1 + len(geometry.kernel)), I32), *[((1,), I32)] * 3, ((size,), U8)]


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
    got, kept, found, lost, _ = call("coarse_sites", results, coords, np.array([count], I32), **attrs)
    np.testing.assert_array_equal([kept, found, lost], [[min(len(sites), capacity)], [len(sites)], [outside]])
    np.testing.assert_array_equal(got, sites_array([sites[k] for k in sorted(sites)], capacity, dims))


def sorted_sites(rng, rows, dims, spread):
    """Distinct sites in key order, int32 [rows or fewer, 1 + D]."""
    return np.array(sorted({tuple(c) for c in random_coords(rng, rows, dims, spread)}, key=key), I32)


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
@pytest.mark.parametrize("bounded", [False, True])
def test_coarse_sites_of_sorted_sites_drop_their_last_bits(dims, bounded):
    coords = sorted_sites(np.random.default_rng(dims), 1500, dims, {1: 2000, 2: 40, 3: 10, 4: 5}[dims])
    bounds = [3] * dims if bounded else []
    coarse = {(int(c[0]), *(int(v) // 2 for v in c[1:])) for c in coords}
    expected = sorted((c for c in coarse if not bounded or all(0 <= v < 3 for v in c[1:])), key=key)
    geometry = ((2,) * dims, (2,) * dims, (0,) * dims, (1,) * dims)
    results = coarse_results(len(coords), 1500, Geometry(*geometry))
    attrs = attributes(geometry, bounds=np.array(bounds, I32), is_sorted=1)
    got, kept, found, outside, _ = call("coarse_sites", results, coords, np.array([len(coords)], I32), **attrs)
    assert (kept[0], found[0], outside[0]) == (min(len(expected), 1500), len(expected), 0)
    np.testing.assert_array_equal(got, sites_array(expected, 1500, dims))


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_coarse_sites_of_sites_far_apart(dims, stride):
    """Each site reaches blocks of its own: more than a list holds, and codes of many bits."""
    rng = np.random.default_rng(dims)
    half = 2 ** (BITS[dims] - 1)
    coords = rng.integers(-half, half, (600, 1 + dims)).astype(I32)
    coords[:, 0] = rng.integers(0, 200, 600)
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
    results = coarse_results(600, capacity, Geometry(*geometry))
    attrs = attributes(geometry, bounds=np.array([], I32), is_sorted=0)
    got, kept, found, lost, _ = call("coarse_sites", results, coords, np.array([600], I32), **attrs)
    assert (kept[0], found[0], lost[0]) == (len(expected), len(expected), outside)
    np.testing.assert_array_equal(got, sites_array(expected, capacity, dims))


# --- maps ---


def kernel_map(coords, count, out_coords, out_count, geometry, builder):
    """Table and masks of the real outputs."""
    volume, out_rows = len(taps(geometry[0])), len(out_coords)
    in_count, of_blocks = np.array([count], I32), int(builder == 1)
    (index,) = call("site_index", [((_workspace.site_index(len(coords)),), U8)], coords, in_count, of_blocks=of_blocks)
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
        got, kept, found, outside, _ = call("coarse_sites", results, rows, count, **attrs)
        assert (kept[0], found[0], outside[0]) == (len(expected), len(expected), 0)
        np.testing.assert_array_equal(got, sites_array(expected, capacity, 3))


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
        for a, b in zip(call("coarse_sites", results, sites, number, **attrs)[:4], expected, strict=True):
            np.testing.assert_array_equal(a, b)


def random_table(rng, volume, in_rows, out_rows, density, centre=False):
    """A kernel map in which each tap takes an input row at most once."""
    table = np.full((volume, out_rows), -1, I32)
    for k in range(volume):
        rows = rng.permutation(in_rows)[:out_rows]
        there = rng.random(len(rows)) < (1 if centre and k == volume // 2 else density)
        table[k, : len(rows)] = np.where(there, rows, -1)
    return table


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


# --- convolution ---

# dtype of features, of the result, precision
DTYPES = [(F16, F16), (F16, F32), (BF16, BF16), (BF16, F32), (F32, F32), (F64, F64)]
CHANNELS = [(1, 1), (3, 17), (4, 32), (17, 3), (64, 96), (96, 64), (40, 130)]


def wide(dtype):
    """float64 crosses JAX only in x64 mode."""
    return jax.enable_x64(True) if dtype == F64 else contextlib.nullcontext()


def small_integers(rng, shape, dtype):
    """Values whose products and sums are exact in every accumulator, so that equality is the test."""
    return rng.integers(-3, 4, shape).astype(dtype)


def forward(x, w, table, counts, out_dtype, tile_rows=64):
    """Where the masks have no tap, the table holds anything."""
    masks, table = masks_of(table), np.where(table >= 0, table, len(x) // 2)
    with wide(x.dtype):
        shape = (table.shape[1], w.shape[2])
        return call(
            "conv_forward", [(shape, out_dtype)], x, w, table, masks, np.array(counts, I32), tile_rows=tile_rows
        )[0]


def wgrad(x, g, table, counts, out_dtype):
    with wide(x.dtype):
        shape = (table.shape[0], x.shape[1], g.shape[1])
        size = _workspace.conv_wgrad(len(table), *shape[1:], table.shape[1], 8 if x.dtype == F64 else 4)
        return call(
            "conv_wgrad", [(shape, out_dtype), ((size,), U8)], x, g, table, masks_of(table), np.array(counts, I32),
            tile_rows=64,
        )[0]  # fmt: skip


@pytest.mark.parametrize("tile_rows", [32, 64, 128])
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
@pytest.mark.parametrize(("channels", "volume", "counts"), [
    ((3, 17), 27, [130]), ((64, 96), 8, [100, 0, 70]), ((17, 3), 45, [0]), ((96, 64), 27, [200]), ((40, 130), 3, [77]),
])  # fmt: skip
def test_forward_sums_the_products_of_the_map(tile_rows, dtype, out_dtype, channels, volume, counts):
    rng = np.random.default_rng(volume)
    out_rows, in_rows = 210, 190
    x = small_integers(rng, (in_rows, channels[0]), dtype)
    w = small_integers(rng, (volume, *channels), dtype)
    table = random_table(rng, volume, in_rows, out_rows, 0.2)
    expected = np.zeros((out_rows, channels[1]))
    for m, k in itertools.product(real_rows(out_rows, counts), range(volume)):
        if table[k, m] >= 0:
            expected[m] += x[table[k, m]].astype(F64) @ w[k].astype(F64)
    y = forward(x, w, table, counts, out_dtype, tile_rows)
    assert y.dtype == out_dtype
    np.testing.assert_array_equal(y.astype(F64), expected.astype(out_dtype).astype(F64))


@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
@pytest.mark.parametrize(("channels", "volume", "counts"), [
    ((1, 1), 1, [300]), ((3, 17), 27, [1210]), ((64, 96), 8, [500, 0, 70]), ((17, 3), 45, [0]), ((96, 64), 3, [2100]),
])  # fmt: skip
def test_wgrad_sums_the_outer_products_of_the_map(dtype, out_dtype, channels, volume, counts):
    rng = np.random.default_rng(volume)
    out_rows, in_rows = 2100, 1900
    x = small_integers(rng, (in_rows, channels[0]), dtype)
    g = small_integers(rng, (out_rows, channels[1]), dtype)
    table = random_table(rng, volume, in_rows, out_rows, 0.2, centre=True)
    expected = np.zeros((volume, *channels))
    real = np.array(real_rows(out_rows, counts), int)
    for k in range(volume):
        m = real[table[k, real] >= 0]
        expected[k] = x[table[k, m]].astype(F64).T @ g[m].astype(F64)
    dw = wgrad(x, g, table, counts, out_dtype)
    assert dw.dtype == out_dtype
    np.testing.assert_array_equal(dw.astype(F64), expected.astype(out_dtype).astype(F64))


@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
def test_results_do_not_depend_on_capacity_or_tile_mates(dtype, out_dtype):
    rng = np.random.default_rng(1)
    count, volume, c_in, c_out = 700, 9, 20, 24
    x = rng.normal(size=(count, c_in)).astype(dtype)
    x[rng.random(x.shape) < 0.1] *= -0.0
    w = rng.normal(size=(volume, c_in, c_out)).astype(dtype)
    g = rng.normal(size=(count, c_out)).astype(dtype)
    table = random_table(rng, volume, count, count, 0.3)

    def at_capacity(rows):
        more = rows - count
        full = lambda v: np.concatenate([v, np.full((more, v.shape[1]), np.nan, dtype)])  # noqa: E731
        return full(x), full(g), np.concatenate([table, np.full((volume, more), -1, I32)], 1)

    xs, gs, tables = at_capacity(count)
    y = forward(xs, w, tables, [count], out_dtype)
    dw = wgrad(xs, gs, tables, [count], out_dtype)
    assert np.isfinite(y.astype(F64)).all()
    assert np.isfinite(dw.astype(F64)).all()
    for capacity, tile_rows in [(701, 32), (1500, 128)]:
        xs, gs, tables = at_capacity(capacity)
        y_more = forward(xs, w, tables, [count], out_dtype, tile_rows)
        assert y_more[:count].tobytes() == y.tobytes()
        assert y_more[count:].tobytes() == bytes(y_more[count:].nbytes)  # +0, not -0
        assert wgrad(xs, gs, tables, [count], out_dtype).tobytes() == dw.tobytes()

    shuffled = rng.permutation(count)
    assert forward(x, w, table[:, shuffled], [count], out_dtype).tobytes() == y[shuffled].tobytes()


def test_negative_underflow_leaves_no_negative_zero():
    """A row's only product rounds to -0 in float32; whether a tile mate's tap adds +0 to it must not show."""
    x = np.zeros((2, 16), F32)  # 16: one whole step, so that no zero past the last channel hides the sign
    x[:, -1] = 1e-30
    w = np.zeros((2, 16, 1), F32)
    w[:, -1] = -1e-30
    alone = forward(x, w, np.array([[0, -1], [-1, -1]], I32), [2], F32)
    with_mate = forward(x, w, np.array([[0, -1], [-1, 1]], I32), [2], F32)
    assert alone[0].tobytes() == with_mate[0].tobytes() == bytes(4)
    x, w = (np.zeros((2, 32), F32), np.zeros((2, 32, 8), F32))
    x[:, -1], w[:, -1] = 1e-30, -1e-30
    y = conv_gemm(x, w, np.array([[0, -1], [-1, -1]], I32), [2], F32, (64, 16, 4), exact=1)
    assert y[0].tobytes() == bytes(32)


# --- convolution over a schedule ---


def schedule(table, counts, groups=()):
    """Order, tile masks and tile table of a schedule by groups of taps."""
    volume, rows = table.shape
    words, tiles = -(-volume // 32), -(-rows // 64)
    attribute = [sum(1 << k % 32 for k in g if k // 32 == word) for g in groups for word in range(words)]
    results = [
        ((rows,), I32),
        ((tiles, words), U32),
        ((tiles, volume, 64), I32),
        ((_workspace.conv_schedule(rows),), U8),
    ]
    anywhere = np.where(table >= 0, table, 7)  # where the masks have no tap, the table holds anything
    return call(
        "conv_schedule", results, anywhere, masks_of(table), np.array(counts, I32), groups=np.array(attribute, np.int64)
    )[:3]


def sorted_order(table, counts, groups):
    """Real rows by which groups they have any tap of, as places in the Gray sequence, counted down; then the others."""
    rows = table.shape[1]
    real = np.array(real_rows(rows, counts), int)
    bits = np.zeros(len(real), int)
    for group in groups:
        bits = bits << 1 | (table[np.ix_(group, real)] >= 0).any(0)
    for shift in (1, 2, 4, 8):
        bits ^= bits >> shift
    return np.concatenate([real[np.argsort(-bits, kind="stable")], np.setdiff1d(np.arange(rows), real)])


@pytest.mark.parametrize(
    ("volume", "rows", "counts"),
    [
        (27, 320, [300]),
        (8, 320, [0]),
        (45, 320, [100, 0, 60, 1]),
        (3, 320, [320]),
        (27, 5000, [4900]),
        (9, 9001, [9001]),
        (45, 3000, [400, 0, 1500]),
        (2, 140_000, [139_000]),
    ],
)
@pytest.mark.parametrize("sort", [False, True])
def test_schedule_has_rows_in_order_and_the_map_in_tiles(volume, rows, counts, sort):
    rng = np.random.default_rng(volume)
    table = random_table(rng, volume, rows + 80, rows, 0.1, centre=True)
    groups = Geometry.create(1, volume, 1).tap_groups if sort else ()
    order, tile_masks, tile_table = schedule(table, counts, groups)
    np.testing.assert_array_equal(order, sorted_order(table, counts, groups) if sort else np.arange(rows))
    in_tiles = np.full((volume, 64 * len(tile_masks)), -1, I32)
    in_tiles[:, :rows] = np.where(np.isin(order, real_rows(rows, counts)), table[:, order], -1)
    in_tiles = in_tiles.reshape(volume, -1, 64).swapaxes(0, 1)
    there = (in_tiles >= 0).any(2)
    k = np.arange(volume)
    np.testing.assert_array_equal(tile_masks[:, k // 32] >> k % 32 & 1, there)
    np.testing.assert_array_equal(tile_table[there], in_tiles[there])


def tile_attributes(tile, exact):
    return {"tile_rows": tile[0], "tile_cols": tile[1], "stages": tile[2], "exact": exact}


def conv_gemm(x, w, table, counts, out_dtype, tile, groups=(), exact=0):
    shape = (table.shape[1], w.shape[2])
    attributes = tile_attributes(tile, exact)
    w = w.swapaxes(1, 2) if w.dtype == F32 else w
    return call("conv_gemm", [(shape, out_dtype)], x, w, *schedule(table, counts, groups), **attributes)[0]


def list_pairs(table, counts):
    """Pairs of each tap and their number, checked; pairs past a tap's number hold anything."""
    volume, rows = table.shape
    results = [((volume, rows, 2), I32), ((volume,), I32), ((_workspace.conv_pairs(volume),), U8)]
    anywhere = np.where(table >= 0, table, 7)  # where the masks have no tap, the table holds anything
    pairs, tap_pairs, _ = call("conv_pairs", results, anywhere, masks_of(table), np.array(counts, I32))
    real = np.array(real_rows(rows, counts), int)
    for k in range(volume):
        m = real[table[k, real] >= 0]
        np.testing.assert_array_equal(pairs[k, : tap_pairs[k]], np.stack([table[k, m], m], 1))
    return pairs, tap_pairs


@pytest.mark.parametrize(
    ("volume", "rows", "counts"),
    [(27, 3000, [2900]), (45, 2000, [100, 0, 500, 1]), (8, 9000, [0]), (27, 9001, [9001]), (2, 140_000, [139_000])],
)
def test_pairs_are_those_of_real_rows_in_order(volume, rows, counts):
    rng = np.random.default_rng(volume)
    list_pairs(random_table(rng, volume, rows, rows, 0.1, centre=True), counts)


def wgrad_gemm(x, g, table, counts, out_dtype, tile, slots, exact=0):
    pairs, tap_pairs = list_pairs(table, counts)
    volume = len(table)
    shape = (volume, x.shape[1], g.shape[1])
    attributes = tile_attributes(tile, exact) | {"slots": slots}
    results = [(shape, out_dtype), ((_workspace.wgrad_gemm(slots, *shape[1:]),), U8)]
    return call("wgrad_gemm", results, x, g, pairs, tap_pairs, **attributes)[0]


@pytest.mark.parametrize("tile", FORWARD_TILES + NARROW_TILES, ids=str)
def test_every_forward_tile_sums_the_products_of_the_map(tile):
    """Rows at a tile's size and one more or less; channels with whole and broken steps and tiles."""
    rng = np.random.default_rng(tile.cols)
    narrow = tile in NARROW_TILES and tile not in FORWARD_TILES
    cases = [
        (63, 8, 8, 3, [63]),
        (tile.rows + 1, 40, tile.cols + 8, 8, [tile.rows]),
        (130, 72, tile.cols, 45, [20, 65]),
    ]
    if tile in NARROW_TILES:
        cases = [(130, 4, tile.cols, 27, [129]), (65, 12, 8, 8, [65])] + ([] if narrow else cases)
    for case, (out_rows, c_in, c_out, volume, counts) in enumerate(cases):
        dtype, out_dtype = [(F16, F16), (BF16, BF16), (F16, F32), (BF16, F32), (F16, F16)][case]
        x, w = small_integers(rng, (150, c_in), dtype), small_integers(rng, (volume, c_in, c_out), dtype)
        table = random_table(rng, volume, 150, out_rows, 0.2)
        expected = np.zeros((out_rows, c_out))
        for m, k in itertools.product(real_rows(out_rows, counts), range(volume)):
            if table[k, m] >= 0:
                expected[m] += x[table[k, m]].astype(F64) @ w[k].astype(F64)
        y = conv_gemm(x, w, table, counts, out_dtype, tile, Geometry.create(1, volume, 1).tap_groups)
        np.testing.assert_array_equal(y.astype(F64), expected.astype(out_dtype).astype(F64))


NUMBERS = ("mean", "variance", "scale", "bias")
ACTIVATIONS = [
    lambda z: z,
    lambda z: np.maximum(z, 0),
    lambda z: np.where(z < 0, 0.01 * z, z),
    lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    lambda z: z / (1 + np.exp(-z)),
]


def conv_fused(x, w, table, counts, tile, groups, numbers, residual, activation, epsilon):
    operands = numbers | ({} if residual is None else {"residual": residual})
    attributes = {"given": sum(1 << i for i, name in enumerate((*NUMBERS, "residual")) if name in operands)}
    attributes |= {"activation": activation, "epsilon": epsilon}
    attributes |= {"tile_rows": tile[0], "tile_cols": tile[1], "stages": tile[2]}
    operands = [operands[name] for name in (*NUMBERS, "residual") if name in operands]
    result = ((table.shape[1], w.shape[2]), x.dtype)
    return call(
        "conv_fused", [result], x, w, *schedule(table, counts, groups), np.array(counts, I32), *operands, **attributes
    )[0]


def channel_numbers(rng, channels, names):
    """Of every dtype that is taken."""
    dtypes = {"mean": F32, "variance": F16, "scale": BF16, "bias": F32}
    return {
        name: rng.uniform(0.5, 1.5, channels).astype(dtypes[name]) * dtypes[name](-1 if name == "bias" else 1)
        for name in names
    }


def assert_fused(x, w, table, counts, tile, groups, numbers, residual, activation):
    """Within 1 ulp of the result, and the roundings of the sums as they come through scale and activation."""
    epsilon = 0.25
    y = conv_fused(x, w, table, counts, tile, groups, numbers, residual, activation, epsilon)
    wide = {name: value.astype(F64) for name, value in numbers.items()}
    factor = wide.get("scale", 1) / np.sqrt(wide["variance"] + epsilon if "variance" in wide else 1)

    def product(x, w):
        return np.einsum("kmi,kio->mo", rows_under_taps(x, table), w.astype(F64))

    z = (product(x, w) - wide.get("mean", 0)) * factor + wide.get("bias", 0)
    spread = product(np.abs(x), np.abs(w)) + np.abs(wide.get("mean", 0)) + 1
    if residual is not None:
        z = z + residual.astype(F64)
    true = ACTIVATIONS[activation](z)
    mantissa = 10 if x.dtype == F16 else 7
    ulp = np.ldexp(1.0, np.maximum(np.frexp(np.abs(true))[1] - 1, -14 if x.dtype == F16 else -126) - mantissa)
    products = (table >= 0).sum(0)[:, None] * x.shape[1]
    bound = ulp + (products / 2 + 4) * 2.0**-23 * np.abs(factor) * spread + 2.0**-20 * (np.abs(z) + 1)
    real = np.zeros(len(z), bool)
    real[real_rows(len(z), counts)] = True
    assert (np.abs(y.astype(F64) - true) <= bound)[real].all()
    assert y[~real].tobytes() == bytes(y[~real].nbytes)


@pytest.mark.parametrize("tile", FORWARD_TILES + NARROW_TILES, ids=str)
def test_every_forward_tile_with_an_epilogue(tile):
    """Few steps and many, rows of no tap, two words of taps with nothing in the second, padding that holds NaN."""
    rng = np.random.default_rng(tile.cols)
    cases = [
        (63, 8, 8, 3, [60], NUMBERS, True),
        (tile.rows + 1, 40, tile.cols + 8, 8, [tile.rows], ("mean", "scale"), False),
        (130, 72, tile.cols, 45, [20, 65], ("variance", "bias"), True),
        (200, 136, tile.cols, 27, [150], (), True),
    ]
    if tile in NARROW_TILES:
        cases = [(130, 4, tile.cols, 27, [129], NUMBERS, True)] + (cases if tile in FORWARD_TILES else [])
    for case, (rows, c_in, c_out, volume, counts, names, has_residual) in enumerate(cases):
        dtype = BF16 if case % 2 else F16
        x = rng.normal(size=(150, c_in)).astype(dtype)
        w = (rng.normal(size=(volume, c_in, c_out)) / np.sqrt(c_in)).astype(dtype)
        table = random_table(rng, volume, 150, rows, 0.2)
        table[32:] = -1
        table[:, 7:9] = -1
        residual = rng.normal(size=(rows, c_out)).astype(dtype) if has_residual else None
        if has_residual:
            residual[np.setdiff1d(np.arange(rows), real_rows(rows, counts))] = np.nan
        numbers, groups = channel_numbers(rng, c_out, names), Geometry.create(1, volume, 1).tap_groups
        activation = (tile.rows // 64 + tile.stages + case) % 5
        assert_fused(x, w, table, counts, tile, groups, numbers, residual, activation)


@pytest.mark.parametrize("activation", range(5))
def test_epilogue_of_hard_values(activation):
    """Sums that overflow float16 before the scale or behind it, NaN, and what activations do to them."""
    x, w = np.full((1, 8), 6e4, F16), np.zeros((1, 8, 16), F16)
    w[0, :, :8] = 2  # 960,000
    scale = np.resize(np.array([1e-3, -1e-3, 1, -1, np.nan, 0, 1e-30, -1e-30], F32), 16)
    table, bias = np.zeros((1, 1), I32), np.linspace(-20, 20, 16).astype(F32)
    numbers = {"scale": scale, "bias": bias}
    y = conv_fused(x, w, table, [1], FORWARD_TILES[0], (), numbers, None, activation, 0.0)[0].astype(F64)
    with np.errstate(all="ignore"):
        z = np.where(np.arange(16) < 8, F32(960_000), F32(0)) * scale.astype(F32) + bias
        expected = ACTIVATIONS[activation](z.astype(F64)).astype(F16).astype(F64)
    np.testing.assert_allclose(y, expected, rtol=2e-3, atol=1e-6)


def test_rows_with_an_epilogue_do_not_depend_on_tile_mates_or_capacity():
    rng = np.random.default_rng(1)
    count, volume = 150, 9
    x, w = rng.normal(size=(count, 24)).astype(F16), rng.normal(size=(volume, 24, 16)).astype(F16)
    table, numbers = random_table(rng, volume, count, count, 0.3), channel_numbers(rng, 16, NUMBERS)
    residual, groups = rng.normal(size=(count, 16)).astype(F16), Geometry.create(1, volume, 1).tap_groups
    y = conv_fused(x, w, table, [count], (128, 16, 4), (), numbers, residual, 1, 1e-5)
    more = np.concatenate([table, np.full((volume, 90), -1, I32)], 1)
    padded = np.concatenate([residual, np.full((90, 16), np.nan, F16)])
    for tile in ((128, 32, 3), (64, 16, 4)):
        y_more = conv_fused(x, w, more, [count], tile, groups, numbers, padded, 1, 1e-5)
        assert y_more[:count].tobytes() == y.tobytes()
        assert y_more[count:].tobytes() == bytes(y_more[count:].nbytes)


@pytest.mark.parametrize("tile", WGRAD_TILES, ids=str)
def test_every_wgrad_tile_sums_the_outer_products_of_the_map(tile):
    rng = np.random.default_rng(tile.cols)
    cases = [
        (400, 8, 8, 3, [400], 6),
        (700, tile.rows + 8, tile.cols, 2, [690], 5),
        (300, 4, tile.cols + 8, 9, [100, 0, 7], 18),
    ]
    for case, (out_rows, c_in, c_out, volume, counts, slots) in enumerate(cases):
        dtype, out_dtype = [(F16, F32), (BF16, BF16), (F16, F16)][case]
        x, g = small_integers(rng, (800, c_in), dtype), small_integers(rng, (out_rows, c_out), dtype)
        table = random_table(rng, volume, 800, out_rows, 0.3, centre=True)
        expected = np.zeros((volume, c_in, c_out))
        real = np.array(real_rows(out_rows, counts), int)
        for k in range(volume):
            m = real[table[k, real] >= 0]
            expected[k] = x[table[k, m]].astype(F64).T @ g[m].astype(F64)
        dw = wgrad_gemm(x, g, table, counts, out_dtype, tile, slots)
        np.testing.assert_array_equal(dw.astype(F64), expected.astype(out_dtype).astype(F64))


def adversarial(rng, shape, kind):
    """Float32 whose sums are hard: large and cancelling, or of every magnitude. (Denormals XLA's CPU threads flush.)"""
    x = rng.normal(size=shape)
    if kind == "cancelling":
        x = np.where(rng.random(shape) < 0.5, 1e4, -1e4) * (1 + 1e-4 * x)
    elif kind == "spread":
        x = x * 10.0 ** rng.integers(-12, 5, shape)
    return x.astype(F32)


def truncated(x):
    """What tensor cores read of a float32."""
    return (x.view(U32) & U32(0xFFFFE000)).view(F32)


def assert_within_rounding(got, truth, magnitude, terms):
    """Each of `terms` fused multiply-adds rounds once, by at most 2^-24 of sum |x| |w|."""
    assert (np.abs(got.astype(F64) - truth) <= 1.001 * terms * 2.0**-24 * magnitude).all()


def rows_under_taps(x, table):
    """Float64 [taps, outputs, channels], 0 where a tap is absent."""
    return np.where(table[:, :, None] >= 0, x.astype(F64)[table], 0)


HARD = pytest.mark.parametrize("kind", ["normal", "cancelling", "spread"])


@HARD
@pytest.mark.parametrize("exact", [0, 1])
@pytest.mark.parametrize("tile", FLOAT_TILES, ids=str)
def test_every_float_tile_is_right_to_the_last_rounding(tile, exact, kind):
    """Against float64 on the operands as they are read, which in TF32 are 2^-10 smaller at most."""
    rng = np.random.default_rng(tile.cols)
    in_rows, groups = 100, Geometry.create(1, 5, 1).tap_groups
    for rows, c_in, c_out in [(tile.rows - 1, 4, 8), (tile.rows, 32, tile.cols), (tile.rows + 1, 44, tile.cols + 8)]:
        x, w = adversarial(rng, (in_rows, c_in), kind), adversarial(rng, (5, c_in, c_out), "normal")
        table = random_table(rng, 5, in_rows, rows, 0.4)
        y = conv_gemm(x, w, table, [rows], F32, tile, groups, exact)

        def product(x, w, table=table):
            return np.einsum("kmi,kio->mo", rows_under_taps(x, table), w.astype(F64))

        read = (x, w) if exact else (truncated(x), truncated(w))
        assert_within_rounding(y, product(*read), product(*map(np.abs, read)), 5 * c_in)
        magnitude = product(np.abs(x), np.abs(w))
        assert (np.abs(product(*read) - product(x, w)) <= (0 if exact else 2 * 2.0**-10) * magnitude).all()


@HARD
@pytest.mark.parametrize("exact", [0, 1])
@pytest.mark.parametrize("tile", FLOAT_WGRAD_TILES, ids=str)
def test_every_float_wgrad_tile_is_right_to_the_last_rounding(tile, exact, kind):
    rng = np.random.default_rng(tile.cols)
    for c_in, c_out, rows in [(tile.rows - 4, 8, 63), (tile.rows, tile.cols, 500), (tile.rows + 4, tile.cols + 8, 290)]:
        x, g = adversarial(rng, (300, c_in), kind), adversarial(rng, (rows, c_out), "normal")
        table = random_table(rng, 3, 300, rows, 0.5, centre=True)
        dw = wgrad_gemm(x, g, table, [rows], F32, tile, 6, exact)

        def product(x, g, table=table):
            return np.einsum("kmi,mo->kio", rows_under_taps(x, table), g.astype(F64))

        read = (x, g) if exact else (truncated(x), truncated(g))
        assert_within_rounding(dw, product(*read), product(*map(np.abs, read)), rows)


@pytest.mark.parametrize(
    ("dtype", "tiles", "exact"),
    [
        (F16, [(128, 16, 4), (128, 32, 3), (64, 16, 4)], 0),
        (F32, [(64, 16, 4), (64, 32, 4), (128, 64, 3)], 0),
        (F32, [(64, 16, 4), (64, 48, 4), (128, 64, 3)], 1),
    ],
)
def test_scheduled_rows_do_not_depend_on_tile_mates_or_capacity(dtype, tiles, exact):
    rng = np.random.default_rng(1)
    count, volume = 150, 9
    x, w = rng.normal(size=(count, 24)).astype(dtype), rng.normal(size=(volume, 24, 16)).astype(dtype)
    table = random_table(rng, volume, count, count, 0.3)
    y = conv_gemm(x, w, table, [count], dtype, tiles[0], exact=exact)
    groups = Geometry.create(1, volume, 1).tap_groups
    assert conv_gemm(x, w, table, [count], dtype, tiles[1], groups, exact).tobytes() == y.tobytes()
    more = np.concatenate([table, np.full((volume, 90), -1, I32)], 1)
    padded = np.concatenate([x, np.full((90, 24), np.nan, dtype)])
    y_more = conv_gemm(padded, w, more, [count], dtype, tiles[2], groups, exact)
    assert y_more[:count].tobytes() == y.tobytes()
    assert y_more[count:].tobytes() == bytes(y_more[count:].nbytes)


def test_a_tile_that_was_not_built_is_refused():
    x, w, table = np.zeros((8, 8), F16), np.zeros((3, 8, 8), F16), np.zeros((3, 8), I32)
    with pytest.raises(Exception, match="conv_gemm_v1: no kernel was built for tile_rows 96, tile_cols 8, stages 2"):
        conv_gemm(x, w, table, [8], F16, (96, 8, 2))


# --- row sums ---


@pytest.mark.parametrize(("positions", "values"), [(1, 1), (500, 60), (300, 1000), (4097, 8)])
def test_inverted_index_lists_the_positions_of_each_value(positions, values):
    rng = np.random.default_rng(positions)
    index = rng.integers(-2, values + 2, positions).astype(I32)
    results = [((positions,), I32), ((values + 1,), I32), ((_workspace.invert_index(positions),), U8)]
    order, offsets, _ = call("invert_index", results, index)
    lists = [np.flatnonzero(index == v) for v in range(values)]
    listed = np.concatenate(lists)
    np.testing.assert_array_equal(order, np.concatenate([listed, np.full(positions - len(listed), -1)]))
    np.testing.assert_array_equal(offsets, np.cumsum([0, *map(len, lists)]))


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("channels", [1, 3, 64])
def test_segment_sum_adds_the_listed_rows(dtype, channels):
    """Groups of every length about those that a thread reads at once, a thread sums, and a warp reads at once."""
    rng = np.random.default_rng(channels)
    lengths = [0, 1, 2, 7, 8, 9, 16, 17, 31, 33, 63, 64, 65, 70, 255, 256, 257, 530, *rng.integers(0, 4, 32)]
    index = rng.permutation(np.concatenate([np.repeat(np.arange(50), lengths), np.full(30, -1)])).astype(I32)
    rows = len(index)
    results = [((rows,), I32), ((51,), I32), ((_workspace.invert_index(rows),), U8)]
    order, offsets, _ = call("invert_index", results, index)
    x = small_integers(rng, (rows, channels), dtype)
    x[index < 0] = np.nan
    with wide(dtype):
        (y,) = call("segment_sum", [((50, channels), dtype)], x, order, offsets)
    expected = np.stack([x[index == v].astype(F64).sum(0) for v in range(50)])
    np.testing.assert_array_equal(y.astype(F64), expected.astype(dtype).astype(F64))


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize(("rows", "count", "channels"), [(700, 650, 3), (4000, 3900, 24), (9, 5, 8), (40, 0, 16)])
def test_channel_sums_are_those_of_the_real_rows(dtype, rows, count, channels):
    rng = np.random.default_rng(rows)
    a, b = (small_integers(rng, (rows, channels), dtype) for _ in range(2))
    sums = F64 if dtype == F64 else F32
    center = rng.integers(-3, 3, channels).astype(sums)
    results = [((channels,), sums)] * 2 + [((_workspace.moments(channels, np.dtype(sums).itemsize),), U8)]
    a[count:] = b[count:] = np.nan
    counts, real = np.array([count], I32), slice(count)
    with wide(dtype):
        total, product, _ = call("channel_moments", results, a, b, center, counts)
        mean, squares, _ = call("channel_statistics", results, a + dtype(100), counts)
    np.testing.assert_array_equal(total, b[real].astype(F64).sum(0))
    np.testing.assert_array_equal(product, ((a[real].astype(F64) - center) * b[real].astype(F64)).sum(0))
    shifted = (a + dtype(100))[real].astype(F64)
    expected = shifted.mean(0) if count else np.zeros(channels)
    np.testing.assert_allclose(mean, expected, rtol=1e-6)
    np.testing.assert_allclose(squares, ((shifted - expected) ** 2).sum(0), rtol=2e-6, atol=1e-9)


# --- refusals ---


def test_errors_name_the_call_and_the_shapes():
    coords, count = np.zeros((8, 4), I32), np.array([8], I32)
    results = [*unique_results(8, 8, 3)[:-1], ((64,), U8)]
    with pytest.raises(Exception, match=r"unique_sites_v1: offsets must have size 10 on axis 0.*coords int32 \[8, 4\]"):
        call("unique_sites", [((9, 4), I32), *results[1:]], coords, count)
    with pytest.raises(Exception, match=r"unique_sites_v1: workspace has 64 bytes, needs \d+"):
        call("unique_sites", results, coords, count)
    x, w, table = np.zeros((8, 4), F32), np.zeros((3, 5, 2), F32), np.zeros((3, 8), I32)
    with pytest.raises(Exception, match=r"conv_forward_v1: w must have size 4 on axis 1.*w float32 \[3, 5, 2\]"):
        forward(x, w, table, [8], F32)
    x, w, table = np.zeros((8, 8), F16), np.zeros((3, 8, 8), F16), np.zeros((3, 8), I32)
    scale = {"scale": np.zeros(9, F16)}
    with pytest.raises(Exception, match=r"conv_fused_v1: scale must have size 8 on axis 0.*scale float16 \[9\]"):
        conv_fused(x, w, table, [8], FORWARD_TILES[0], (), scale, None, 0, 0.0)
