"""Points to voxels and back, against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads
from scenes import pad_rows

import jaxsparse as js

REDUCTIONS = ["mean", "sum", "max", "first"]


def points_of(seed, number=120, dims=3, spread=3.0):
    rng = np.random.default_rng(seed)
    points = rng.uniform(-spread, spread, (number, dims)).astype(np.float32)
    return points, rng.normal(size=(number, 4)).astype(np.float32), rng.integers(0, 3, number).astype(np.int32)


def voxels_of(points, feats, size, reduce, batch=None, origin=0.0):
    """Voxel -> features, and the voxel of each point, in plain Python."""
    origin = np.float32(origin)
    inverse = np.float32(1 / np.asarray(size, np.float64))
    cells = np.floor((points - origin) * inverse).astype(int)
    batch = np.zeros(len(points), int) if batch is None else batch
    of_point = [(int(b), *map(int, c)) for b, c in zip(batch, cells, strict=True)]
    groups: dict = {}
    for voxel, row in zip(of_point, feats.astype(np.float64), strict=True):
        groups.setdefault(voxel, []).append(row)
    combine = {"mean": np.mean, "sum": np.sum, "max": np.max, "first": lambda rows, axis: rows[0]}[reduce]
    return {voxel: combine(rows, axis=0) for voxel, rows in groups.items()}, of_point


def check_voxels(x, index, expected, of_point, tolerance=1e-5):
    coords, feats = x.rows()
    rows = [tuple(map(int, c)) for c in coords]
    assert len(set(rows)) == len(rows)
    assert set(rows) == set(expected)
    for row, value in zip(rows, feats, strict=True):
        np.testing.assert_allclose(value.astype(np.float64), expected[row], rtol=tolerance, atol=tolerance)
    assert [rows[i] for i in np.asarray(index)[: len(of_point)]] == of_point


@given(
    st.integers(0, 2**16),
    st.integers(1, 4),
    st.sampled_from(REDUCTIONS),
    st.booleans(),
    st.sampled_from([0.5, 0.31, 1.0]),
)
def test_voxels_hold_the_points_inside_them(seed, dims, reduce, batched, size):
    points, feats, batch = points_of(seed, dims=dims)
    batch = batch if batched else None
    origin = np.linspace(-1, 1, dims).astype(np.float32)
    x, index = js.voxelize(points, feats, size, capacity=120, batch=batch, origin=origin, reduce=reduce)
    check_voxels(x, index, *voxels_of(points, feats, size, reduce, batch, origin))
    assert x.sites.order == "morton"


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_padding_points_never_count_and_counts_share_one_compilation(reduce, implementation):
    points, feats, _ = points_of(0)
    traces = []

    @jax.jit
    def run(points, feats, count):
        traces.append(None)
        return js.voxelize(points, feats, 0.5, capacity=200, count=count, reduce=reduce, implementation=implementation)

    for count in (120, 77, 1, 0):
        padded = pad_rows(points[:count], 160, np.nan), pad_rows(feats[:count], 160, np.nan)
        x, index = run(*padded, count)
        check_voxels(x, index, *voxels_of(points[:count], feats[:count], 0.5, reduce))
        assert (index[count:] == -1).all()
        assert (x.feats[int(x.count) :] == 0).all()
    assert len(traces) == 1


def test_anisotropic_voxels():
    points, feats, _ = points_of(1)
    x, index = js.voxelize(points, feats, (0.5, 1.0, 2.0), capacity=120)
    check_voxels(x, index, *voxels_of(points, feats, (0.5, 1.0, 2.0), "mean"))


@pytest.mark.parametrize("wide", [False, True], ids=["numpy", "x64"])
def test_float64_points_far_from_zero(wide):
    origin = np.array([5.4e6, -3e6, 100.0])
    points = origin + np.array([[0.12, 0.02, 0.0], [0.32, 0.07, 0.01]])
    with jax.enable_x64(wide):
        points = jnp.asarray(points) if wide else points
        x, _ = js.voxelize(points, np.ones((2, 1), np.float32), 0.05, capacity=4, origin=origin)
        assert x.check().coords[:2].tolist() == [[0, 2, 0, 0], [0, 6, 1, 0]]


def test_points_outside_bounds_are_left_out():
    points, feats, _ = points_of(2)
    x, index = js.voxelize(points, feats, 0.5, capacity=120, bounds=(4, 5, 6))
    cells = np.floor(points * np.float32(2)).astype(int)
    inside = ((cells >= 0) & (cells < [4, 5, 6])).all(1)
    assert inside.any()
    np.testing.assert_array_equal(np.asarray(index) >= 0, inside)
    kept = voxels_of(points[inside], feats[inside], 0.5, "mean")
    check_voxels(x, np.asarray(index)[inside], *kept)
    assert x.bounds == (4, 5, 6)


@pytest.mark.parametrize("dims", [2, 3, 4])
def test_voxels_reach_to_the_ends_of_the_key_range(dims):
    limit = {2: 2**23, 3: 2**17, 4: 2**13}[dims]
    ends = np.array([[-limit], [limit - 1]]) * np.ones(dims)
    x, index = js.voxelize(ends.astype(np.float32), jnp.ones((2, 1)), 1.0, capacity=4)
    np.testing.assert_array_equal(x.check().coords[:2, 1:], ends)
    np.testing.assert_array_equal(index, [0, 1])
    for beyond in (-limit - 1, limit):
        points = np.zeros((2, dims), np.float32)
        points[1, -1] = beyond
        y, index = js.voxelize(points, jnp.ones((2, 1)), 1.0, capacity=4)
        with pytest.raises(js.SiteError, match="1 rows have a coordinate outside"):
            y.check()
        np.testing.assert_array_equal(index, [0, -1])
        # Bounds say what is wanted: a far point is then left out like any other.
        js.voxelize(points, jnp.ones((2, 1)), 1.0, capacity=4, bounds=(4,) * dims)[0].check()


def test_the_largest_of_features_with_nan_is_nan():
    points, feats = np.zeros((3, 1), np.float32), np.array([[1, 5], [np.nan, 7], [3, 6]], np.float32)
    x, _ = js.voxelize(points, feats, 1.0, capacity=1, reduce="max")
    np.testing.assert_array_equal(x.feats, [[np.nan, 7]])


def test_equal_largest_features_send_the_gradient_to_the_first_point():
    points = np.array([[0.5], [0.1], [0.2], [1.5]], np.float32)

    def total(feats):
        return js.voxelize(points, feats, 1.0, capacity=2, reduce="max")[0].feats.sum()

    gradient = jax.grad(total)(jnp.array([[1.0], [3.0], [3.0], [-9.0]]))
    np.testing.assert_array_equal(gradient, [[0], [1], [0], [1]])


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_no_points_make_no_voxels(reduce):
    points, feats = np.zeros((0, 3), np.float32), jnp.zeros((0, 2))
    x, index = js.voxelize(points, feats, 1.0, capacity=4, reduce=reduce)
    assert int(x.check().count) == 0
    assert index.shape == (0,)
    assert js.devoxelize(x, index).shape == (0, 2)
    gradient = jax.grad(lambda f: js.devoxelize(f, index).sum())(jnp.ones((4, 2)))
    np.testing.assert_array_equal(gradient, np.zeros((4, 2)))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_nothing_in_padding_or_dropped_points_reaches_a_gradient(reduce):
    points, feats, _ = points_of(7, number=40)
    points[3], points[5] = np.inf, 1e9  # reported and dropped
    feats[[3, 5]] = np.nan

    def loss(feats):
        x, index = js.voxelize(points, feats, 0.5, capacity=40, count=30, reduce=reduce)
        return (js.devoxelize(x.with_feats(x.feats**2), index) ** 2).sum()

    poisoned = jax.grad(loss)(jnp.asarray(feats).at[30:].set(jnp.nan))
    clean = jax.grad(loss)(jnp.nan_to_num(feats).at[30:].set(0))
    np.testing.assert_array_equal(poisoned, clean)
    assert np.isfinite(poisoned).all()
    assert (poisoned[jnp.array([3, 5, 35])] == 0).all()


def test_compiled_and_eager_code_agree_on_every_voxel():
    rng = np.random.default_rng(0)
    # Many points lie on voxel edges, where the two would part if either were rewritten.
    points = (rng.integers(-4000, 4000, (20_000, 3)) * np.float32(0.05)).astype(np.float32)

    def run(points):
        return js.voxelize(points, points, 0.05, capacity=20_000, origin=(0.1, -70.0, 1e-3))[0].coords

    np.testing.assert_array_equal(run(points), jax.jit(run)(points))
    cells = np.floor(points * np.float32(1 / np.float64(0.05))).astype(int)
    assert int(js.voxelize(points, points, 0.05, capacity=20_000)[0].count) == len(np.unique(cells, axis=0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_features_of_16_bits_are_summed_in_float32(dtype):
    points, feats, _ = points_of(3, number=2000, spread=0.6)
    feats = jnp.asarray(feats, dtype)
    x, index = js.voxelize(points, feats, 0.5, capacity=120)
    assert x.dtype == dtype
    check_voxels(x, index, *voxels_of(points, np.asarray(feats), 0.5, "mean"), tolerance=float(jnp.finfo(dtype).eps))


def test_results_are_bitwise_repeatable():
    points, feats, _ = points_of(4, number=5000)
    run = jax.jit(lambda p, f: js.voxelize(p, f, 0.3, capacity=5000))
    first, index = run(points, feats)
    for _ in range(10):
        x, again = run(points, feats)
        np.testing.assert_array_equal(x.feats, first.feats)
        np.testing.assert_array_equal(again, index)


def test_overflow_keeps_the_first_voxels_in_morton_order():
    points, feats, _ = points_of(5)
    whole, _ = js.voxelize(points, feats, 0.5, capacity=120)
    part, index = js.voxelize(points, feats, 0.5, capacity=20)
    np.testing.assert_array_equal(part.coords, whole.coords[:20])
    np.testing.assert_array_equal(part.feats, whole.feats[:20])
    assert index.max() == 19
    with pytest.raises(js.SiteError):
        part.check()


@pytest.mark.usefixtures("x64")
def test_points_and_integers_of_64_bits_are_taken():
    points, feats, batch = points_of(8)
    x, index = js.voxelize(points.astype(np.float64), feats, 0.5, capacity=150, batch=batch.astype(np.int64), count=120)
    check_voxels(x, index, *voxels_of(points, feats, 0.5, "mean", batch))
    assert x.dtype == jnp.float32


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_features_are_differentiable_there_and_back(reduce, implementation):
    points, feats, _ = points_of(6, number=25, spread=1.0)
    feats = jnp.asarray(feats, jnp.float64)

    def there_and_back(feats):
        x, index = js.voxelize(points, feats, 0.7, capacity=30, reduce=reduce, implementation=implementation)
        return js.devoxelize(x.with_feats(x.feats**2), index, implementation=implementation)

    check_grads(there_and_back, (feats,), order=2)


def test_points_without_a_voxel_read_zero():
    feats = jnp.arange(6.0).reshape(3, 2) + 1
    index = jnp.array([2, -1, 0, 2], jnp.int32)
    np.testing.assert_array_equal(js.devoxelize(feats, index), [[5, 6], [0, 0], [1, 2], [5, 6]])


def test_vmap_over_scans():
    scans = [points_of(s) for s in range(3)]
    points, feats = (np.stack([s[i] for s in scans]) for i in (0, 1))
    batch, index = jax.vmap(lambda p, f: js.voxelize(p, f, 0.5, capacity=120))(points, feats)
    for i, (p, f, _) in enumerate(scans):
        x = jax.tree.map(lambda leaf, i=i: leaf[i], batch)
        check_voxels(x, index[i], *voxels_of(p, f, 0.5, "mean"))
