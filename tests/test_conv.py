"""The convolution against independent truth: dense convolution, and plain JAX."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scenes import dense_conv, on_cpu, random_coords, random_kernel, random_tensor, row_error

import jaxsparse as js
from jaxsparse.geometry import Geometry


@st.composite
def cases(draw, most_dims=4):
    """A geometry, a kind of output sites and a seed."""
    dims = draw(st.integers(1, most_dims))

    def axes(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel = axes(1, 5 if dims < 3 else 3)
    sites = draw(st.sampled_from(["submanifold", "reachable", "floor"]))
    strides = (1,) * dims if sites == "submanifold" else axes(1, 3)
    padding = draw(st.one_of(st.none(), st.just(axes(-1, 3))))
    return Geometry.create(dims, kernel, strides, padding, axes(1, 3)), sites, draw(st.integers(0, 2**16))


def check_against_dense(case):
    geometry, sites, seed = case
    dims = len(geometry.kernel)
    with jax.enable_x64(True):
        x = random_tensor(seed, rows=40, dims=dims, capacity=50, dtype=jnp.float64)
        kernel = random_kernel(seed, geometry, 3, 4, jnp.float64)
        options = {
            "kernel_size": geometry.kernel,
            "strides": geometry.stride,
            "padding": geometry.padding,
            "dilation": geometry.dilation,
            "sites": sites,
            "capacity": None if sites == "submanifold" else 40 * geometry.coarse_per_site(),
        }

        def sparse(feats, kernel):
            return js.ops.conv(x.with_feats(feats), kernel, **options)

        y = sparse(x.feats, kernel)
        coords, values = y.rows()
        assert (np.asarray(y.feats)[len(coords) :] == 0).all()
        if len(coords) == 0:
            return
        weights = jnp.asarray(np.random.default_rng(seed).normal(size=values.shape))

        def dense(feats, kernel):
            return dense_conv(x, feats, kernel, geometry, coords)

        np.testing.assert_allclose(values, on_cpu(dense, x.feats, kernel), rtol=0, atol=1e-12)
        ours = jax.grad(lambda f, k: (sparse(f, k).feats[: len(coords)] * weights).sum(), (0, 1))(x.feats, kernel)
        theirs = on_cpu(jax.grad(lambda f, k, w: (dense(f, k) * w).sum(), (0, 1)), x.feats, kernel, weights)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)

        # The transposed layer is the adjoint of the forward one: <conv(f), g> = <f, conv_transpose(g)>.
        transposed = js.ops.conv_transpose(
            y.with_feats(jnp.zeros_like(y.feats).at[: len(coords)].set(weights)),
            jnp.swapaxes(kernel, 1, 2),
            like=x,
            **{k: v for k, v in options.items() if k not in ("sites", "capacity")},
        )
        assert (values * weights).sum() == pytest.approx(float((x.feats * transposed.feats).sum()), abs=1e-9)


@given(cases())
def test_forward_and_gradients_equal_dense_convolution(case):
    check_against_dense(case)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(150))
def test_forward_and_gradients_equal_dense_convolution_sweep(seed):
    rng = np.random.default_rng(seed)
    dims = int(rng.integers(1, 5))
    sites = ["submanifold", "reachable", "floor"][seed % 3]
    kernel = tuple(map(int, rng.integers(1, 6 if dims < 4 else 4, dims)))
    strides = (1,) * dims if sites == "submanifold" else tuple(map(int, rng.integers(1, 4, dims)))
    padding = None if seed % 2 else tuple(map(int, rng.integers(-1, 4, dims)))
    dilation = tuple(map(int, rng.integers(1, 4, dims)))
    check_against_dense((Geometry.create(dims, kernel, strides, padding, dilation), sites, seed))


@given(cases(most_dims=3))
def test_custom_call_equals_plain_jax(case):
    geometry, sites, seed = case
    x = random_tensor(seed, rows=50, dims=len(geometry.kernel), capacity=64)
    kernel = random_kernel(seed, geometry, 3, 5)

    def run(implementation):
        y = js.ops.conv(
            x,
            kernel,
            kernel_size=geometry.kernel,
            strides=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            sites=sites,
            capacity=None if sites == "submanifold" else 50 * geometry.coarse_per_site(),
            precision="highest",
            implementation=implementation,
        )
        return y.coords, y.feats

    (coords, ours), (ref_coords, reference) = run("auto"), run("xla")
    np.testing.assert_array_equal(coords, ref_coords)
    assert row_error(ours, reference) < 1e-6


@pytest.mark.parametrize("channels", [(1, 1), (3, 5), (4, 33), (16, 16), (17, 48), (50, 64), (64, 130)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_width_and_dtype_is_within_one_rounding_of_float64(channels, dtype):
    c_in, c_out = channels
    geometry = Geometry.create(3, 3)
    x = random_tensor(1, rows=300, features=c_in, capacity=333, dtype=dtype, low=-3, high=4)
    kernel = random_kernel(2, geometry, c_in, c_out, dtype)
    cotangent = jnp.asarray(np.random.default_rng(3).normal(size=(333, c_out)), dtype)

    def products(x, kernel, cotangent, precision="highest"):
        def f(feats, kernel):
            return js.ops.conv(x.with_feats(feats), kernel, kernel_size=3, precision=precision).feats

        y, vjp = jax.vjp(f, x.feats, kernel)
        return y, *vjp(cotangent)

    ours = products(x, kernel, cotangent)
    with jax.enable_x64(True):
        exact = products(x.astype(jnp.float64), kernel.astype(jnp.float64), cotangent.astype(jnp.float64))
        magnitudes = products(
            x.with_feats(jnp.abs(x.feats.astype(jnp.float64))),
            jnp.abs(kernel.astype(jnp.float64)),
            jnp.abs(cotangent.astype(jnp.float64)),
        )
    for got, truth, magnitude, steps in zip(ours, exact, magnitudes, (27 * c_in, 27 * c_out, 300), strict=True):
        assert got.dtype == dtype
        # One rounding of the result, and the float32 sums: steps x 2^-24 of the sum of magnitudes, as a bound.
        bound = float(jnp.finfo(dtype).eps) * np.abs(truth) + steps * 2.0**-24 * np.asarray(magnitude)
        error = np.abs(np.asarray(got, np.float64) - np.asarray(truth))
        smallest = float(jnp.finfo(dtype).smallest_subnormal)
        assert (error <= bound + smallest).all(), (error - bound).max()


def test_weight_gradient_of_float32_parameters_is_not_rounded_to_16_bits():
    x = random_tensor(0, rows=200, features=8, dtype=jnp.bfloat16)
    kernel = random_kernel(0, Geometry.create(3, 3), 8, 8)

    def loss(kernel):
        return js.ops.conv(x, kernel, kernel_size=3).feats.astype(jnp.float32).sum()

    gradient = jax.grad(loss)(kernel)
    assert gradient.dtype == jnp.float32
    assert (gradient != gradient.astype(jnp.bfloat16).astype(jnp.float32)).any()


def test_more_than_32_taps():
    check_against_dense((Geometry.create(3, 5), "submanifold", 5))
    check_against_dense((Geometry.create(2, 7, 2), "reachable", 6))


@pytest.mark.parametrize("tile_rows", [32, 64, 128])
def test_config_travels_to_the_custom_calls_of_the_cpu(tile_rows):
    x = random_tensor(0, rows=150)
    kernel = random_kernel(0, Geometry.create(3, 3), 3, 4)
    config = js.ops.ConvConfig(tile_rows=tile_rows)

    def loss(feats, kernel):
        return js.ops.conv(x.with_feats(feats), kernel, kernel_size=3, config=config).feats.sum()

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(x.feats, kernel)
    text = traced.lower(lowering_platforms=("cpu",)).as_text()
    calls = [line for line in text.splitlines() if "@jaxsparse_conv_" in line]
    assert len(calls) == 2  # dgrad and wgrad: the value itself is not asked for
    for line in calls:
        assert f"tile_rows = {tile_rows} : i64" in line


def test_output_onto_given_sites():
    rng = np.random.default_rng(0)
    x = random_tensor(0, rows=60)
    targets = random_coords(rng, 50)
    like = js.SparseTensor(targets, jnp.zeros((len(targets), 1)))
    kernel = random_kernel(0, Geometry.create(3, 3), 3, 4)
    y = js.ops.conv(x, kernel, kernel_size=3, sites=like.sites, precision="highest").check()
    expected = dense_conv(x, x.feats, kernel, Geometry.create(3, 3), targets)
    assert row_error(y.feats, expected) < 1e-6


def test_explicit_map_gives_the_same_result():
    x = random_tensor(0, rows=60)
    kernel = random_kernel(0, Geometry.create(3, 3), 3, 4)
    kernel_map = js.kernel_map(x.sites, x.sites, 3)
    expected = js.ops.conv(x, kernel, kernel_size=3).feats
    np.testing.assert_array_equal(js.ops.conv(x, kernel, kernel_size=3, kernel_map=kernel_map).feats, expected)


@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_entries_of_a_map_outside_the_input_rows_count_as_absent(implementation):
    x = random_tensor(0, rows=60, capacity=70)
    coarse = x.sites.coarse(Geometry.create(3, 3, 2), "reachable", 200)
    kernel_map = js.kernel_map(x.sites, coarse, 3, 2)
    kernel = random_kernel(0, Geometry.create(3, 3, 2), 3, 4)
    rng = np.random.default_rng(0)
    is_wrong = rng.random((2, *kernel_map.table.shape)) < 0.3
    wrong = rng.choice(np.int32([70, 71, 100, 10**6, 2**31 - 1, -2, -(2**31)]), is_wrong.shape)
    feats = jnp.stack([x.feats, 2 * x.feats])

    def products(x, coarse, kernel_map, kernel, feats, table):
        changed = dataclasses.replace(kernel_map, table=table)
        options = {"kernel_size": 3, "strides": 2, "kernel_map": changed, "implementation": implementation}

        def f(feats, kernel):
            return js.ops.conv(x.with_feats(feats), kernel, sites=coarse, **options)

        y, vjp = jax.vjp(lambda *args: f(*args).feats, feats, kernel)
        transposed = js.ops.conv_transpose(f(feats, kernel), jnp.swapaxes(kernel, 1, 2), like=x, **options)
        return y, *vjp(y), transposed.feats

    def of_scenes(entries):
        shared = x, coarse, kernel_map, kernel
        tables = jnp.where(is_wrong, entries, kernel_map.table)
        each = [on_cpu(products, *shared, *scene) for scene in zip(feats, tables, strict=True)]
        return jax.tree.leaves([each, on_cpu(jax.vmap(products, (*[None] * 4, 0, 0)), *shared, feats, tables)])

    got, expected = of_scenes(wrong), of_scenes(np.int32(-1))
    assert all((a != 0).any() for a in expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_bias_reaches_every_output_site_and_no_padding():
    x = random_tensor(0, rows=40, capacity=64)
    kernel = random_kernel(0, Geometry.create(3, 3), 3, 4)
    bias = jnp.arange(4, dtype=jnp.float32)
    y = js.ops.conv(x, kernel, bias, kernel_size=3)
    plain = js.ops.conv(x, kernel, kernel_size=3)
    n = int(x.count)
    np.testing.assert_allclose(y.feats[:n], plain.feats[:n] + bias[None], rtol=1e-6)
    assert (y.feats[n:] == 0).all()


def test_default_precision_of_jax_is_honoured():
    x = random_tensor(0, rows=40, features=8)
    kernel = random_kernel(0, Geometry.create(3, 3), 8, 8)

    def text_for_cuda():
        traced = jax.jit(lambda k: js.ops.conv(x, k, kernel_size=3).feats).trace(kernel)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    with jax.default_matmul_precision("float32"):
        assert "exact = 1 : i64" in text_for_cuda()
    assert "exact = 0 : i64" in text_for_cuda()


def test_results_are_bitwise_repeatable():
    x = random_tensor(0, rows=3000, features=16, low=-8, high=9)
    kernel = random_kernel(0, Geometry.create(3, 3), 16, 24)

    @jax.jit
    def products(feats, kernel):
        def f(feats, kernel):
            return js.ops.conv(x.with_feats(feats), kernel, kernel_size=3).feats

        y, vjp = jax.vjp(f, feats, kernel)
        return y, *vjp(y)

    first = products(x.feats, kernel)
    for _ in range(20):
        for a, b in zip(first, products(x.feats, kernel), strict=True):
            np.testing.assert_array_equal(a, b)
