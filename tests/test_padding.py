"""Results depend on the real rows alone: not on the capacity, not on what padding holds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scenes import pad_rows, quick_rngs, random_coords, random_kernel, random_tensor, row_error

import jaxsparse as js
from jaxsparse._keys import real_rows
from jaxsparse.geometry import Geometry
from jaxsparse.ops.conv import fused

RNG = np.random.default_rng(0)
COORDS = random_coords(RNG, 90, low=-3, high=4)
FEATS = RNG.normal(size=(len(COORDS), 6)).astype(np.float32)
CAPACITIES = [len(COORDS), int(1.3 * len(COORDS)), 4 * len(COORDS)]


def tensor(feats, capacity, poison=0.0):
    """The scene at a capacity, padding features set to `poison` behind the constructor's back."""
    padded = jnp.zeros((capacity, feats.shape[1]), feats.dtype).at[: len(feats)].set(feats)
    coords = jnp.zeros((capacity, 4), jnp.int32).at[: len(COORDS)].set(COORDS)
    x = js.SparseTensor(coords, padded, count=len(COORDS))
    poisoned = jnp.where(x.sites.is_real[:, None], x.feats, poison)
    return js.SparseTensor.tree_unflatten(None, (x.sites, poisoned))


def layers():
    """Every layer, as `(name, module, needs_like)` on 6 features."""
    rngs = nnx.Rngs(0)
    return {
        "SubMConv": js.nn.SubMConv(6, 5, 3, rngs=rngs),
        "SubMConv 1x1": js.nn.SubMConv(6, 5, 1, rngs=rngs),
        "SubMConv dilated": js.nn.SubMConv(6, 5, 3, dilation=2, use_bias=False, rngs=rngs),
        "SparseConv reachable": js.nn.SparseConv(6, 5, 3, strides=2, rngs=rngs),
        "SparseConv floor": js.nn.SparseConv(6, 5, 2, strides=2, sites="floor", rngs=rngs),
        "SparseConvTranspose": Up(rngs),
        "Linear": js.nn.Linear(6, 5, rngs=rngs),
        "BatchNorm": js.nn.BatchNorm(6, rngs=rngs),
        "BatchNorm running": js.nn.BatchNorm(6, use_running_average=True, rngs=rngs),
        "ReLU": js.nn.ReLU(),
        "LeakyReLU": js.nn.LeakyReLU(),
        "GELU": js.nn.GELU(),
        "SiLU": js.nn.SiLU(),
        "add": lambda x: x + x,
        "concatenate": lambda x: js.ops.concatenate([x, x]),
        "collate": lambda x: js.collate([x, x]),
    }


class Up(nnx.Module):
    """A strided layer and its transpose."""

    def __init__(self, rngs):
        self.down = js.nn.SparseConv(6, 4, 3, strides=2, rngs=rngs)
        self.up = js.nn.SparseConvTranspose(4, 5, 3, strides=2, rngs=rngs)

    def __call__(self, x):
        return self.up(self.down(x), like=x)


def value_and_gradients(layer, x, poison):
    """Real output rows, gradient rows of the features, gradients of the parameters, for a poisoned cotangent."""
    graph, params, rest = nnx.split(layer, nnx.Param, ...) if isinstance(layer, nnx.Module) else (None, None, None)

    def f(feats, params):
        model = layer if graph is None else nnx.merge(graph, params, rest, copy=True)
        y = model(js.SparseTensor.tree_unflatten(None, (x.sites, feats)))
        return y.feats, y.sites

    feats, vjp, sites = jax.vjp(f, x.feats, params, has_aux=True)
    n = int(sites.count)
    ramp = jnp.sin(jnp.arange(feats.size, dtype=feats.dtype)).reshape(feats.shape)
    cotangent = jnp.where(sites.is_real[:, None], ramp, poison)
    feats_bar, params_bar = vjp(cotangent)
    assert (feats[n:] == 0).all(), "padding rows of the result are not zero"
    return [feats[:n], feats_bar[: len(COORDS)], *jax.tree.leaves(params_bar)]


