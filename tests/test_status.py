"""Bad input that only values tell: carried in `status` by every later op, raised by `check` with value and remedy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import raises
from flax import nnx
from scenes import random_tensor

import jaxsparse as js
from jaxsparse import status
from jaxsparse.status import Problem

RNGS = nnx.Rngs(0)
POINTS = np.random.default_rng(0).uniform(-3, 3, (50, 3)).astype(np.float32)


def tensor(rows, features=4, **kwargs):
    coords = np.asarray(rows, np.int32)
    return js.SparseTensor(coords, jnp.ones((len(coords), features)), **kwargs)


def test_coordinate_outside_the_key_range():
    x = tensor([[0, 0, 0, 0], [0, 131_072, 0, 0]])
    with raises(js.SiteError, "1 rows have a coordinate outside [-131072, 131072)", "origin"):
        x.check()
    tensor([[0, 131_071, -131_072, 0]]).check()


def test_duplicate_sites():
    with raises(js.SiteError, "`coords`", "2 rows whose site another row has already", "jaxsparse.voxelize"):
        tensor([[0, 1, 1, 1], [0, 1, 1, 1], [0, 2, 1, 1], [0, 1, 1, 1]]).check()


@pytest.mark.parametrize(("batch", "batch_size"), [(-1, None), (-1, 2), (2, 2), (1023, None)])
def test_batch_index_out_of_range(batch, batch_size):
    x = tensor([[0, 0, 0, 0], [batch, 0, 0, 0]], batch_size=batch_size)
    with raises(js.SiteError, "1 rows have a batch index", f"[0, {batch_size or 1023})", "`batch_size`"):
        x.check()


def test_sites_outside_bounds():
    with raises(js.SiteError, "1 rows of `coords` lie outside `bounds`"):
        tensor([[0, 0, 0, 0], [0, 4, 0, 0]], bounds=(4, 4, 4)).check()


def test_count_out_of_range():
    with raises(js.SiteError, "`count` (=5)", "[0, 2]"):
        tensor([[0, 0, 0, 0], [0, 1, 0, 0]], count=5).check()
    with raises(js.SiteError, "`count` (=2147483647)", "[0, 2]"):
        tensor([[0, 0, 0, 0], [0, 1, 0, 0]], count=jnp.uint32(2**32 - 1)).check()
    with jax.enable_x64(True), raises(js.SiteError, "`count` (=2147483647)", "[0, 2]"):
        tensor([[0, 0, 0, 0], [0, 1, 0, 0]], count=jnp.int64(2**32 + 1)).check()


def test_voxelize_overflow():
    x, index = js.voxelize(POINTS, POINTS, 0.5, capacity=8)
    found = len(np.unique(np.floor(POINTS * np.float32(2)), axis=0))
    with raises(js.SiteError, f"voxelize: {found} voxels", "`capacity` (=8)", f"at least {found}"):
        x.check()
    assert (index < 8).all()
    assert int(x.count) == 8


def test_strided_layer_overflow_is_carried_through_later_layers():
    x = random_tensor(0, rows=60)
    down = js.nn.SparseConv(3, 4, 3, strides=2, capacity=10, rngs=RNGS)
    conv = js.nn.SubMConv(4, 3, 3, rngs=RNGS)
    up = js.nn.SparseConvTranspose(3, 3, 3, strides=2, rngs=RNGS)

    @jax.jit
    def run(x):
        return js.ops.relu(up(conv(down(x)), like=x) + x)

    y = run(x)
    with raises(js.SiteError, "grid with stride (2, 2, 2)", "capacity (=10)", "jaxsparse.capacities"):
        y.check()
    x.check()
    assert np.isfinite(y.feats).all()


def test_non_finite_points():
    points = POINTS.copy()
    points[3] = np.nan
    points[5, 1] = np.inf
    x, index = js.voxelize(points, points, 0.5, capacity=64)
    with raises(js.SiteError, "2 rows of `points` are not finite", "`count`"):
        x.check()
    assert index[3] == -1
    assert index[5] == -1
    assert np.isfinite(x.feats).all()


def test_point_outside_the_key_range():
    points = POINTS.copy()
    points[0] = 1e9
    with raises(js.SiteError, "1 rows have a coordinate outside"):
        js.voxelize(points, points, 0.5, capacity=64)[0].check()


def test_point_with_a_wrong_batch_index():
    batch = jnp.zeros(50, jnp.int32).at[0].set(2).at[1].set(-1)
    x, index = js.voxelize(POINTS, POINTS, 0.5, capacity=64, batch=batch, batch_size=2)
    with raises(js.SiteError, "2 rows", "batch index", "[0, 2)"):
        x.check()
    assert (index[:2] == -1).all()


def test_unequal_sites_in_an_addition():
    x, y = tensor([[0, 0, 0, 0], [0, 1, 0, 0]]), tensor([[0, 0, 0, 0], [0, 2, 0, 0]])
    for joined in (x + y, js.ops.concatenate([x, y])):
        with raises(js.SiteError, "1 rows of the two tensors have different sites"):
            joined.check()
    (x + tensor([[0, 0, 0, 0], [0, 1, 0, 0]])).check()


def test_dense_overflow():
    with raises(js.SiteError, "from_dense: 27 nonzero sites", "`capacity` (=4)"):
        js.SparseTensor.from_dense(jnp.ones((1, 3, 3, 3, 2)), capacity=4).check()


def test_first_problem_is_the_one_reported():
    x = tensor([[0, 1, 1, 1], [0, 1, 1, 1], [5, 2, 1, 1]], batch_size=2)
    y = js.nn.SparseConv(4, 4, 3, strides=2, capacity=1, rngs=RNGS)(x)
    with raises(js.SiteError, "batch index"):
        y.check()


def test_coarse_sites_without_a_key_are_reported():
    x = tensor([[0, 131_071, 0, 0], [0, 0, 0, 0]])
    y = js.ops.conv(x, jnp.ones((1, 4, 4)), kernel_size=1, padding=1, sites="reachable")
    with raises(js.SiteError, "1 rows have a coordinate outside [-131072, 131072)"):
        y.check()
    assert int(y.count) == 1


def test_scenes_of_a_batch_that_are_none():
    good, bad = tensor([[0, 0, 0, 0]]), tensor([[0, 1, 0, 0], [1, 1, 0, 0]])
    with raises(js.SiteError, "1 rows have a batch index", "[0, 1)"):
        js.collate([good, bad]).check()
    with raises(js.SiteError, "another row has already"):
        js.collate([good, tensor([[0, 0, 0, 0]] * 2)]).check()


def test_a_report_outlives_every_op():
    bad = tensor([[0, 0, 0, 0], [0, 0, 0, 0]])
    good = tensor([[0, 0, 0, 0], [0, 1, 0, 0]])
    kernel = jnp.ones((27, 4, 4))
    down = js.ops.conv(bad, kernel, kernel_size=3, strides=2, sites="reachable")
    results = [
        bad.with_feats(bad.feats),
        bad.astype(jnp.bfloat16),
        js.ops.conv(bad, kernel, kernel_size=3),
        js.ops.conv(bad, kernel, kernel_size=3, sites=good.sites),
        down,
        js.ops.conv_transpose(down, kernel, like=good, kernel_size=3, strides=2),
        js.ops.concatenate([good, bad]),
        js.nn.BatchNorm(4, rngs=RNGS)(bad),
        js.nn.Linear(4, 4, rngs=RNGS)(bad),
        jax.jit(js.ops.relu)(bad),
        jax.tree.map(lambda leaf: leaf, bad),
    ]
    for y in results:
        with raises(js.SiteError, "1 rows whose site another row has already"):
            y.check()
    good.check()


def test_status_of_a_batch_of_scenes_names_the_first_problem():
    scenes = [tensor([[0, 0, 0, 0], [0, i, 0, 0]]) for i in (1, 0)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *scenes)
    y = jax.vmap(js.ops.relu)(batch)
    with raises(js.SiteError, "1 rows whose site another row has already"):
        y.check()


def test_the_first_of_several_reports_is_kept():
    fine = jnp.zeros(7, jnp.int32)
    count = status.report(Problem.COUNT, jnp.array(True), 7, 5)
    range_ = status.report(Problem.COORDINATE_RANGE, jnp.array(True), 1, 8)
    sites = status.report(Problem.SITES_CAPACITY, jnp.array(True), 9, 4, (2, 4))
    assert status.report(Problem.COUNT, jnp.array(False), 7, 5).tolist() == fine.tolist()
    for first, order in [
        (count, (fine, count, range_, sites)),
        (range_, (range_, count, fine)),
        (sites, (fine, fine, sites, count)),
        (count, (count,)),
        (fine, (fine, fine)),
    ]:
        assert status.merge(*order).tolist() == first.tolist()
    assert "9 sites of the grid with stride (2, 4)" in status.message(np.asarray(sites))
    assert status.message(np.asarray(fine)) is None


def test_every_problem_has_words():
    for problem in Problem:
        text = status.message(np.array([problem, 12, 34, 2, 2, 2, 0]))
        assert "12" in text
