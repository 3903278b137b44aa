"""Rows by index: gather and its transpose, and batch normalisation over real rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads
from scenes import on_cpu, random_tensor

import jaxsparse as js

RNG = np.random.default_rng(0)


def loop_sum(x, index, groups):
    out = np.zeros((groups, x.shape[1]))
    for row, group in zip(np.asarray(x, np.float64), np.asarray(index), strict=True):
        if 0 <= group < groups:
            out[group] += row
    return out


@pytest.mark.parametrize("implementation", ["auto", "xla"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_sum_leaves_out_rows_without_a_group_whatever_they_hold(dtype, implementation):
    index = RNG.integers(-2, 9, 200).astype(np.int32)
    x = RNG.normal(size=(200, 5)).astype(np.float32)
    x[(index < 0) | (index >= 7)] = np.nan
    y = js.ops.sum_rows(jnp.asarray(x, dtype), index, 7, implementation=implementation)
    expected = loop_sum(jnp.asarray(x, dtype), index, 7)
    assert y.dtype == dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=float(jnp.finfo(dtype).eps), atol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_gather_and_sum_are_transposes(implementation):
    index = RNG.integers(-1, 6, 30).astype(np.int32)
    x, g = RNG.normal(size=(6, 3)), RNG.normal(size=(30, 3))

    def gather(x):
        return js.ops.gather_rows(x, index, implementation=implementation)

    def total(g):
        return js.ops.sum_rows(g, index, 6, implementation=implementation)

    np.testing.assert_array_equal(gather(x), np.where(index[:, None] >= 0, x[index], 0))
    np.testing.assert_allclose((gather(x) * g).sum(), (x * total(g)).sum(), rtol=1e-13)
    np.testing.assert_allclose(jax.vjp(gather, x)[1](g)[0], total(g), rtol=1e-13)
    check_grads(lambda x: gather(x) ** 2, (x,), order=2)
    check_grads(lambda g: total(g) ** 2, (g,), order=2)


def test_sum_leaves_out_what_a_wrong_grouping_has_outside_the_rows():
    order = jnp.int32([5, -1, 2**31 - 1, 0, 6, 3])
    offsets = jnp.int32([-(2**31), 4, 2**31 - 1, -7, 5])
    x = jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)
    y = on_cpu(lambda x, *grouped: js.ops.sum_rows(x, jnp.zeros(6, jnp.int32), 4, grouped=grouped), x, order, offsets)
    zero = jnp.zeros(3)
    np.testing.assert_array_equal(y, jnp.stack([x[5] + x[0], x[3], zero, x[5] + x[0]]))


def test_vmap_of_sums():
    index = RNG.integers(-1, 6, (3, 30)).astype(np.int32)
    x = jnp.asarray(RNG.normal(size=(3, 30, 2)), jnp.float32)
    y = jax.vmap(lambda x, i: js.ops.sum_rows(x, i, 6))(x, index)
    for got, rows, groups in zip(y, x, index, strict=True):
        np.testing.assert_allclose(got, loop_sum(rows, groups, 6), rtol=1e-5, atol=1e-5)


def test_no_rows_and_no_groups():
    none, index = jnp.zeros((0, 2)), jnp.zeros(4, jnp.int32)
    np.testing.assert_array_equal(js.ops.gather_rows(none, index), np.zeros((4, 2)))
    np.testing.assert_array_equal(js.ops.sum_rows(none, index[:0], 3), np.zeros((3, 2)))
    assert js.ops.sum_rows(jnp.ones((4, 2)), index, 0).shape == (0, 2)
    assert jax.grad(lambda x: js.ops.gather_rows(x, index).sum())(none).shape == (0, 2)


def test_sums_of_16_bits_are_rounded_once():
    x = jnp.ones((5000, 1), jnp.bfloat16)  # summed in bfloat16, 256 + 1 is 256
    for implementation in ("auto", "xla"):
        y = js.ops.sum_rows(x, jnp.zeros(5000, jnp.int32), 1, implementation=implementation)
        assert float(y[0, 0]) == float(jnp.bfloat16(5000))


# --- batch normalisation ---


def test_statistics_are_those_of_the_real_rows():
    x = random_tensor(0, rows=70, capacity=100, features=6)
    n = int(x.count)
    rows = np.asarray(x.feats, np.float64)[:n] * 3 + 100  # a mean far from zero
    shifted = x.with_feats(x.feats * 3 + 100)
    mean, variance, count = js.ops.batch_statistics(shifted)
    assert count == n
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(variance, rows.var(0), rtol=1e-4)
    y = js.ops.batch_norm(shifted, mean, variance, jnp.full(6, 2.0), jnp.full(6, 0.5))
    np.testing.assert_allclose(y.feats[:n], (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5) * 2 + 0.5, atol=2e-4)
    assert (y.feats[n:] == 0).all()


def test_statistics_over_an_axis_weigh_scenes_by_their_rows():
    scenes = [random_tensor(s, rows=10 + 40 * s, capacity=100) for s in range(3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *scenes)
    mean, variance, count = jax.vmap(lambda x: js.ops.batch_statistics(x, "scene"), axis_name="scene")(batch)
    rows = np.concatenate([np.asarray(x.feats)[: int(x.count)] for x in scenes])
    assert (count == len(rows)).all()
    np.testing.assert_allclose(mean, np.broadcast_to(rows.mean(0), mean.shape), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, np.broadcast_to(rows.var(0), mean.shape), rtol=1e-5)


def test_layer_over_an_axis_normalises_with_the_statistics_of_all_scenes():
    scenes = [random_tensor(s, rows=10 + 40 * s, capacity=100) for s in range(3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *scenes)
    norm = js.nn.BatchNorm(3, axis_name="scene", rngs=nnx.Rngs(0))
    y = nnx.vmap(lambda m, x: m(x), in_axes=(None, 0), axis_name="scene")(norm, batch)
    rows = np.concatenate([np.asarray(x.feats)[: int(x.count)] for x in scenes])
    for i, x in enumerate(scenes):
        n = int(x.count)
        expected = (np.asarray(x.feats)[:n] - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
        np.testing.assert_allclose(y.feats[i, :n], expected, rtol=1e-4, atol=1e-5)
        assert (y.feats[i, n:] == 0).all()
    np.testing.assert_allclose(norm.mean[...], 0.1 * rows.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_statistics_are_float32_whatever_the_dtypes(dtype, param_dtype):
    norm = js.nn.BatchNorm(3, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    x = random_tensor(0, rows=50, dtype=dtype)
    y = norm(x)
    assert y.dtype == dtype
    assert norm.mean[...].dtype == norm.scale[...].dtype == param_dtype
    assert js.ops.batch_statistics(x)[0].dtype == jnp.float32
    rows = np.asarray(x.feats, np.float64)
    expected = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
    np.testing.assert_allclose(np.asarray(y.feats, np.float64), expected, atol=4 * float(jnp.finfo(dtype).eps))
    np.testing.assert_allclose(norm.mean[...], 0.1 * rows.mean(0), rtol=float(jnp.finfo(param_dtype).eps), atol=1e-7)


@pytest.mark.parametrize("layer", [js.nn.Linear(3, 4, rngs=nnx.Rngs(0)), js.nn.SubMConv(3, 4, 3, rngs=nnx.Rngs(0))])
def test_input_and_parameters_of_unequal_dtypes_are_promoted(layer):
    assert layer(random_tensor(0, dtype=jnp.bfloat16)).dtype == jnp.float32


def test_running_statistics_follow_momentum_and_skip_empty_batches():
    norm = js.nn.BatchNorm(3, momentum=0.8, rngs=nnx.Rngs(0))
    x = random_tensor(0, rows=50)
    mean, variance, _ = js.ops.batch_statistics(x)
    norm(x)
    np.testing.assert_allclose(norm.mean[...], 0.2 * mean, rtol=1e-6)
    np.testing.assert_allclose(norm.var[...], 0.8 + 0.2 * variance, rtol=1e-6)
    before = np.asarray(norm.mean[...])
    norm(js.SparseTensor(jnp.zeros((4, 4), jnp.int32), jnp.ones((4, 3)), count=0))
    np.testing.assert_array_equal(norm.mean[...], before)
    norm.eval()
    y = norm(x)
    n = int(x.count)
    expected = (np.asarray(x.feats)[:n] - before) / np.sqrt(np.asarray(norm.var[...]) + 1e-5)
    np.testing.assert_allclose(y.feats[:n], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(norm.mean[...], before)


@pytest.mark.usefixtures("x64")
def test_gradient_of_batch_norm():
    x = random_tensor(0, rows=20, capacity=24, dtype=jnp.float64)

    def f(feats, scale, bias):
        y = x.with_feats(feats)
        mean, variance, _ = js.ops.batch_statistics(y)
        return js.ops.batch_norm(y, mean, variance, scale, bias).feats

    check_grads(f, (x.feats, jnp.ones(3) * 1.5, jnp.ones(3)), order=2)
