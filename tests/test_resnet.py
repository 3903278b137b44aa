"""SparseResNet21D: its layers, sites and maps, its output and gradients against dense convolution in float64."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from scenes import on_cpu, pad_rows, quick_rngs, random_tensor, row_error

import jaxsparse as js
from jaxsparse import _coords

STRIDES = [(1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8), (8, 16, 8)]


@pytest.fixture(scope="module")
def net():
    return js.models.SparseResNet21D(4, width=0.25, rngs=quick_rngs())


@pytest.fixture(scope="module")
def scene():
    """Coordinates and features of two slabs, so that the last grid still has rows enough for batch statistics."""
    rng = np.random.default_rng(0)
    coords = np.unique(rng.integers((0, -16, -16, -1), (2, 16, 16, 1), (1500, 4)), axis=0).astype(np.int32)
    rng.shuffle(coords)
    return coords, rng.normal(size=(len(coords), 4)).astype(np.float32)


def padded_tensor(coords, feats, capacity):
    """The scene with NaN on the rows after it."""
    return js.SparseTensor(pad_rows(coords, capacity, 5), pad_rows(feats, capacity, np.nan), count=len(coords))


@pytest.fixture(scope="module")
def padded(net, scene):
    """The scene with padding rows, the training step compiled for it, and the parameters."""
    x = padded_tensor(*scene, capacity=2048)
    step, params = train_step(net)
    return x, step.lower(params, x).compile(), params


def forward(net):
    """A function of the input that returns the outputs and leaves the running statistics alone."""
    graph, state = nnx.split(net)
    return jax.jit(lambda x: nnx.merge(graph, state, copy=True)(x))


def train_step(net):
    """A function of (parameters, input) that returns loss, outputs, new statistics and the gradient; parameters."""
    graph, params, rest = nnx.split(net, nnx.Param, ...)

    @jax.jit
    def step(params, x):
        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            with jax.default_matmul_precision("highest"):  # float32 in full on a GPU too
                outputs = model(x)
            total = sum((y.feats**2).sum() / jnp.maximum(y.count, 1).astype(y.dtype) for y in outputs)
            return total, (outputs, nnx.state(model, nnx.BatchStat))

        return jax.value_and_grad(loss, has_aux=True)(params)

    return step, params


def convolutions(net):
    return [m for _, m in nnx.iter_graph(net) if isinstance(m, js.nn.SubMConv | js.nn.SparseConv)]


def test_layers_are_those_of_the_benchmark():
    net = nnx.eval_shape(lambda: js.models.SparseResNet21D(4, rngs=quick_rngs()))
    layers = convolutions(net)
    assert len(layers) == 21
    assert all(layer.bias is None for layer in layers)
    first = [stage.layers[0].conv for stage in net.stages]
    assert [conv.out_features for conv in first] == [16, 32, 64, 128, 128]
    assert [conv.kernel_size for conv in first] == [(3, 3, 3)] * 4 + [(1, 3, 1)]
    assert [conv.padding for conv in first] == [(1, 1, 1)] * 4 + [(0, 1, 0)]
    assert [conv.strides for conv in first] == [(1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 1)]
    assert [isinstance(conv, js.nn.SparseConv) for conv in first] == [False, True, True, True, True]
    assert {conv.sites for conv in first[1:]} == {"reachable"}
    others = [layer for layer in layers if not any(layer is conv for conv in first)]
    assert {(type(layer), layer.kernel_size) for layer in others} == {(js.nn.SubMConv, (3, 3, 3))}
    assert [len(stage.layers) - 1 for stage in net.stages] == [2, 2, 2, 2, 0]


def test_every_stage_comes_out_on_its_grid(net):
    x = random_tensor(0, rows=60, features=4, capacity=64)
    outputs = jax.eval_shape(forward(net), x)
    assert [y.stride for y in outputs] == STRIDES
    assert [y.feats.shape for y in outputs] == [(64, 4), (128, 8), (256, 16), (512, 32), (1024, 32)]


def test_training_step_builds_eight_maps(padded):
    _, step, _ = padded
    text = step.as_text()

    def calls(target):
        return len(re.findall(rf'custom_call_target="jaxsparse_{target}_v1"', text))

    assert calls("kernel_map") == 8
    if jax.default_backend() == "cpu":
        assert calls("coarse_sites") == 4
        assert calls("site_index") == 4  # nothing reads the last grid
        assert calls("reverse_table") == 4  # the four submanifold maps are their own reverse
        assert calls("conv_forward") == 21 + 20  # forward, and dgrad of all but the first layer
        assert calls("conv_wgrad") == 21


def test_one_trace_builds_eight_maps(net, monkeypatch):
    built = []
    build = _coords.kernel_map

    def count(*operands, **params):
        built.append((params["geometry"].kernel, params["geometry"].stride))
        return build(*operands, **params)

    monkeypatch.setattr(_coords, "kernel_map", count)
    jax.eval_shape(forward(net), random_tensor(0, rows=60, features=4))
    three = (3, 3, 3)
    assert sorted(built) == [((1, 3, 1), (1, 2, 1))] + [(three, (1, 1, 1))] * 4 + [(three, (2, 2, 2))] * 3


def dense_stages(net, grid, active):
    """Features `[B, X, Y, Z, C]` and sites `[B, X, Y, Z, 1]` of every stage, in training, on whole grids."""

    def conv(x, kernel, layer):
        return lax.conv_general_dilated(
            x,
            kernel.reshape(*layer.kernel_size, *kernel.shape[1:]),
            window_strides=layer.strides,
            padding=[(k // 2, k // 2) for k in layer.kernel_size],
            dimension_numbers=("NXYZC", "XYZIO", "NXYZC"),
            precision=lax.Precision.HIGHEST,
        )

    def conv_norm(x, active, layer, norm):
        y, n = conv(x, layer.kernel[...], layer), active.sum()
        mean = (y * active).sum((0, 1, 2, 3), keepdims=True) / n
        var = ((y - mean) ** 2 * active).sum((0, 1, 2, 3), keepdims=True) / n
        scale, bias = (jnp.expand_dims(p[...], (0, 1, 2, 3)) for p in (norm.scale, norm.bias))
        return ((y - mean) / jnp.sqrt(var + 1e-5) * scale + bias) * active

    outputs = []
    for stage in net.stages:
        first, *blocks = stage.layers
        if isinstance(first.conv, js.nn.SparseConv):
            ones = jnp.ones((int(np.prod(first.conv.kernel_size)), 1, 1))
            reached = (conv(active, ones, first.conv) > 0).astype(active.dtype)
        else:
            reached = active
        grid, active = jax.nn.relu(conv_norm(grid, reached, first.conv, first.norm)), reached
        for block in blocks:
            y = jax.nn.relu(conv_norm(grid, active, block.conv1, block.norm1))
            grid = jax.nn.relu(conv_norm(y, active, block.conv2, block.norm2) + grid)
        outputs.append((grid, active))
    return outputs


def test_outputs_and_gradients_are_those_of_dense_float64(net, scene, x64):
    coords, feats = scene
    x = js.SparseTensor(coords, feats.astype(np.float64))
    plan = js.capacities(net, [x], slack=1, multiple=1)
    x = js.SparseTensor(coords, x.feats, capacities=plan)
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    (loss, (outputs, _)), gradient = train_step(nnx.merge(graph, params, rest))[0](params, x)
    outputs[-1].check()

    # The grid begins a whole number of the largest strides from zero and ends behind all that the sites reach.
    low, size = np.array([-16, -16, -8]), np.array([40, 48, 16])
    at = (coords[:, 0], *(coords[:, 1:] - low).T)
    grid = np.zeros((2, *size, 4))
    active = np.zeros((2, *size, 1))
    grid[at], active[at] = feats, 1

    def dense_loss(params):
        outputs = dense_stages(nnx.merge(graph, params, rest, copy=True), grid, active)
        return sum((y**2).sum() / active.sum() for y, active in outputs), outputs

    (dense_value, dense), dense_gradient = on_cpu(jax.jit(jax.value_and_grad(dense_loss, has_aux=True)), params)
    for y, stride, (expected, reached) in zip(outputs, STRIDES, dense, strict=True):
        assert y.stride == stride
        assert y.count == y.capacity == reached.sum()  # as planned
        sites = np.asarray(y.coords)[: int(y.count)]
        at = (sites[:, 0], *(sites[:, 1:] - low // stride).T)
        assert (np.asarray(reached)[at] == 1).all()
        assert row_error(np.asarray(y.feats)[: len(sites)], np.asarray(expected)[at]) < 1e-10
    np.testing.assert_allclose(loss, dense_value, rtol=1e-10)
    ours, theirs = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)]) for g in (gradient, dense_gradient))
    assert np.isfinite(ours).all()
    assert np.linalg.norm(ours - theirs) < 1e-9 * np.linalg.norm(theirs)


def test_padding_rows_never_change_real_rows(net, scene, padded):
    x, padded_step, params = padded

    def run(step, x):
        (_, (outputs, _)), gradient = step(params, x)
        outputs[-1].check()
        gradient = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
        return [np.asarray(y.feats)[: int(y.count)] for y in outputs], gradient

    found, gradient = run(padded_step, x)
    exact, exact_gradient = run(train_step(net)[0], js.SparseTensor(*scene))
    assert np.isfinite(exact_gradient).all()
    for y, expected in zip(found, exact, strict=True):
        assert y.shape == expected.shape
        assert row_error(y, expected) < 1e-6
    assert np.abs(gradient - exact_gradient).max() < 1e-6 * np.linalg.norm(exact_gradient)


def test_empty_scene_trains_without_nan(net, padded):
    x, step, params = padded
    empty = padded_tensor(np.zeros((0, 4), np.int32), np.zeros((0, 4), np.float32), x.capacity)
    (loss, (outputs, statistics)), gradient = step(params, empty)
    outputs[-1].check()
    assert loss == 0
    assert all(y.count == 0 for y in outputs)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    before = nnx.state(net, nnx.BatchStat)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(statistics), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bfloat16_keeps_parameters_and_statistics_in_float32():
    net = js.models.SparseResNet21D(4, width=0.25, dtype=jnp.bfloat16, rngs=quick_rngs())
    outputs = jax.eval_shape(forward(net), random_tensor(0, rows=60, features=4))
    assert {y.dtype for y in outputs} == {jnp.dtype(jnp.bfloat16)}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(net)))


def test_arguments_that_fit_no_network_are_refused(net):
    with pytest.raises(ValueError, match=r"`width` \(=0\) must be positive"):
        js.models.SparseResNet21D(4, width=0, rngs=quick_rngs())
    with pytest.raises(ValueError, match="made for 3 spatial axes, but x has 2"):
        net(random_tensor(0, rows=20, features=4, dims=2))
