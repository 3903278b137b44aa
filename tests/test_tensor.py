"""Tensors, shared maps, dense forms, joined tensors, planned capacities."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scenes import pad_rows, quick_rngs, random_coords, random_tensor

import jaxsparse as js
from jaxsparse.geometry import Geometry

RNG = np.random.default_rng(0)


def test_padding_is_normalised_on_the_way_in():
    coords = random_coords(RNG, 20)
    n = len(coords)
    x = js.SparseTensor(pad_rows(coords, 30, 5), pad_rows(np.ones((n, 2), np.float32), 30, np.nan), count=n)
    assert (x.coords[n:] == -(2**31)).all()
    assert (x.feats[n:] == 0).all()
    assert x.capacity == 30
    x.check()


def test_tensor_is_a_frozen_pytree():
    x = random_tensor(0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        x.feats = 0
    y = jax.tree.map(lambda leaf: leaf, x)
    assert isinstance(y, js.SparseTensor)
    np.testing.assert_array_equal(y.feats, x.feats)
    assert jax.tree.structure(x) == jax.tree.structure(y)
    jax.tree.unflatten(jax.tree.structure(x), [None] * len(jax.tree.leaves(x)))  # jax does this with placeholders
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(x)]
    assert paths == [".sites.coords", ".sites.count", ".sites.status", ".feats"]
    z = jax.jit(lambda t: t.with_feats(t.feats * 2))(x)
    np.testing.assert_array_equal(z.feats, 2 * x.feats)
    assert z.stride == x.stride


def test_tensor_prints_its_facts_and_no_rows():
    x = js.SparseTensor(jnp.zeros((5, 4), jnp.int32), jnp.ones((5, 2)), count=1, bounds=(2, 2, 2))
    assert repr(x) == (
        "SparseTensor(float32[5, 2], count=1, stride=(1, 1, 1), batch_size=None, bounds=(2, 2, 2), order='any')"
    )
    assert "feats=None" in repr(jax.tree.map(lambda leaf: None, x))


def test_flax_tabulates_layers():
    with jax.numpy_rank_promotion("allow"):
        text = nnx.tabulate(js.nn.SubMConv(3, 4, 3, rngs=nnx.Rngs(0)), random_tensor(0))
    assert "coords" in text
    assert "kernel" in text


@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_tensor_is_pickled_and_copied_without_maps_and_parts(copied):
    x = random_tensor(0)
    x = js.ops.concatenate([x, x])
    js.kernel_map(x.sites, x.sites, 3)
    y = copied(x)
    assert not y.sites.same_as(x.sites)
    assert y.parts == (y.feats,)
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_array_equal(a, b)


def test_only_the_count_of_an_argument_is_copied():
    """A CUDA graph is then updated in one place where the next call passes another array."""
    net = js.models.SparseResNet21D(4, width=0.25, rngs=quick_rngs())
    net.eval()

    def voxels(points):
        return js.voxelize(points, jnp.ones((len(points), 4)), 1.0, capacity=60)[0]

    points = jnp.asarray(RNG.uniform(0, 9, (60, 3)), jnp.float32)
    outputs = [lambda x: net(x)[-1].feats, lambda points: net(voxels(points))[-1].feats]
    texts = [jax.jit(f).lower(x).as_text() for f, x in zip(outputs, (voxels(points), points), strict=True)]
    assert [text.count("optimization_barrier") for text in texts] == [1, 0]


def test_static_facts_survive_jit():
    plan = js.Capacities({(2, 2, 2): 64})
    coords, feats = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 1))
    x = js.SparseTensor(coords, feats, stride=2, batch_size=3, bounds=(4, 5, 6), capacities=plan)
    y = jax.jit(lambda t: t)(x)
    assert (y.stride, y.batch_size, y.bounds, y.sites.capacities) == ((2, 2, 2), 3, (4, 5, 6), plan)


# --- dense ---


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_dense_round_trip(dims):
    shape = (2, 5, 4, 3, 2)[: dims + 1]
    dense = RNG.normal(size=(*shape, 3)).astype(np.float32) * (RNG.random((*shape, 1)) < 0.4)
    x = js.SparseTensor.from_dense(dense, capacity=300).check()
    assert int(x.count) == (dense != 0).any(-1).sum()
    assert x.sites.order == "morton"
    np.testing.assert_array_equal(x.to_dense(), dense)


def test_sites_outside_the_dense_grid_are_left_out():
    coords = np.array([[0, 0, 0, 0], [0, -1, 0, 0], [0, 2, 0, 0], [3, 0, 0, 0]], np.int32)
    x = js.SparseTensor(coords, jnp.arange(1.0, 5.0)[:, None], batch_size=1, bounds=(2, 2, 2))
    expected = np.zeros((1, 2, 2, 2, 1))
    expected[0, 0, 0, 0] = 1
    np.testing.assert_array_equal(x.to_dense(), expected)


def test_bounds_clip_new_sites_as_a_dense_convolution_does():
    x = js.SparseTensor.from_dense(np.ones((1, 5, 5, 5, 1), np.float32), capacity=125)
    y = js.ops.conv(x, jnp.ones((27, 1, 1)), kernel_size=3, strides=2, sites="reachable").check()
    assert y.bounds == (3, 3, 3)
    assert int(y.count) == 27
    unbounded = js.SparseTensor(x.coords, x.feats)
    assert int(js.ops.conv(unbounded, jnp.ones((27, 1, 1)), kernel_size=3, strides=2, sites="reachable").count) == 27
    wide = js.ops.conv(x, jnp.ones((27, 1, 1)), kernel_size=3, strides=2, padding=0, sites="reachable", capacity=99)
    assert (wide.bounds, int(wide.count)) == ((2, 2, 2), 8)


# --- shared maps ---


def test_a_map_is_built_once_and_shared_by_layers_that_keep_sites():
    x = random_tensor(0)
    assert js.kernel_map(x.sites, x.sites, 3) is js.kernel_map(x.sites, x.sites, (3, 3, 3))
    assert js.kernel_map(x.sites, x.sites, 3) is not js.kernel_map(x.sites, x.sites, 3, dilation=2)
    y = js.ops.relu(js.nn.SubMConv(3, 4, 3, rngs=nnx.Rngs(0))(x))
    assert y.sites is x.sites
    reported = x.sites.with_status(x.status)
    assert js.kernel_map(reported, reported, 3) is js.kernel_map(x.sites, x.sites, 3)


def test_coarse_sites_are_made_once():
    x = random_tensor(0)
    geometry = Geometry.create(3, 2, 2)
    assert x.sites.coarse(geometry, "reachable") is x.sites.coarse(geometry, "reachable")
    assert x.sites.coarse(geometry, "floor") is x.sites.coarse(Geometry.create(3, 5, 2), "floor")


def test_shared_coarse_sites_carry_what_is_reported_later():
    x = random_tensor(0)
    other = js.SparseTensor(x.coords.at[0, 1].add(20), x.feats)
    down = js.nn.SparseConv(3, 4, 3, strides=2, rngs=nnx.Rngs(0))
    down(x).check()  # the coarse sites are made, and remembered, before anything is wrong
    y = down(x + other)
    with pytest.raises(js.SiteError, match="different sites"):
        y.check()
    assert y.sites.same_as(down(x).sites)
    down(x).check()


def test_maps_do_not_leak_between_traces():
    x = random_tensor(0)
    eager = js.kernel_map(x.sites, x.sites, 3)
    inside = []

    @jax.jit
    def table():  # x is closed over, so its memory is seen from inside the trace
        inside.append(js.kernel_map(x.sites, x.sites, 3))
        return js.kernel_map(x.sites, x.sites, 3).table

    np.testing.assert_array_equal(table(), eager.table)
    assert inside[0] is not eager
    np.testing.assert_array_equal(js.kernel_map(x.sites, x.sites, 3).table, eager.table)


# --- joined tensors ---


def test_addition_and_concatenation():
    x = random_tensor(0, capacity=80)
    y = x.with_feats(x.feats * 2)
    np.testing.assert_array_equal((x + y).feats, 3 * x.feats)
    assert (x + y).sites is x.sites
    both = js.ops.concatenate([x, y])
    np.testing.assert_array_equal(both.feats, np.concatenate([x.feats, y.feats], 1))


def test_a_problem_of_either_tensor_is_kept():
    coords = np.array([[0, 1, 1, 1], [0, 1, 1, 1]], np.int32)
    bad = js.SparseTensor(coords, jnp.ones((2, 1)))
    good = js.SparseTensor(coords, jnp.ones((2, 1)), batch_size=None)
    for joined in (bad + good, good + bad):
        with pytest.raises(js.SiteError, match="another row has already"):
            joined.check()


@pytest.mark.parametrize("capacity", [None, 150])
def test_collate_stacks_the_real_rows(capacity):
    scenes = [random_tensor(s, rows=20 + 9 * s, capacity=60, batches=1) for s in range(3)]
    batch = jax.jit(lambda t: js.collate(t, capacity))(scenes).check()
    coords, feats = batch.rows()
    expected = [np.asarray(x.coords)[: int(x.count)] + np.array([i, 0, 0, 0]) for i, x in enumerate(scenes)]
    np.testing.assert_array_equal(coords, np.concatenate(expected))
    np.testing.assert_array_equal(feats, np.concatenate([np.asarray(x.feats)[: int(x.count)] for x in scenes]))
    assert batch.batch_size == 3
    assert batch.capacity == (capacity or 180)
    with pytest.raises(js.SiteError, match=r"collate: .* `capacity` \(=30\)"):
        js.collate(scenes, 30).check()


def test_collate_adds_batch_sizes_and_keeps_the_order():
    rng = np.random.default_rng(0)
    plan = js.Capacities({(2, 2, 2): 99})

    def scene(points, batches):
        batch = jnp.asarray(rng.integers(0, batches, points), jnp.int32)
        xyz = rng.uniform(0, 4, (points, 3)).astype(np.float32)
        options = {"batch": batch, "batch_size": batches, "bounds": (4, 4, 4), "capacities": plan}
        return js.voxelize(xyz, xyz, 1.0, capacity=64 * batches, **options)[0].check()

    scenes = [scene(40, 2), scene(0, 1), scene(60, 3)]
    batch = js.collate(scenes, capacity=200).check()
    assert (batch.batch_size, batch.bounds, batch.sites.order, batch.sites.capacities) == (6, (4, 4, 4), "morton", plan)
    dense = [x.to_dense() for x in scenes]
    np.testing.assert_array_equal(batch.to_dense(), np.concatenate(dense))
    coords = np.asarray(batch.coords)
    resorted = js.voxelize(coords[:, 1:] + 0.5, batch.feats, 1.0, capacity=200, count=batch.count, batch=coords[:, 0])[
        0
    ]
    np.testing.assert_array_equal(batch.coords, resorted.check().coords)


def test_gradient_through_collate_reaches_each_scene():
    scenes = [random_tensor(s, rows=20, capacity=30) for s in range(2)]

    def loss(feats):
        batch = js.collate([x.with_feats(f) for x, f in zip(scenes, feats, strict=True)])
        return (batch.feats**3).sum()

    for x, gradient in zip(scenes, jax.grad(loss)([x.feats for x in scenes]), strict=True):
        np.testing.assert_allclose(gradient, 3 * x.feats**2, rtol=1e-6)


# --- planned capacities ---


class Down(nnx.Module):
    """Two strided layers: the second grid is known only once the first has room."""

    def __init__(self):
        self.first = js.nn.SparseConv(3, 3, 3, strides=2, rngs=nnx.Rngs(0))
        self.norm = js.nn.BatchNorm(3, rngs=nnx.Rngs(0))
        self.second = js.nn.SparseConv(3, 3, 3, strides=2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.second(self.norm(self.first(x)))


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: m.__call__], ids=["module", "function"])
def test_capacities_hold_what_the_samples_need(wrap):
    samples = [random_tensor(s, rows=60 + 20 * s, capacity=100, low=-30, high=31) for s in range(2)]
    net = Down()
    net.norm.use_running_average = True
    plan = js.capacities(wrap(net), samples, slack=1.0, multiple=1)
    most: dict = {}
    for x in samples:
        roomy = js.SparseTensor(
            dataclasses.replace(x.sites, capacities=js.Capacities({(2,) * 3: 999, (4,) * 3: 9999})), x.feats
        )
        first = net.first(roomy).check()
        second = net.second(net.norm(first)).check()
        for y in (first, second):
            most[y.stride] = max(most.get(y.stride, 0), int(y.count))
    assert dict(plan) == most
    assert most[(2, 2, 2)] > 200, "the samples must overflow the default, or this shows nothing"
    rounded = js.capacities(net, samples, slack=1.5, multiple=64)
    assert all(rounded[k] == -(-int(np.ceil(1.5 * v)) // 64) * 64 for k, v in most.items())
    x = samples[1]
    y = net(js.SparseTensor(dataclasses.replace(x.sites, capacities=plan), x.feats)).check()
    assert y.capacity == most[(4, 4, 4)]


def test_planning_leaves_the_model_as_it_is():
    net = Down()
    before = np.asarray(net.norm.mean[...])
    js.capacities(net, [random_tensor(0, low=-30, high=31)])
    np.testing.assert_array_equal(net.norm.mean[...], before)


@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit, nnx.remat, lambda f: lambda x: jax.lax.cond(True, f, f, x)])
def test_planning_hears_of_sites_made_in_inner_traces(wrap):
    net = Down()
    net.norm.use_running_average = True
    sample = random_tensor(0, rows=60, low=-30, high=31)
    plain = js.capacities(net, [sample], multiple=1)
    wrapped = wrap(lambda x: net.second(net.first(x)).feats)
    wrapped(sample)  # compiled before anyone listens
    assert js.capacities(wrapped, [sample], multiple=1) == plain
    assert set(plain) == {(2, 2, 2), (4, 4, 4)}


def test_planning_hears_of_a_tensor_made_anew_with_the_same_capacities():
    net, sample = Down(), random_tensor(0, rows=60, low=-30, high=31)
    net.eval()

    def anew(x):
        return net(js.SparseTensor(x.coords, x.feats, x.count, capacities=x.sites.capacities))

    assert js.capacities(anew, [sample], multiple=1) == js.capacities(net, [sample], multiple=1) != js.Capacities()


def test_planning_an_empty_scene_reserves_a_row():
    empty = js.SparseTensor(jnp.zeros((8, 4), jnp.int32), jnp.ones((8, 3)), count=0)
    assert dict(js.capacities(Down(), [empty], multiple=1)) == {(2, 2, 2): 2, (4, 4, 4): 2}


def test_capacities_are_hashable_and_compare_by_value():
    a, b = js.Capacities({(2, 2, 2): 5, (4, 4, 4): 3}), js.Capacities({(4, 4, 4): 3, (2, 2, 2): 5})
    assert a == b
    assert hash(a) == hash(b)
    assert len(a) == 2
    assert a[(2, 2, 2)] == 5
    assert a != js.Capacities()


def test_sites_that_are_replaced_share_no_maps():
    coords = np.int32([[0, x, y, 0] for x in range(3) for y in range(3)])
    x, kernel = js.SparseTensor(coords, np.ones((9, 1), np.float32)), jnp.ones((27, 1, 1))
    assert js.ops.conv(x, kernel, kernel_size=3).feats[4, 0] == 9
    apart = dataclasses.replace(x.sites, coords=x.coords * jnp.int32([[1, 3, 3, 3]]))
    assert js.ops.conv(js.SparseTensor(apart, x.feats), kernel, kernel_size=3).feats[4, 0] == 1
    assert x.sites.with_status(jnp.zeros(7, jnp.int32)).same_as(x.sites)
