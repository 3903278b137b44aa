"""What is emitted for CUDA, run on the host: the whole path from Python to the CUDA kernels' own source.

The CPU backend is made to emit the custom calls of CUDA, with their dtypes, attributes and workspaces, and each goes to
the emulated handler of `cuda_on_host`.
"""

from __future__ import annotations

import re

import cuda_on_host
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scenes import pad_rows, quick_rngs, random_coords, random_kernel, random_tensor, row_error

import jaxsparse as js
from jaxsparse import _coords, _ffi
from jaxsparse.geometry import Geometry
from jaxsparse.ops import channels, normalize, rows
from jaxsparse.ops.conv import FORWARD_TILES, WGRAD_TILES, choices, fused, primitives
from jaxsparse.tuning import TuningResult, choice, measure, search, work
from jaxsparse.tuning.key import Choices, Key, row_bucket
from jaxsparse.tuning.record import record

OPS = [
    _coords.unique_sites,
    _coords.coarse_sites,
    _coords.kernel_map,
    primitives.forward,
    primitives.dgrad,
    primitives.wgrad,
    fused.op,
    fused.linear,
    rows._gather,
    rows._group,
    rows._sum,
    channels._moments,
    channels._statistics,
    normalize._normalize,
    normalize._tangent,
    normalize._cotangent,
]

pytestmark = [
    pytest.mark.skipif(cuda_on_host.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(cuda_on_host.is_gpu(), reason="the handlers themselves run here, in the other tests"),
]


@pytest.fixture(scope="module", autouse=True)
def calls(cuda_library):
    """Sends this module's custom calls to the emulated CUDA handlers; yields the names called."""
    made = []
    call = _ffi.call

    def call_on_host(target, results, *operands, **attributes):
        made.append(target)
        return list(jax.ffi.ffi_call(f"{target}_on_host", list(results))(*operands, **_ffi._encode(attributes)))

    _ffi.call = call_on_host
    for op in OPS:
        op.lower_as("cuda", on="cpu")
    jax.clear_caches()
    yield made
    _ffi.call = call
    for op in OPS:
        op.lower_as("cpu", on="cpu")
    jax.clear_caches()


def products(kind, x, kernel, implementation, precision="highest"):
    """Result and gradients of one kind of convolution."""
    options = {"kernel_size": 3, "precision": precision, "implementation": implementation}
    if kind != "submanifold":
        options["strides"] = 2

    def f(feats, kernel):
        y = x.with_feats(feats)
        if kind == "transposed":
            geometry = Geometry.create(3, 3, 2)
            down = random_kernel(1, geometry, x.num_features, x.num_features, x.dtype)
            coarse = js.ops.conv(y, down, sites="reachable", capacity=400, **options)
            return js.ops.conv_transpose(coarse, kernel, like=x, **options).feats
        return js.ops.conv(y, kernel, sites=kind, capacity=None if kind == "submanifold" else 400, **options).feats

    y, vjp = jax.vjp(f, x.feats, kernel)
    return y, *vjp(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype))


DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64])


@DTYPES
@pytest.mark.parametrize("kind", ["submanifold", "reachable", "floor", "transposed"])
def test_products_of_every_dtype_agree_with_plain_jax_in_float64(kind, dtype):
    with jax.enable_x64(True):
        x = random_tensor(0, rows=70, features=5, capacity=90, dtype=dtype, low=-3, high=4)
        kernel = random_kernel(0, Geometry.create(3, 3), 5, 7, dtype)
        ours = products(kind, x, kernel, "auto")
        exact = products(kind, x.astype(jnp.float64), kernel.astype(jnp.float64), "xla")
        # Two convolutions in a row round twice, and the first result's rounding passes through the second.
        tolerance = (30 if kind == "transposed" else 4) * float(jnp.finfo(dtype).eps)
        for got, truth in zip(ours, exact, strict=True):
            assert got.dtype == dtype
            assert row_error(got, truth) < tolerance


def made_of(calls):
    """How often each product was called."""
    names = ("conv_gemm", "wgrad_gemm", "conv_forward", "conv_wgrad")
    return {name: n for name in names if (n := calls.count(f"jaxsparse_{name}_v1"))}


