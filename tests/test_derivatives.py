"""Derivatives of every order and mode, batching and control flow, for every kind of convolution."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scenes import random_kernel, random_tensor

import jaxsparse as js
from jaxsparse.geometry import Geometry

pytestmark = pytest.mark.usefixtures("x64")

KINDS = ["submanifold", "reachable", "floor", "transposed", "pointwise"]


def make_conv(kind, implementation="auto", seed=0):
    """`f(feats, kernel) -> feats` with operands to call it on, for one kind of convolution."""
    x = random_tensor(seed, rows=30, capacity=36, dtype=jnp.float64, low=-2, high=3)
    if kind == "pointwise":
        kernel = random_kernel(seed, Geometry.create(3, 1), 3, 4, jnp.float64)
        return (lambda f, k: js.ops.conv(x.with_feats(f), k, kernel_size=1).feats), (x.feats, kernel)
    if kind == "submanifold":
        kernel = random_kernel(seed, Geometry.create(3, 3), 3, 4, jnp.float64)
        options = {"kernel_size": 3, "implementation": implementation}
        return (lambda f, k: js.ops.conv(x.with_feats(f), k, **options).feats), (x.feats, kernel)
    options = {"kernel_size": 3, "strides": 2, "implementation": implementation}
    kernel = random_kernel(seed, Geometry.create(3, 3), 3, 4, jnp.float64)
    sites = "floor" if kind == "floor" else "reachable"
    if kind != "transposed":
        return (lambda f, k: js.ops.conv(x.with_feats(f), k, sites=sites, capacity=160, **options).feats), (
            x.feats,
            kernel,
        )
    y = js.ops.conv(x, kernel, sites=sites, capacity=160, **options)
    back = random_kernel(seed + 1, Geometry.create(3, 3), 4, 3, jnp.float64)
    return (lambda f, k: js.ops.conv_transpose(y.with_feats(f), k, like=x, **options).feats), (y.feats, back)


@pytest.mark.parametrize("implementation", ["auto", "xla"])
@pytest.mark.parametrize("kind", KINDS)
def test_second_order_gradients_in_forward_and_reverse_mode(kind, implementation):
    f, operands = make_conv(kind, implementation)
    check_grads(f, operands, order=2, modes=("fwd", "rev"))


def test_third_order_derivative_of_a_nonlinear_composition():
    f, (feats, kernel) = make_conv("submanifold")
    check_grads(lambda s: jnp.sin(f(feats * s, kernel * s)).sum(), (0.3,), order=3, modes=("rev",))


@pytest.mark.parametrize("kind", KINDS[:4])
def test_forward_over_reverse_equals_reverse_over_reverse(kind):
    f, (feats, kernel) = make_conv(kind)

    def loss(scale):
        return (f(feats * scale[0], kernel * scale[1]) ** 3).sum()

    point = jnp.array([0.7, 1.3])
    hessian = jax.jacfwd(jax.grad(loss))(point)
    np.testing.assert_allclose(hessian, jax.jacrev(jax.grad(loss))(point), rtol=1e-10)
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS[:4])
def test_linear_transpose_is_the_adjoint(kind):
    f, (feats, kernel) = make_conv(kind)
    rng = np.random.default_rng(0)
    g = jnp.asarray(rng.normal(size=f(feats, kernel).shape))
    real = (f(feats, kernel) != 0).any(1, keepdims=True)
    g = jnp.where(real, g, 0)
    (feats_bar,) = jax.linear_transpose(lambda a: f(a, kernel), feats)(g)
    (kernel_bar,) = jax.linear_transpose(lambda b: f(feats, b), kernel)(g)
    value = (f(feats, kernel) * g).sum()
    np.testing.assert_allclose((feats * feats_bar).sum(), value, rtol=1e-12)
    np.testing.assert_allclose((kernel * kernel_bar).sum(), value, rtol=1e-12)


def count_calls(f, *operands):
    """Custom calls of each kind in the compiled program."""
    text = jax.jit(f).lower(*operands).compile().as_text()
    return {name: len(re.findall(rf'custom_call_target="{name}"', text)) for name in js._ffi.TARGETS}


def stacked_scenes(number=3):
    """Scenes with different sites and counts as one pytree with a leading axis, and a kernel."""
    scenes = [random_tensor(s, rows=20 + 5 * s, capacity=40, dtype=jnp.float64, low=-2, high=3) for s in range(number)]
    scenes = [js.SparseTensor(s.sites, s.feats) for s in scenes]
    kernel = random_kernel(0, Geometry.create(3, 3), 3, 4, jnp.float64)
    return scenes, jax.tree.map(lambda *leaves: jnp.stack(leaves), *scenes), kernel


def test_vmap_over_scenes_is_one_launch_forward_and_backward():
    scenes, batch, kernel = stacked_scenes()

    def f(x, kernel):
        return js.ops.conv(x, kernel, kernel_size=3).feats

    expected = jnp.stack([f(x, kernel) for x in scenes])
    np.testing.assert_allclose(jax.vmap(f, (0, None))(batch, kernel), expected, rtol=1e-12, atol=1e-12)
    assert count_calls(jax.vmap(f, (0, None)), batch, kernel)["jaxsparse_conv_forward_v1"] == 1

    maps = jax.vmap(lambda x: js.kernel_map(x.sites, x.sites, 3))(batch)

    def loss(feats, x, kernel, m):
        y = js.ops.conv(x.with_feats(feats), kernel, kernel_size=3, kernel_map=m)
        return (y.feats**2).sum()

    gradient = jax.vmap(jax.grad(loss), (0, 0, None, 0))
    calls = count_calls(gradient, batch.feats, batch, kernel, maps)
    assert calls["jaxsparse_conv_forward_v1"] == 2  # forward, and dgrad as a forward with the taps turned round
    assert calls["jaxsparse_reverse_table_v1"] == 0  # the map is its own reverse
    ours = gradient(batch.feats, batch, kernel, maps)
    for i, x in enumerate(scenes):
        m = js.kernel_map(x.sites, x.sites, 3)
        np.testing.assert_allclose(ours[i], jax.grad(loss)(x.feats, x, kernel, m), rtol=1e-11, atol=1e-11)


def test_vmap_over_scenes_sums_or_separates_weight_gradients():
    scenes, batch, kernel = stacked_scenes()

    def loss(kernel, x):
        return (js.ops.conv(x, kernel, kernel_size=3, strides=2, sites="reachable", capacity=200).feats ** 2).sum()

    each = jax.vmap(jax.grad(loss), (None, 0))(kernel, batch)
    for got, x in zip(each, scenes, strict=True):
        np.testing.assert_allclose(got, jax.grad(loss)(kernel, x), rtol=1e-10, atol=1e-10)
    total = jax.grad(lambda k: jax.vmap(loss, (None, 0))(k, batch).sum())(kernel)
    np.testing.assert_allclose(total, each.sum(0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("capacity", "coarse_capacity"), [(1, 1), (40, 1), (1, 8)])
def test_vmap_over_scenes_of_one_row(capacity, coarse_capacity):
    scenes = [random_tensor(s, rows=min(s, capacity), capacity=capacity, dtype=jnp.float64) for s in range(3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *scenes)
    kernel = random_kernel(0, Geometry.create(3, 3), 3, 4, jnp.float64)

    def f(feats, kernel, x):
        x = x.with_feats(feats)
        return js.ops.conv(x, kernel, kernel_size=3, strides=2, sites="reachable", capacity=coarse_capacity).feats

    def results(feats, kernel, x):
        return f(feats, kernel, x), *jax.grad(lambda *operands: (f(*operands, x) ** 2).sum(), (0, 1))(feats, kernel)

    ours = jax.vmap(results, (0, None, 0))(batch.feats, kernel, batch)
    for i, x in enumerate(scenes):
        for got, expected in zip(ours, results(x.feats, kernel, x), strict=True):
            np.testing.assert_allclose(got[i], expected, rtol=1e-11, atol=1e-11)


def test_vmap_over_weights():
    f, (feats, kernel) = make_conv("submanifold")
    kernels = jnp.stack([kernel, 2 * kernel, kernel**2])
    np.testing.assert_allclose(
        jax.vmap(f, (None, 0))(feats, kernels), jnp.stack([f(feats, k) for k in kernels]), rtol=1e-12
    )
    gradient = jax.vmap(jax.grad(lambda k: (f(feats, k) ** 2).sum()))(kernels)
    expected = jnp.stack([jax.grad(lambda k: (f(feats, k) ** 2).sum())(k) for k in kernels])
    np.testing.assert_allclose(gradient, expected, rtol=1e-11)


def residual_stack(x, kernels, kernel_map, wrap):
    """Layers `x + 0.1 tanh(conv(x, kernel))` over stacked kernels in a scan."""

    def body(feats, kernel):
        y = js.ops.conv(x.with_feats(feats), kernel, kernel_size=3, kernel_map=kernel_map)
        return feats + 0.1 * jnp.tanh(y.feats), None

    return jax.lax.scan(wrap(body), x.feats, kernels)[0]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["scan", "scan of checkpoint"])
@pytest.mark.parametrize("explicit", [True, False])
def test_scan_and_checkpoint_equal_a_loop(wrap, explicit):
    x = random_tensor(0, rows=40, capacity=44, dtype=jnp.float64)
    kernels = jnp.stack([random_kernel(s, Geometry.create(3, 3), 3, 3, jnp.float64) for s in range(3)])

    def scanned(kernels):
        kernel_map = js.kernel_map(x.sites, x.sites, 3) if explicit else None
        return (residual_stack(x, kernels, kernel_map, wrap) ** 2).sum()

    def looped(kernels):
        y = x
        for kernel in kernels:
            y = x.with_feats(y.feats + 0.1 * jnp.tanh(js.ops.conv(y, kernel, kernel_size=3).feats))
        return (y.feats**2).sum()

    ours, theirs = jax.jit(jax.value_and_grad(scanned))(kernels), jax.value_and_grad(looped)(kernels)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)
    if explicit:
        assert count_calls(jax.grad(scanned), kernels)["jaxsparse_kernel_map_v1"] == 1


def test_checkpoint_recomputes_and_agrees():
    f, (feats, kernel) = make_conv("reachable")
    plain = jax.grad(lambda k: (f(feats, k) ** 2).sum())(kernel)
    remat = jax.grad(jax.checkpoint(lambda k: (f(feats, k) ** 2).sum()))(kernel)
    np.testing.assert_allclose(remat, plain, rtol=1e-13)


def test_cond_takes_an_explicit_map():
    x = random_tensor(0, rows=40, dtype=jnp.float64)
    kernel = random_kernel(0, Geometry.create(3, 3), 3, 3, jnp.float64)
    kernel_map = js.kernel_map(x.sites, x.sites, 3)

    @jax.jit
    def f(flag, kernel):
        return jax.lax.cond(
            flag,
            lambda: js.ops.conv(x, kernel, kernel_size=3, kernel_map=kernel_map).feats,
            lambda: x.feats,
        )

    np.testing.assert_array_equal(f(False, kernel), x.feats)
    np.testing.assert_allclose(f(True, kernel), js.ops.conv(x, kernel, kernel_size=3).feats, rtol=1e-13)


def test_linearize_runs_the_tangent_alone():
    f, (feats, kernel) = make_conv("submanifold")
    _, tangent = jax.linearize(f, feats, kernel)
    expected = jax.jvp(f, (feats, kernel), (kernel[0, 0, 0] * feats, 2 * kernel))[1]
    np.testing.assert_allclose(tangent(kernel[0, 0, 0] * feats, 2 * kernel), expected, rtol=1e-12)
