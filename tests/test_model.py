"""SparseResUNet42: its layers, its maps, and scenes of every size."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scenes import quick_rngs, random_tensor

import jaxsparse as js
from jaxsparse import _coords


@pytest.fixture(scope="module")
def net():
    return js.models.SparseResUNet42(4, num_classes=5, width=0.125, rngs=quick_rngs())


def train_step(net):
    """A function of (parameters, input) that returns the gradient, the status and the new statistics."""
    graph, params, rest = nnx.split(net, nnx.Param, ...)

    def step(params, x):
        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            y = model(x)
            return (y.feats**2).sum() / jnp.maximum(y.count, 1).astype(y.dtype), (
                y.status,
                nnx.state(model, nnx.BatchStat),
            )

        return jax.value_and_grad(loss, has_aux=True)(params)

    return step, params


def calls(text, target):
    return len(re.findall(rf'custom_call_target="jaxsparse_{target}_v1"', text))


def test_training_step_builds_nine_maps(net):
    x = random_tensor(0, rows=60, features=4, capacity=64)
    step, params = train_step(net)
    text = jax.jit(step).lower(params, x).compile().as_text()
    assert calls(text, "kernel_map") == 9
    if jax.default_backend() == "cpu":
        assert calls(text, "coarse_sites") == 4
        assert calls(text, "site_index") == 5
        assert calls(text, "reverse_table") == 4  # the other five maps are their own reverse
        assert calls(text, "conv_forward") == 42 + 41  # forward, and dgrad of all but the first layer
        assert calls(text, "conv_wgrad") == 42


def test_eager_execution_builds_nine_maps(net, monkeypatch):
    built = []
    build = _coords.kernel_map

    def count(*operands, **params):
        built.append(params["geometry"])
        return build(*operands, **params)

    monkeypatch.setattr(_coords, "kernel_map", count)
    x = random_tensor(0, rows=60, features=4)
    net(x)
    assert len(built) == 9
    assert sorted(g.kernel[0] for g in built) == [2] * 4 + [3] * 5


def test_layers_are_those_of_the_benchmark():
    net = js.models.SparseResUNet42(4, rngs=quick_rngs())
    layers = [
        m
        for _, m in nnx.iter_graph(net)
        if isinstance(m, js.nn.SubMConv | js.nn.SparseConv | js.nn.SparseConvTranspose)
    ]
    assert len(layers) == 49
    assert all(layer.bias is None for layer in layers)
    assert sum(layer.kernel_size == (1, 1, 1) for layer in layers) == 7
    assert sum(isinstance(layer, js.nn.SparseConv) for layer in layers) == 4
    assert sum(isinstance(layer, js.nn.SparseInverseConv) for layer in layers) == 4
    assert [stage.conv.out_features for stage in net.down] == [32, 32, 64, 128]
    assert [stage.conv.out_features for stage in net.up] == [256, 128, 96, 96]
    assert net.head is None
    net.eval()
    shapes = jax.eval_shape(lambda x: net(x).feats, random_tensor(0, rows=20, features=4, capacity=20))
    assert shapes.shape == (20, 96)


def test_width_and_head_set_the_output():
    net = js.models.SparseResUNet42(7, num_classes=19, width=0.25, rngs=quick_rngs())
    assert net.head.kernel.shape == (24, 19)
    assert net.stem.layers[0].conv.kernel.shape == (27, 7, 8)


def test_empty_scene_trains_without_nan(net):
    empty = js.SparseTensor(jnp.zeros((0, 4), jnp.int32), jnp.zeros((0, 4)))
    step, params = train_step(net)
    (loss, (status, statistics)), gradient = jax.jit(step)(params, empty)
    js.status.check(status)
    assert loss == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    before = nnx.state(net, nnx.BatchStat)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(statistics), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bfloat16_keeps_parameters_and_statistics_in_float32():
    net = js.models.SparseResUNet42(4, num_classes=5, width=0.125, dtype=jnp.bfloat16, rngs=quick_rngs())
    exact = js.models.SparseResUNet42(4, num_classes=5, width=0.125, rngs=quick_rngs())
    x = random_tensor(0, rows=60, features=4)
    net.eval(), exact.eval()
    y = net(x)
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(net)))
    expected = np.asarray(exact(x).feats)
    assert np.abs(np.asarray(y.feats, np.float32) - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("dims", [2, 4])
def test_other_dimensions_run(dims):
    net = js.models.SparseResUNet42(3, width=0.0625, dims=dims, rngs=quick_rngs())
    net.eval()
    x = random_tensor(0, rows=30, dims=dims)
    y = jax.jit(lambda x: net(x))(x).check()
    assert np.isfinite(y.feats).all()


def test_one_compilation_serves_all_scenes_of_a_capacity(net):
    traces = []
    net.eval()

    @jax.jit
    def forward(points, count):
        traces.append(None)
        x, _ = js.voxelize(points, jnp.ones((points.shape[0], 4)), 0.5, capacity=200, count=count)
        return net(x)

    rng = np.random.default_rng(0)
    for count in (0, 1, 77, 200):
        y = forward(rng.normal(size=(200, 3)).astype(np.float32), count).check()
        assert int(y.count) <= count
    assert len(traces) == 1


def grid_coords(rows):
    """Distinct sites of a flat square of `rows` cells."""
    side = int(np.ceil(np.sqrt(max(rows, 1))))
    at = np.arange(rows)
    return np.stack([np.zeros(rows, int), at // side, at % side, np.zeros(rows, int)], 1).astype(np.int32)


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 2_000_000])
def test_scene_of_any_size_runs_through_one_layer(rows):
    coords = grid_coords(rows)
    feats = jnp.asarray(np.random.default_rng(0).normal(size=(rows, 4)), jnp.float32)
    conv = js.nn.SubMConv(4, 4, 3, use_bias=False, precision="highest", rngs=nnx.Rngs(0))
    x = js.SparseTensor(coords, feats)

    @jax.jit
    def run(kernel, feats):
        def loss(kernel, feats):
            y = js.ops.conv(x.with_feats(feats), kernel, kernel_size=3, precision="highest")
            return (y.feats**2).sum(), y.feats

        return jax.grad(loss, (0, 1), has_aux=True)(kernel, feats)

    (kernel_bar, feats_bar), y = run(conv.kernel[...], x.feats)
    x.check()
    if rows == 0:
        assert (kernel_bar == 0).all()
        return
    # The sites fill a square: a dense convolution in numpy on the rows of a window in its middle, and at its corner.
    side = int(np.ceil(np.sqrt(rows)))
    weights = np.asarray(conv.kernel[...], np.float64).reshape(3, 3, 3, 4, 4)[:, :, 1]
    values = np.zeros((side + 2, side + 2, 4))
    values[coords[:, 1] + 1, coords[:, 2] + 1] = feats
    for m in {0, rows // 2, rows - 1}:
        i, j = coords[m, 1:3]
        expected = np.einsum("abc,abcd->d", values[i : i + 3, j : j + 3], weights)
        np.testing.assert_allclose(y[m], expected, rtol=1e-5, atol=1e-6)
    # <kernel_bar, kernel> and <feats_bar, feats> are both the derivative along a scaling: 2 * loss.
    twice = 2 * float((np.asarray(y, np.float64) ** 2).sum())
    np.testing.assert_allclose((np.asarray(kernel_bar, np.float64) * conv.kernel[...]).sum(), twice, rtol=1e-4)
    np.testing.assert_allclose((np.asarray(feats_bar, np.float64) * np.asarray(feats)).sum(), twice, rtol=1e-4)