@DTYPES
@pytest.mark.parametrize(("c_in", "c_out"), [(1, 1), (3, 16), (4, 32), (12, 8), (13, 20), (30, 50), (36, 36), (70, 9)])
def test_every_width_runs_on_the_scheduled_kernels_but_in_float64(calls, c_in, c_out, dtype):
    """Channels padded with zeros and cut off again, in forward, dgrad and wgrad."""
    with jax.enable_x64(True):
        x = random_tensor(0, rows=70, features=c_in, capacity=80, dtype=dtype, low=-3, high=4, fill=jnp.nan)
        kernel = random_kernel(0, Geometry.create(3, 3), c_in, c_out, dtype)
        exact = products("submanifold", x.astype(jnp.float64), kernel.astype(jnp.float64), "xla")
        calls.clear()
        ours = products("submanifold", x, kernel, "auto")
        plain, scheduled = {"conv_forward": 2, "conv_wgrad": 1}, {"conv_gemm": 2, "wgrad_gemm": 1}
        assert made_of(calls) == (plain if dtype == jnp.float64 else scheduled)
        for got, truth in zip(ours, exact, strict=True):
            assert (got.dtype, got.shape) == (dtype, truth.shape)
            assert row_error(got, truth) < 8 * float(jnp.finfo(dtype).eps)
        assert not ours[0][int(x.count) :].any()
        assert not ours[1][int(x.count) :].any()


@pytest.mark.parametrize("precision", ["default", "high", "highest"])
@pytest.mark.parametrize(("c_in", "c_out"), [(16, 24), (9, 7)])
def test_float32_takes_tf32_by_default_at_every_width(calls, precision, c_in, c_out):
    x = random_tensor(0, rows=70, features=c_in, low=-3, high=4)
    kernel = random_kernel(0, Geometry.create(3, 3), c_in, c_out)
    exact = products("submanifold", x, kernel, "xla")
    calls.clear()
    ours = products("submanifold", x, kernel, "auto", precision)
    assert made_of(calls) == {"conv_gemm": 2, "wgrad_gemm": 1}
    for got, truth in zip(ours, exact, strict=True):
        error = row_error(got, truth)
        if precision == "default":
            assert 1e-6 < error < 2e-3
        else:
            assert error < 1e-6


def test_tf32_rounds_weights_to_nearest_and_features_towards_zero():
    """One product: 1 + 2^-10 - 2^-13 of the weight rounds up to 1 + 2^-10, of the feature down to 1."""
    value = jnp.float32(1 + 2.0**-10 - 2.0**-13)
    x = js.SparseTensor(jnp.zeros((1, 4), jnp.int32), jnp.full((1, 8), 0, jnp.float32).at[0, 0].set(value))
    kernel = jnp.zeros((27, 8, 8), jnp.float32).at[13, 0, 0].set(value)
    assert products("submanifold", x, kernel, "auto", "default")[0][0, 0] == 1 + 2.0**-10


def test_float32_weights_of_a_bfloat16_layer_get_float32_gradients(calls):
    x = random_tensor(0, rows=70, features=8, dtype=jnp.bfloat16)
    kernel = random_kernel(0, Geometry.create(3, 3), 8, 8)
    gradient = jax.grad(lambda k: js.ops.conv(x, k, kernel_size=3).feats.astype(jnp.float32).sum())(kernel)
    assert gradient.dtype == jnp.float32
    assert (gradient != gradient.astype(jnp.bfloat16).astype(jnp.float32)).any()
    assert "jaxsparse_wgrad_gemm_v1" in calls