@pytest.mark.parametrize("name", list(layers()))
def test_nan_in_padding_of_inputs_and_cotangents_changes_nothing(name):
    layer = layers()[name]
    clean = value_and_gradients(layer, tensor(FEATS, CAPACITIES[1]), 0.0)
    poisoned = value_and_gradients(layer, tensor(FEATS, CAPACITIES[1], jnp.nan), jnp.nan)
    for a, b in zip(clean, poisoned, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)


def test_a_linear_map_masks_what_may_hold_anything_and_nothing_else():
    layer = js.nn.Linear(6, 5, use_bias=False, rngs=nnx.Rngs(0))
    x = tensor(FEATS, CAPACITIES[1])

    def unmasked(x):
        loss = jax.grad(lambda kernel: jnp.square(js.ops.linear(x, kernel).feats).sum())
        return str(jax.make_jaxpr(loss)(layer.kernel[...])).count("zero_padded=True")

    assert unmasked(x) == 0
    for masked in (x.with_feats(x.feats), js.ops.relu(x), js.ops.add(x, x)):
        assert unmasked(masked) == 2  # the product, and its derivative by the kernel
    assert not jax.tree.map(lambda a: a, masked).is_masked


def leave_padding(monkeypatch, left):
    """Has the fused ops leave a number on padding rows, as a kernel may that does not write them."""

    def leaving(op, rows):
        def run(*operands, **params):
            (y,) = op(*operands, **params)
            counts = fused._counts(operands[2 : 2 + rows], params.get("product", "linear"))
            return [jnp.where(real_rows(counts, len(y))[:, None], y, left.astype(y.dtype))]

        return run

    monkeypatch.setattr(fused, "op", leaving(fused.op, 4))
    monkeypatch.setattr(fused, "linear", leaving(fused.linear, 1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
@pytest.mark.parametrize("network", [js.models.SparseResUNet42, js.models.SparseResNet21D])
def test_what_the_kernels_leave_on_padding_rows_reaches_nothing(network, dtype, monkeypatch):
    """Results, and gradients with running statistics, for all parameters and for those of the last layers alone."""
    x = random_tensor(0, rows=300, capacity=400, features=3, dtype=dtype, low=-9, high=9)
    model = network(3, width=0.25, dtype=dtype, rngs=quick_rngs())
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)

    def outputs(leaves, feats):
        y = nnx.merge(graph, jax.tree.unflatten(tree, leaves), rest, copy=True)(x.with_feats(feats))
        return [t.feats for t in (y if isinstance(y, list) else [y])]

    def loss(moving, first):
        found = outputs([*leaves[:first], *moving], x.feats)
        return sum(jnp.square(feats.astype(jnp.float32)).sum() for feats in found)

    def every(leaves):
        grads = [jax.grad(loss)(leaves[first:], first) for first in (0, len(leaves) - 6)]
        return jax.tree.leaves((outputs(leaves, x.feats), grads))

    @jax.jit
    def leaving(leaves, left):
        leave_padding(monkeypatch, left)
        return every(leaves)

    expected = jax.jit(every)(leaves)
    with_nan, with_zero = leaving(leaves, jnp.nan), leaving(leaves, 0.0)
    for got, zero, want in zip(with_nan, with_zero, expected, strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_array_equal(got, zero)
        if jax.default_backend() == "cpu":  # on a GPU the other program's sums may have another order
            np.testing.assert_array_equal(got, want)


def products(kind, capacity, dtype, implementation):
    """Forward result and both gradients of one convolution at one capacity, real rows only."""
    geometry = Geometry.create(3, 3, 1 if kind == "submanifold" else 2)
    kernel = random_kernel(0, geometry, 6, 5, dtype)
    x = tensor(FEATS.astype(dtype), capacity)
    options = {"kernel_size": 3, "strides": geometry.stride, "implementation": implementation}

    def f(feats, kernel):
        if kind == "transposed":
            coarse = js.ops.conv(x, random_kernel(1, geometry, 6, 6, dtype), sites="reachable", capacity=700, **options)
            y = js.ops.conv_transpose(coarse, kernel, like=x, **options)
            return y.feats[: len(COORDS)]
        y = js.ops.conv(
            x.with_feats(feats), kernel, sites=kind, capacity=None if kind == "submanifold" else 700, **options
        )
        return y.feats[: len(COORDS)] if kind == "submanifold" else y.feats

    y, vjp = jax.vjp(f, x.feats, kernel)
    feats_bar, kernel_bar = vjp(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(dtype))
    return y, feats_bar[: len(COORDS)], kernel_bar


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["submanifold", "reachable", "floor", "transposed"])
def test_custom_calls_are_bitwise_equal_at_every_capacity(kind, dtype):
    exact, *others = [products(kind, capacity, dtype, "auto") for capacity in CAPACITIES]
    for other in others:
        for a, b in zip(exact, other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["submanifold", "reachable", "transposed"])
def test_plain_jax_agrees_at_every_capacity(kind):
    with jax.default_matmul_precision("highest"):  # float32 in full on a GPU too
        exact, *others = [products(kind, capacity, jnp.float32, "xla") for capacity in CAPACITIES]
    for other in others:
        for a, b in zip(exact, other, strict=True):
            assert row_error(b, a) < 1e-6


def test_whole_network_agrees_at_every_capacity():
    # A flat scene: the deepest grid then has rows enough for batch statistics that are well conditioned.
    rng = np.random.default_rng(0)
    coords = np.unique(rng.integers((0, -32, -32, -2), (1, 32, 32, 2), (1500, 4)), axis=0).astype(np.int32)
    feats = rng.normal(size=(len(coords), 4)).astype(np.float32)
    net = js.models.SparseResUNet42(4, num_classes=3, width=0.125, rngs=quick_rngs())
    graph, params, rest = nnx.split(net, nnx.Param, ...)

    @jax.jit
    def run(params, x):
        def loss(params):
            with jax.default_matmul_precision("highest"):  # float32 in full on a GPU too
                y = nnx.merge(graph, params, rest, copy=True)(x)
            return (y.feats**2).sum(), y.feats[: len(coords)]

        return jax.grad(loss, has_aux=True)(params)

    def at(capacity):
        return js.SparseTensor(pad_rows(coords, capacity, 5), pad_rows(feats, capacity, np.nan), count=len(coords))

    exact, *others = [run(params, at(int(scale * len(coords)))) for scale in (1, 1.3, 4)]
    for gradient, logits in others:
        assert row_error(logits, exact[1]) < 1e-6
        ours, theirs = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)]) for g in (gradient, exact[0]))
        assert np.abs(ours - theirs).max() < 1e-6 * np.linalg.norm(theirs)


@pytest.mark.parametrize("count", [0, len(COORDS)])
def test_gradients_of_what_a_function_of_features_closes_over(count):
    """At zeros, which padding held once, these have no derivative; what a caller's pytree holds there is no matter."""
    x = tensor(FEATS, 4 * len(COORDS))
    x = js.SparseTensor(x.coords, x.feats, count=count)
    *leaves, feats = jax.tree.leaves(x)
    x = jax.tree.unflatten(jax.tree.structure(x), [*leaves, feats.at[count:].set(jnp.nan)])

    def loss(w, x):
        def fn(f):
            y = jnp.abs(f) @ jnp.abs(w)
            return jnp.sqrt(y) + y / jnp.linalg.norm(y, axis=1, keepdims=True)

        return js.ops.map_features(fn, x).feats.sum()

    w = jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)
    found = jax.grad(loss, (0, 1), allow_int=True)(w, x)
    exact = jax.grad(loss)(w, js.SparseTensor(COORDS, FEATS)) if count else jnp.zeros_like(w)
    np.testing.assert_allclose(found[0], exact, rtol=1e-5)
    assert (found[1].feats[count:] == 0).all()
