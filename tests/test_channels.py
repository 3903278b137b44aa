"""Sums over rows and their adjoint, and the batch norm and ReLU made of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads
from scenes import quick_rngs, random_tensor

import jaxsparse as js
from jaxsparse.ops import channels
from jaxsparse.ops.normalize import _cotangent, _tangent, normalize
from jaxsparse.tensor import on_sites


def draw(seed, *shapes, dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def moments(a, b, center, counts, *gate):
    return channels._gated_moments(a, b, center, counts, gate)


def affine(x, scale, shift, center, counts, *gate):
    return channels._affine(x, scale, shift, center, counts, *gate, out_dtype=x.dtype)[0]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("count", [0, 1, 17, 20])
def test_moments_and_affine_are_adjoint(count):
    a, b, s, t, c = draw(count, (20, 3), (20, 3), (3,), (3,), (3,))
    counts = jnp.array([count], jnp.int32)
    total, product = moments(a, b, c, counts)
    real = np.arange(20)[:, None] < count
    np.testing.assert_allclose(total, np.where(real, b, 0).sum(0), atol=1e-12)
    np.testing.assert_allclose(product, np.where(real, (a - c[None]) * b, 0).sum(0), atol=1e-12)
    left = total @ t + product @ s
    np.testing.assert_allclose(left, (affine(a, s, t, c, counts) * b).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("is_own", [True, False])
def test_gated_moments_and_affine_are_adjoint(is_own):
    a, b, g, s, t, c, gate_s, gate_t = draw(0, *[(20, 3)] * 3, *[(3,)] * 5)
    counts = jnp.array([17], jnp.int32)
    gate = (a if is_own else g, gate_s, gate_t, c)
    is_open = (gate[0] - c[None]) * gate_s[None] + gate_t[None] > 0
    total, product = moments(a, b, c, counts, *gate)
    for got, want in zip((total, product), moments(a, jnp.where(is_open, b, 0), c, counts), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)
    mapped = affine(a, s, t, c, counts, *gate)
    np.testing.assert_array_equal(mapped, jnp.where(is_open, affine(a, s, t, c, counts), 0))
    np.testing.assert_allclose(total @ t + product @ s, (mapped * b).sum(), rtol=1e-12)
    check_grads(lambda a, b: moments(a, b, c, counts, g, gate_s, gate_t, c), (a, b), order=2)
    check_grads(lambda a, s, t: affine(a, s, t, c, counts, g, gate_s, gate_t, c), (a, s, t), order=2)


@pytest.mark.usefixtures("x64")
def test_relu_of_an_affine_map_is_relu_after_it():
    x, s, t, c = draw(1, (20, 3), (3,), (3,), (3,))
    x = x.at[3, 1].set(jnp.nan)
    counts = jnp.array([18], jnp.int32)

    def fused(x, s, t):
        return channels.affine(x, s, t, c, counts, relu=True)

    def apart(x, s, t):
        return jax.nn.relu(channels.affine(x, s, t, c, counts))

    np.testing.assert_array_equal(fused(x, s, t), apart(x, s, t))
    for of in (jax.jacfwd, jax.jacrev):
        clean = x.at[3, 1].set(1.0)
        for got, want in zip(of(fused, (0, 1, 2))(clean, s, t), of(apart, (0, 1, 2))(clean, s, t), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    check_grads(fused, (x.at[3, 1].set(1.0), s, t), order=3)


@pytest.mark.usefixtures("x64")
def test_derivatives_of_every_mode_and_order():
    a, b, s, t, c = draw(0, (9, 2), (9, 2), (2,), (2,), (2,))
    counts = jnp.array([7], jnp.int32)
    check_grads(lambda a, b: moments(a, b, c, counts), (a, b), order=3)
    check_grads(lambda x, s, t: affine(x, s, t, c, counts), (a, s, t), order=3)
    check_grads(lambda x: channels.statistics(x, counts), (a,), order=3)
    check_grads(lambda x: moments(x, x, c, counts), (a,), order=2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["forward", "reverse", "hessian"])
def test_batch_norm_has_the_derivatives_of_plain_jax(mode):
    x = random_tensor(0, rows=12, capacity=15, dtype=jnp.float64)
    scale, bias, weight = draw(1, (3,), (3,), x.feats.shape)

    def ours(feats):
        y = x.with_feats(feats * 2 + 30)
        mean, variance, _ = js.ops.batch_statistics(y)
        return (js.ops.relu(js.ops.batch_norm(y, mean, variance, scale, bias)).feats * weight).sum()

    def plain(feats):
        rows = feats[: int(x.count)] * 2 + 30
        y = (rows - rows.mean(0)[None]) / jnp.sqrt(rows.var(0) + 1e-5)[None] * scale[None] + bias[None]
        return (jnp.maximum(y, 0) * weight[: len(rows)]).sum()

    of = {"forward": jax.jacfwd, "reverse": jax.jacrev, "hessian": jax.hessian}[mode]
    np.testing.assert_allclose(of(ours)(x.feats), of(plain)(x.feats), rtol=1e-8, atol=1e-9)


def test_padding_reaches_nothing():
    x = random_tensor(0, rows=12, capacity=15)
    n, real = int(x.count), x.sites.is_real[:, None]
    scale, bias = draw(1, (3,), (3,), dtype=jnp.float32)

    def run(feats, ct):
        def f(feats):
            y = on_sites(x.sites, feats)  # unlike a constructor it does not clear padding
            mean, variance, _ = js.ops.batch_statistics(y)
            return js.ops.relu(js.ops.batch_norm(y, mean, variance, scale, bias)).feats

        y, back = jax.vjp(f, feats)
        return y, back(ct)[0]

    (ct,) = draw(2, x.feats.shape, dtype=jnp.float32)
    clean = run(x.feats, jnp.where(real, ct, 0))
    dirty = run(jnp.where(real, x.feats, jnp.nan), jnp.where(real, ct, jnp.nan))
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (b[n:] == 0).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("count", [0, 1, 17, 20])
@pytest.mark.parametrize("relu", [False, True])
def test_tangent_and_cotangent_of_normalize_are_adjoint(count, relu):
    x, x_dot, ct, *vectors = draw(count, *[(20, 3)] * 3, *[(3,)] * 6)
    scale_dot, shift_dot, *at = vectors
    at, counts = (x, *at, jnp.array([count], jnp.int32)), np.arange(20)[:, None] < count
    (moved,) = _tangent(x_dot, scale_dot, shift_dot, *at, relu=relu)
    given = _cotangent(ct, *at, relu=relu, dtype=x.dtype)
    right = sum((a * b).sum() for a, b in zip(given, (x_dot, scale_dot, shift_dot), strict=True))
    np.testing.assert_allclose((moved * jnp.where(counts, ct, 0)).sum(), right, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("count", [1, 13])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_normalize_has_the_values_and_derivatives_of_plain_jax(count, relu, adds):
    x, residual, weight = draw(count, *[(15, 3)] * 3)
    scale, shift, of_mean, of_variance = draw(count + 50, *[(3,)] * 4)
    counts, operands = jnp.array([count], jnp.int32), (x, scale, shift, residual)

    def ours(x, scale, shift, residual):
        extra = residual if adds else None
        y, mean, variance = normalize(x, scale, shift, counts, extra, epsilon=0.1, relu=relu)
        return (y * weight).sum() + mean @ of_mean + variance @ of_variance + (y * variance[None]).sum() ** 2

    def plain(x, scale, shift, residual):
        x = x[:count]
        mean, variance = x.mean(0), x.var(0)
        y = (x - mean[None]) / jnp.sqrt(variance + 0.1)[None] * scale[None] + shift[None]
        y = y + residual[:count] if adds else y
        y = jnp.where(y > 0, y, 0) if relu else y
        return (y * weight[:count]).sum() + mean @ of_mean + variance @ of_variance + (y * variance[None]).sum() ** 2

    every = (0, 1, 2, 3)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    same(ours(*operands), plain(*operands))
    for of in (jax.jacfwd, jax.jacrev):
        jax.tree.map(same, of(ours, every)(*operands), of(plain, every)(*operands))
    for outer, inner in ((jax.jacfwd, jax.jacrev), (jax.jacrev, jax.jacrev), (jax.jacrev, jax.jacfwd)):
        twice = [jax.jit(outer(inner(f, every), every))(*operands) for f in (ours, plain)]
        jax.tree.map(same, *twice)
    same(jax.grad(ours, 1)(*operands), jax.grad(plain, 1)(*operands))  # along one, the others constant


def test_padding_reaches_nothing_in_normalize():
    x, residual, ct = draw(0, *[(15, 4)] * 3, dtype=jnp.float16)
    scale, shift = draw(1, (4,), (4,), dtype=jnp.float32)
    counts, real = jnp.array([12], jnp.int32), np.arange(15)[:, None] < 12

    def run(x, residual, ct):
        y, back = jax.vjp(lambda x, r: normalize(x, scale, shift, counts, r, epsilon=0.1, relu=True)[0], x, residual)
        return y, *back(ct)

    arrays = x, residual, ct
    clean = run(*(jnp.where(real, a, 0) for a in arrays))
    dirty = run(*(jnp.where(real, a, jnp.nan) for a in arrays))
    for a, b in zip(clean[:2], dirty[:2], strict=True):
        np.testing.assert_array_equal(a, b)
        assert (b[12:] == 0).all()


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_normalize_batch_is_statistics_and_a_norm(activation):
    x, other = random_tensor(0, rows=40, capacity=50, features=8), random_tensor(0, rows=40, capacity=50, features=8)
    residual = other.with_feats(other.feats * 2 + 1)
    scale, bias = draw(1, (8,), (8,), dtype=jnp.float32)
    for extra in (None, residual):
        y, mean, variance, count = js.ops.normalize_batch(x, scale, bias, residual=extra, activation=activation)
        wanted = js.ops.batch_statistics(x)
        after = js.ops.batch_norm(x, *wanted[:2], scale, bias, residual=extra, activation=activation)
        for got, want in zip((mean, variance, count), wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6)
        np.testing.assert_allclose(y.feats, after.feats, rtol=1e-5, atol=1e-5)
    plain, *_ = js.ops.normalize_batch(x)
    np.testing.assert_allclose(plain.feats[: int(x.count)].std(0), 1, rtol=1e-3)
    with pytest.raises(ValueError, match="equal features, got 8 and 3"):
        js.ops.normalize_batch(x, residual=random_tensor(0, rows=40, capacity=50, features=3))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_residual_is_added_before_rounding(activation):
    x = js.SparseTensor(jnp.zeros((2, 4), jnp.int32).at[1, 1].set(1), jnp.array([[1], [-1]], jnp.float16))
    residual = x.with_feats(x.feats * -60000)
    y = js.ops.batch_norm(
        x, jnp.zeros(1), jnp.ones(1), jnp.full(1, 7e4), epsilon=0, residual=residual, activation=activation
    )
    np.testing.assert_allclose(y.feats[:, 0], [1e4, 0 if activation else -1e4], rtol=1e-3)


@pytest.mark.parametrize("dtype", [None, jnp.float16, jnp.float32])
@pytest.mark.parametrize("running", [False, True])
def test_a_norm_layer_adds_residuals_in_its_dtype(dtype, running):
    x = random_tensor(0, rows=40, capacity=50, features=8, dtype=jnp.float16)
    residual = x.with_feats(x.feats * 2 + 1)
    layer = js.nn.BatchNorm(8, dtype=dtype, use_running_average=running, rngs=quick_rngs())
    y = layer(x, residual=residual, activation="relu")
    apart = js.nn.BatchNorm(8, dtype=dtype, use_running_average=running, rngs=quick_rngs())
    want = apart(x)
    want = js.ops.relu(js.ops.add(want, residual.astype(want.dtype)))
    assert y.dtype == want.dtype == (dtype or jnp.float16)
    np.testing.assert_allclose(y.feats, want.feats, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(layer.var[...], apart.var[...], rtol=1e-6)


def test_vmap_over_scenes_is_a_loop_over_scenes():
    a, b = draw(0, (4, 20, 3), (4, 20, 3), dtype=jnp.float32)
    s, t, c = draw(1, (3,), (3,), (3,), dtype=jnp.float32)
    counts = jnp.array([[0], [5], [20], [11]], jnp.int32)

    def f(a, b, counts):
        return *moments(a, b, c, counts), affine(a, s, t, c, counts), *channels.statistics(a, counts)

    for batched, looped in zip(jax.vmap(f)(a, b, counts), zip(*map(f, a, b, counts), strict=True), strict=True):
        np.testing.assert_allclose(batched, jnp.stack(looped), rtol=1e-5, atol=1e-5)
    grad = jax.vmap(jax.grad(lambda a, b, counts: sum(jnp.sum(y**2) for y in f(a, b, counts))))(a, b, counts)
    each = [
        jax.grad(lambda a, b, n: sum(jnp.sum(y**2) for y in f(a, b, n)))(*o) for o in zip(a, b, counts, strict=True)
    ]
    np.testing.assert_allclose(grad, jnp.stack(each), rtol=1e-4, atol=1e-3)


def test_a_backward_pass_keeps_features_and_no_masks():
    x = random_tensor(0, rows=50, features=8, dtype=jnp.float16)
    scale, bias = draw(1, (8,), (8,), dtype=jnp.float32)

    def f(feats, scale, bias):
        y = on_sites(x.sites, feats)
        mean, variance, _ = js.ops.batch_statistics(y)
        return js.ops.relu(js.ops.batch_norm(y, mean, variance, scale, bias)).feats

    _, back = jax.vjp(f, x.feats, scale, bias)
    kept = [(a.shape, a.dtype) for a in jax.tree.leaves(back) if a.shape == x.feats.shape]
    assert kept
    assert all(dtype == jnp.float16 for _, dtype in kept), kept  # none in float32, none of booleans
    assert len(kept) <= 3, kept


def test_the_derivative_of_relu_at_zero_is_zero():
    x = random_tensor(0, rows=3).with_feats(jnp.array([[-1.0, 0.0, 2.0]] * 3, jnp.float32))
    grad = jax.grad(lambda feats: js.ops.relu(x.with_feats(feats)).feats.sum())(x.feats)
    np.testing.assert_array_equal(grad, np.array([[0, 0, 1]] * 3))
    assert (jax.grad(jax.grad(lambda s: js.ops.relu(x.with_feats(x.feats * s)).feats.sum() ** 2))(1.0)) > 0


def test_saving_products_alone_saves_a_third_of_what_a_backward_pass_keeps():
    x = random_tensor(0, rows=60, features=8)
    model = js.models.blocks.ResidualBlock(8, 16, rngs=quick_rngs())
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        return jnp.sum(nnx.merge(graph, params, rest, copy=True)(x).feats ** 2)

    def kept(loss):
        leaves = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params))
        return sum(a.size * a.dtype.itemsize for a in leaves if a.ndim == 2 and a.shape[1] >= 8)

    lean = jax.checkpoint(loss, policy=js.ops.save_products)
    assert kept(lean) <= 0.65 * kept(loss)
    for a, b in zip(*(jax.tree.leaves(jax.grad(f)(params)) for f in (loss, lean)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    jaxpr = str(jax.make_jaxpr(jax.grad(lean))(params))
    forward = str(jax.make_jaxpr(loss)(params))
    for op in ("sparse_conv_forward[", "normalize["):  # statistics are kept
        assert jaxpr.count(op) == forward.count(op) > 0
    assert jaxpr.count("normalize_again[") > 0
    assert jaxpr.count("kernel_map[") == 1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("policy", [None, js.ops.save_products])
def test_derivatives_go_through_what_is_computed_again(policy):
    x, residual = draw(0, (12, 3), (12, 3))
    scale, bias, weight = draw(1, (3,), (3,), (12, 3))
    counts = jnp.array([10], jnp.int32)

    def f(x, scale, bias, residual):
        y, mean, variance = normalize(x, scale, bias, counts, epsilon=0.1, relu=True)
        y, *_ = normalize(jnp.sin(y), scale, bias, counts, residual, epsilon=0.1, relu=True)
        return (y * weight).sum() ** 2 + mean @ variance

    operands, every = (x, scale, bias, residual), (0, 1, 2, 3)
    lean = jax.checkpoint(f, policy=policy)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    jax.tree.map(same, jax.grad(lean, every)(*operands), jax.grad(f, every)(*operands))
    for outer in (jax.jacfwd, jax.jacrev):
        jax.tree.map(same, *(jax.jit(outer(jax.grad(g, every), every))(*operands) for g in (lean, f)))