@pytest.mark.parametrize("reduce", ["mean", "sum", "max", "first"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_voxels_are_those_of_plain_jax(reduce, dtype):
    rng = np.random.default_rng(0)
    points = pad_rows(rng.uniform(-2, 2, (200, 3)).astype(np.float32), 256, np.nan)
    feats = jnp.asarray(pad_rows(rng.normal(size=(200, 3)), 256, np.nan), dtype)

    def run(feats, implementation):
        x, index = js.voxelize(
            points, feats, 0.5, capacity=190, count=200, reduce=reduce, implementation=implementation
        )
        back = js.devoxelize(x.with_feats(x.feats**2), index, implementation=implementation)
        return back.astype(jnp.float32).sum(), (x.coords, x.feats, index)

    (_, ours), gradient = jax.value_and_grad(run, has_aux=True)(feats, "auto")
    (_, theirs), reference = jax.value_and_grad(run, has_aux=True)(feats, "xla")
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=float(jnp.finfo(dtype).eps), atol=1e-6)
    np.testing.assert_allclose(gradient[:200], reference[:200], rtol=4 * float(jnp.finfo(dtype).eps), atol=1e-3)
    assert (gradient[200:] == 0).all()


def test_vmap_over_scenes_is_one_call(calls):
    scenes = [random_tensor(s, rows=20 + 9 * s, capacity=60) for s in range(3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *scenes)
    kernel = random_kernel(0, Geometry.create(3, 3), 3, 4)

    def f(x, implementation):
        return js.ops.conv(x, kernel, kernel_size=3, precision="highest", implementation=implementation).feats

    calls.clear()
    ours = jax.jit(jax.vmap(lambda x: f(x, "auto")))(batch)
    assert made_of(calls) == {"conv_gemm": 1}
    assert row_error(ours, jnp.stack([f(x, "xla") for x in scenes])) < 1e-6


def test_network_does_not_depend_on_place_or_order():
    coords = random_coords(np.random.default_rng(0), 150, low=-6, high=7)
    feats = np.random.default_rng(1).normal(size=(len(coords), 2)).astype(np.float32)
    net = js.models.SparseResUNet42(2, num_classes=3, width=0.0625, rngs=quick_rngs())
    net.eval()  # batch statistics of the few deep sites would amplify rounding
    x = js.SparseTensor(coords, feats)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda x: net(x).feats).lower(x).compile()
    text = run.as_text()
    targets = [*_ffi.TARGETS, "jaxsparse_conv_gemm_v1"]
    made = {target: text.count(f'custom_call_target="{target}_on_host"') for target in targets}
    assert (made["jaxsparse_conv_forward_v1"], made["jaxsparse_conv_gemm_v1"]) == (0, 42)
    assert made["jaxsparse_kernel_map_v1"] == 9
    assert made["jaxsparse_coarse_sites_v1"] == 4
    ours = run(x)
    moved = coords[::-1] + np.array([0, 16, -32, 48], np.int32)  # the same scene, elsewhere and in another order
    with jax.default_matmul_precision("highest"):
        theirs = jax.jit(lambda x: net(x).feats)(js.SparseTensor(moved, feats[::-1]))
    assert row_error(ours, theirs[::-1]) < 1e-5


def attributes(text, target):
    """The attributes of each call of a target in a program's text."""
    lines = [line for line in text.splitlines() if f"@{target}_on_host(" in line]
    assert lines
    found = [dict(re.findall(r"(\w+) = (\d+) : i64", line)) for line in lines]
    return [{name: int(value) for name, value in one.items()} for one in found]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("width", [8, 5])
@pytest.mark.parametrize("kind", ["submanifold", "reachable", "transposed"])
def test_what_follows_a_convolution_runs_in_its_kernel_for_16_bits(calls, kind, width, dtype):
    x = random_tensor(0, rows=70, features=width, capacity=90, dtype=dtype, low=-3, high=4)
    kernel = random_kernel(0, Geometry.create(3, 3), width, width, dtype)
    numbers = np.random.default_rng(0).uniform(0.5, 1.5, (4, width))

    def f(x, kernel, implementation):
        options = {"kernel_size": 3, "implementation": implementation, "precision": "highest"}
        norm = js.ops.ChannelNorm(*(jnp.asarray(v, jnp.float32) for v in numbers))
        after = {"norm": norm, "bias": jnp.arange(1.0 * width), "activation": "gelu"}
        if kind == "submanifold":
            return js.ops.conv(x, kernel, residual=x, **after, **options)
        coarse = js.ops.conv(x, kernel, sites="reachable", strides=2, capacity=400, **options)
        if kind == "reachable":
            return js.ops.conv(x, kernel, sites=kind, strides=2, capacity=400, residual=coarse, **after, **options)
        return js.ops.conv_transpose(coarse, kernel, like=x, strides=2, residual=x, **after, **options)

    calls.clear()
    y = jax.jit(lambda x, k: f(x, k, "auto"))(x, kernel)
    plain = 0 if kind == "submanifold" else 1
    is_fused = dtype != jnp.float32
    assert calls.count("jaxsparse_conv_fused_v1") == int(is_fused)
    assert calls.count("jaxsparse_conv_gemm_v1") == plain + int(not is_fused)
    exact = f(x.astype(jnp.float32), kernel.astype(jnp.float32), "xla").feats
    assert row_error(y.feats, exact) < (8 if plain else 4) * float(jnp.finfo(dtype).eps)
    assert not y.feats[int(y.count) :].any()


@pytest.mark.parametrize(("widths", "dtype"), [((16, 8), jnp.float16), ((8, 24), jnp.bfloat16), ((12, 4), jnp.float16)])
def test_a_concatenation_that_only_convolutions_read_is_not_made(calls, widths, dtype):
    """Of 16 bits and widths in multiples of 8; the bits are those of a tensor that holds it."""
    x = random_tensor(0, rows=70, features=sum(widths), capacity=90, dtype=dtype, low=-3, high=4)
    parts = [x.with_feats(part) for part in jnp.split(x.feats, [widths[0]], 1)]
    kernel, pointwise = (random_kernel(0, Geometry.create(3, k), sum(widths), 16, dtype) for k in (3, 1))
    norm = js.ops.ChannelNorm(scale=jnp.arange(16.0), bias=jnp.arange(16.0))
    coarse = x.sites.coarse(Geometry.create(3, 2, 2), "reachable", 90, "auto")

    def layers(x, up):
        return [
            js.ops.conv(x, kernel, kernel_size=3, norm=norm, activation="relu").feats,
            js.ops.conv(x, pointwise, kernel_size=1, norm=norm).feats,
            js.ops.conv_transpose(up, kernel, like=x, kernel_size=3, strides=2, activation="silu").feats,
        ]

    def joined(parts):
        up = [js.SparseTensor(coarse, part.feats) for part in parts]
        return layers(js.ops.concatenate(parts), js.ops.concatenate(up))

    calls.clear()
    run = jax.jit(joined)
    found, text = run(parts), run.lower(parts).compile().as_text()
    assert calls.count("jaxsparse_conv_fused_v1") == 2
    assert calls.count("jaxsparse_linear_fused_v1") == 1
    assert bool(re.search(rf"\[90,{sum(widths)}\]\S* concatenate\(", text)) == (widths == (12, 4))
    expected = jax.jit(layers)(x, js.SparseTensor(coarse, x.feats))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.any()


def test_eval_mode_network_leaves_nothing_between_its_convolutions():
    """The whole network in float16: no norm, no ReLU, no concatenation."""
    coords = random_coords(np.random.default_rng(0), 150, low=-6, high=7)
    feats = np.random.default_rng(1).normal(size=(len(coords), 4)).astype(np.float16)
    net = js.models.SparseResUNet42(4, width=0.25, dtype=jnp.float16, rngs=quick_rngs())
    net.eval()
    x = js.SparseTensor(coords, feats)
    lowered = jax.jit(lambda x: net(x).feats).lower(x)
    run, text = lowered.compile(), lowered.as_text()
    names = ("conv_fused", "linear_fused", "conv_gemm", "conv_forward")
    made = {name: run.as_text().count(f'"jaxsparse_{name}_v1_on_host"') for name in names}
    assert made == {"conv_fused": 42, "linear_fused": 7, "conv_gemm": 0, "conv_forward": 0}
    for op in ("dot_general", "rsqrt", "maximum"):
        assert op not in text
    assert not re.search(r"f\d+\[\S* concatenate\(", run.as_text())
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(lambda x: net_in_float32(net)(x).feats)(x.astype(jnp.float32))
    assert row_error(run(x), exact) < 20 * float(jnp.finfo(jnp.float16).eps)


def net_in_float32(net):
    """The same network with products in float32."""
    wide = js.models.SparseResUNet42(4, width=0.25, rngs=quick_rngs())
    nnx.update(wide, nnx.state(net))
    wide.eval()
    return wide


TILE = ("tile_rows", "tile_cols", "stages", "splits")


@pytest.mark.parametrize("tile", [FORWARD_TILES[0], FORWARD_TILES[-1]])
def test_choices_become_attributes_of_the_calls_of_tensor_cores(tile, monkeypatch):
    """A layer's own tiles, and the order of rows that all layers of a map share: one schedule, both ways."""
    monkeypatch.setattr(choice, "device_of", lambda platform: ("a GPU", True))
    monkeypatch.setattr(choices, "has_clusters", lambda platform: True)
    x = random_tensor(0, rows=150, capacity=200, features=16, dtype=jnp.float16, low=-3, high=4)
    kernels = [random_kernel(s, Geometry.create(3, 3), 16, 16, jnp.float16) for s in range(2)]

    def loss(kernels, feats):
        y = x.with_feats(feats)
        for kernel in kernels:
            y = js.ops.conv(y, kernel, kernel_size=3)
        return y.feats.astype(jnp.float32).sum()

    key = Key("conv", "a GPU", "float16", 16, 16, 27, "same", (1, 1, 1), row_bucket(200))
    wgrad = key._replace(op="wgrad")
    sort = Key("sort", "a GPU", "", 0, 0, 27, "same", (1, 1, 1), row_bucket(200))
    for sorts in (False, True):
        lowered = jax.jit(lambda *a: jax.grad(loss, (0, 1))(*a))
        with TuningResult(Choices({key: tile, wgrad: WGRAD_TILES[-1], sort: sorts})):
            hlo = lowered.lower(kernels, x.feats)
        found = attributes(hlo.as_text(), "jaxsparse_conv_gemm_v1")
        assert all(tuple(a[name] for name in TILE) == tuple(tile) for a in found)
        found = attributes(hlo.as_text(), "jaxsparse_wgrad_gemm_v1")
        assert all(tuple(a[name] for name in TILE) == tuple(WGRAD_TILES[-1]) for a in found)
        compiled = hlo.compile().as_text()
        schedules = [line for line in compiled.splitlines() if 'custom_call_target="jaxsparse_conv_schedule_v1' in line]
        assert len(schedules) == 1  # forward and backward, both layers
        groups = re.findall(r"conv_schedule_v1.*groups = \S+.*?: tensor<(\d+)xi64>", hlo.as_text())
        assert set(groups) == {"9" if sorts else "0"}


def test_the_whole_search_runs_on_the_candidates_of_tensor_cores(monkeypatch):
    """Tiles of forward, dgrad and wgrad, order of rows, builder: each candidate right against plain JAX."""
    monkeypatch.setattr(choice, "device_of", lambda platform: ("a GPU", True))
    monkeypatch.setattr(choices, "has_clusters", lambda platform: True)
    monkeypatch.setattr(measure, "CALLS", {"cuda": 2})
    monkeypatch.setattr(measure, "LONG_ROWS", 64)
    monkeypatch.setattr(measure, "ROUNDS", 1)
    monkeypatch.setattr(work, "MOST_TRIED", 2)
    x = random_tensor(0, rows=150, features=16, low=-3, high=4)
    centres = x.coords[:, 1:].astype(jnp.float32) + 0.5
    x, _ = js.voxelize(centres, x.feats, 1.0, capacity=192, batch=x.coords[:, 0], batch_size=2)
    x = x.astype(jnp.float16)
    kernel, down = (random_kernel(0, Geometry.create(3, k), 16, 16, jnp.float16) for k in (3, 2))

    def net(x):
        y = js.ops.conv(x, kernel, kernel_size=3)
        z = js.ops.conv(y, down, kernel_size=2, strides=2, sites="reachable", capacity=128)
        return js.ops.conv_transpose(z, down, kernel_size=2, strides=2, like=y)

    found = search.Search(record(net, [(x,)]), "cuda", "training", float("inf"), progress=False)
    groups = found.run()
    kinds = {(key.op, key.direction) for key in found.decided}
    directions = {"same", "table", "reverse"}
    assert kinds == {
        *(("conv", d) for d in directions),
        *(("sort", d) for d in directions),
        ("wgrad", "same"),
        ("wgrad", "table"),
        ("builder", "table"),
    }
    for group in groups:
        assert group.total_us <= group.heuristic_us
        for decision in group.decisions:
            assert not decision.rejected, decision


@pytest.mark.parametrize("activation", [None, "relu"])
def test_batch_norm_takes_its_sums_from_custom_calls(calls, activation):
    x = random_tensor(0, rows=300, capacity=400, features=8)
    n, (weight,) = int(x.count), [jnp.linspace(0.5, 1.5, 8)]

    def f(feats, scale, bias):
        y = x.with_feats(feats)
        mean, variance, _ = js.ops.batch_statistics(y)
        y = js.ops.batch_norm(y, mean, variance, scale, bias, activation=activation)
        return (y.feats**2 * weight[None]).sum()

    def plain(feats, scale, bias):
        feats = feats[:n]
        y = (feats - feats.mean(0)[None]) / jnp.sqrt(feats.var(0) + 1e-5)[None] * scale[None] + bias[None]
        y = y if activation is None else jnp.maximum(y, 0)
        return (y**2 * weight[None]).sum()

    operands = x.feats * 3 + 2, jnp.full(8, 0.7), jnp.full(8, 0.3)
    calls.clear()
    lowered = jax.jit(jax.value_and_grad(f, (0, 1, 2))).lower(*operands)
    value, grads = lowered.compile()(*operands)
    # One of each: scale and bias take both sums of one call, and the statistics' derivative needs none.
    assert calls == ["jaxsparse_channel_moments_v1"] * 2
    # With a ReLU behind it the sums of the derivative go through its gate, a scale and a shift more.
    numbers = [
        len(args.split(",")) for args in re.findall(r"@jaxsparse_channel_moments_v1\w*\(([^)]*)\)", lowered.as_text())
    ]
    assert sorted(numbers) == [2, 4 if activation is None else 6]
    expected, wanted = jax.value_and_grad(plain, (0, 1, 2))(*operands)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for grad, want in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(grad, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("adds", [False, True])
def test_a_layer_of_batch_norm_is_a_call_forward_and_one_backward(calls, activation, adds):
    x = random_tensor(0, rows=300, capacity=400, features=8)
    layer = js.nn.BatchNorm(8, rngs=quick_rngs())
    graph, state = nnx.split(layer)

    def f(feats):
        y = x.with_feats(feats)
        after = {"residual": x if adds else None, "activation": activation}
        return (nnx.merge(graph, state, copy=True)(y, **after).feats ** 3).sum()

    calls.clear()
    value, grad = jax.jit(jax.value_and_grad(f))(x.feats)
    assert calls == ["jaxsparse_batch_norm_v1", "jaxsparse_batch_norm_grad_v1"]

    def plain(feats):
        rows = feats[: int(x.count)]
        y = (rows - rows.mean(0)[None]) / jnp.sqrt(rows.var(0) + 1e-5)[None]
        y = y + x.feats[: len(y)] if adds else y
        return ((y if activation is None else jnp.maximum(y, 0)) ** 3).sum()

    wanted, want = jax.value_and_grad(plain)(x.feats)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-4)


def test_tangents_of_batch_norm_take_their_sums_from_custom_calls(calls):
    x = random_tensor(0, rows=300, capacity=400, features=8)

    def f(feats):
        return js.ops.normalize_batch(x.with_feats(feats), activation="relu")[0].feats

    calls.clear()
    _, tangent = jax.jit(lambda a: jax.jvp(f, (a,), (a**2,)))(x.feats)
    assert calls[0] == "jaxsparse_batch_norm_v1"
    assert set(calls[1:]) == {"jaxsparse_channel_moments_v1"}

    def plain(feats):
        rows = feats[: int(x.count)]
        return jnp.maximum((rows - rows.mean(0)[None]) / jnp.sqrt(rows.var(0) + 1e-5)[None], 0)

    _, wanted = jax.jvp(plain, (x.feats,), (x.feats**2,))
    np.testing.assert_allclose(tangent[: int(x.count)], wanted, rtol=1e-4, atol=1e-4)
