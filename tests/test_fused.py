"""A convolution with norm, residual and activation in one op, against the same steps one after the other."""

from __future__ import annotations

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import raises
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jax.test_util import check_grads
from scenes import quick_rngs, random_kernel, random_tensor, row_error

import jaxsparse as js
from jaxsparse.geometry import Geometry
from jaxsparse.ops.conv import fused
from jaxsparse.tensor import on_sites

ACTIVATIONS = [None, "relu", "leaky_relu", "gelu", "silu"]
NUMBERS = ("mean", "variance", "scale", "bias")
KINDS = ["submanifold", "reachable", "transposed", "pointwise"]


def numbers(seed=0, width=4, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.uniform(0.5, 1.5, width) * (1 if n == "variance" else -1), dtype) for n in NUMBERS}


def layer(kind, x, kernel, steps=False, implementation="auto", residual_of=None, split=None, **after):
    """`activation(norm(conv(x) + bias) + residual)` by the fused op, or by an op for each step.

    With `split`, of the concatenation of its first channels and the others.
    """
    options = {"kernel_size": 1 if kind == "pointwise" else 3, "implementation": implementation, "precision": "highest"}
    op = js.ops.conv
    if kind == "transposed":
        op, coarse = js.ops.conv_transpose, x.sites.coarse(Geometry.create(3, 3, 2), "reachable", 160, implementation)
        options |= {"like": x, "strides": 2}
        rows = jnp.resize(x.feats, (160, x.num_features))
        x = js.SparseTensor(coarse, rows)
    elif kind == "reachable":
        options |= {"sites": kind, "strides": 2, "capacity": 160}
    if split is not None:
        x = js.ops.concatenate(split_in_two(x, split))
    residual = after.pop("residual", None)
    if residual is not None:  # rows of numbers for whatever sites come out
        sites = op(x, kernel, **options).sites
        padding = jnp.nan if residual_of is None else residual_of
        rows = jnp.where(sites.is_real[:, None], jnp.resize(residual, (sites.capacity, residual.shape[1])), padding)
        residual = js.SparseTensor.tree_unflatten(None, (sites, rows))
    if not steps:
        return op(x, kernel, residual=residual, **after, **options)
    y = op(x, kernel, after.get("bias"), **options)
    norm = after.get("norm")
    if norm is not None:
        y = js.ops.map_features(norm, y)
    if residual is not None:
        y = js.ops.add(y, residual)
    return js.ops.activate(y, after.get("activation"))


def split_in_two(x, width):
    return [on_sites(x.sites, part) for part in jnp.split(x.feats, [width], 1)]


@pytest.fixture
def every_width(monkeypatch):
    """Two inputs are taken at every dtype and width, not only where a kernel does."""
    monkeypatch.setattr(fused, "inputs", lambda x: x.parts)


ONE_OR_TWO = pytest.mark.parametrize("split", [None, 1])


def scene(kind="submanifold", dtype=jnp.float32, fill=0.0):
    x = random_tensor(0, rows=40, capacity=48, features=3, dtype=dtype, low=-2, high=3, fill=fill)
    return x, random_kernel(0, Geometry.create(3, 1 if kind == "pointwise" else 3), 3, 4, dtype)


@pytest.mark.parametrize("implementation", ["auto", "xla"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_steps(kind, activation, implementation):
    x, kernel = scene(kind)
    residual = jnp.sin(jnp.arange(400.0)).reshape(100, 4)
    for names in ((), ("bias",), ("scale", "bias"), ("mean", "variance"), NUMBERS):
        given = {name: value for name, value in numbers().items() if name in names}
        for with_residual, bias in itertools.product([False, True], [None, jnp.arange(4.0)]):
            after = {"norm": js.ops.ChannelNorm(**given), "activation": activation, "bias": bias}
            after |= {"residual": residual} if with_residual else {}
            got = layer(kind, x, kernel, implementation=implementation, **after)
            want = layer(kind, x, kernel, steps=True, implementation=implementation, **after)
            assert row_error(got.feats, want.feats) < 4e-6  # a GPU fuses products and sums in other places
            assert not got.feats[int(got.count) :].any()
            np.testing.assert_array_equal(got.coords, want.coords)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_sixteen_bits_are_rounded_once(dtype):
    x, kernel = scene(dtype=dtype)
    residual = jnp.sin(jnp.arange(400.0)).reshape(100, 4).astype(dtype)
    after = {"norm": js.ops.ChannelNorm(**numbers(dtype=dtype)), "residual": residual, "activation": "relu"}
    got = layer("submanifold", x, kernel, **after).feats
    assert got.dtype == dtype
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), (x.feats, kernel, after["norm"], residual))
        x = js.SparseTensor(x.coords, wide[0], count=x.count)
        after = {"norm": wide[2], "residual": wide[3], "activation": "relu"}
        exact = np.asarray(layer("submanifold", x, wide[1], **after).feats)
    ulp = np.spacing(np.abs(exact).astype(np.float32)) * 2.0 ** (23 - jnp.finfo(dtype).nmant)
    assert (np.abs(np.asarray(got, np.float64) - exact) <= 0.5 * ulp + 1e-5).all()


@pytest.mark.usefixtures("every_width")
@pytest.mark.parametrize("implementation", ["auto", "xla"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_two_inputs_give_what_their_concatenation_gives(kind, implementation, dtype):
    if dtype == jnp.float16 and implementation == "auto" and jax.default_backend() == "gpu":
        pytest.skip("the kernel itself takes multiples of 8 channels alone")
    x, kernel = scene(kind, dtype)
    residual = jnp.sin(jnp.arange(400.0)).reshape(100, 4)
    after = {"norm": js.ops.ChannelNorm(**numbers()), "residual": residual, "activation": "silu"}
    for split in (1, 2):
        got = layer(kind, x, kernel, implementation=implementation, split=split, **after)
        want = layer(kind, x, kernel, implementation=implementation, **after)
        np.testing.assert_array_equal(got.feats, want.feats)
        np.testing.assert_array_equal(got.coords, want.coords)


def test_two_inputs_are_taken_at_the_widths_and_dtypes_of_the_kernel():
    def inputs(widths, dtype=jnp.float16, last_dtype=None):
        x = random_tensor(0, rows=9, features=sum(widths), dtype=dtype)
        parts = [x.with_feats(f) for f in jnp.split(x.feats, np.cumsum(widths)[:-1], 1)]
        parts[-1] = parts[-1].astype(last_dtype or dtype)
        return len(fused.inputs(js.ops.concatenate(parts)))

    assert inputs((96, 32)) == inputs((8, 16), jnp.bfloat16) == 2
    assert inputs((96, 32), jnp.float32) == inputs((8, 12)) == inputs((8, 8, 8)) == inputs((8,)) == 1
    with jax.numpy_dtype_promotion("standard"):
        assert inputs((8, 8), last_dtype=jnp.float32) == 1


def test_parts_of_a_concatenation_stay_where_it_was_made():
    """Whatever goes through a transformation, or has its features changed, is its own only part."""
    parts = split_in_two(random_tensor(0, rows=9, features=16, dtype=jnp.float16), 8)
    x = js.ops.concatenate(parts)
    assert [part is t.feats for part, t in zip(x.parts, parts, strict=True)] == [True, True]
    assert x.astype(jnp.float16).parts is x.parts
    others = [jax.jit(lambda x: x)(x), jax.tree.map(lambda a: a, x), x.astype(jnp.float32), js.ops.relu(x), x + x]
    assert all(len(y.parts) == 1 and y.parts[0] is y.feats for y in (*others, x.with_feats(x.feats), parts[0]))
    assert len(jax.tree.leaves(x)) == len(jax.tree.leaves(parts[0]))


@pytest.mark.usefixtures("x64", "every_width")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("activation", "split"), [("gelu", None), ("leaky_relu", None), ("gelu", 1)])
def test_second_order_gradients_in_forward_and_reverse_mode(kind, activation, split):
    x, kernel = scene(kind, jnp.float64)
    given = numbers(dtype=jnp.float64)
    residual = jnp.sin(jnp.arange(400.0)).reshape(100, 4)

    def f(feats, kernel, given, residual):
        norm = js.ops.ChannelNorm(**given)
        after = {"norm": norm, "residual": residual, "activation": activation}
        return layer(kind, x.with_feats(feats), kernel, split=split, **after).feats

    check_grads(f, (x.feats, kernel, given, residual), order=2, modes=("fwd", "rev"))


@ONE_OR_TWO
@pytest.mark.usefixtures("x64", "every_width")
@pytest.mark.parametrize("kind", KINDS)
def test_tangents_are_those_of_the_steps(kind, split):
    """Along all operands, along one, and along none of the norm's numbers."""
    x, kernel = scene(kind, jnp.float64)
    residual = jnp.sin(jnp.arange(400.0)).reshape(100, 4)
    operands = (x.feats, kernel, numbers(dtype=jnp.float64), residual)
    directions = jax.tree.map(
        lambda a: jnp.cos(3.0 * jnp.arange(1.0 * a.size)).reshape(a.shape).astype(a.dtype), operands
    )

    def f(steps, feats, kernel, given, residual):
        after = {"norm": js.ops.ChannelNorm(**given), "residual": residual, "activation": "silu"}
        return layer(kind, x.with_feats(feats), kernel, steps, split=split, **after).feats

    for along in ((0, 1, 2, 3), (0,), (1,), (2,), (3,)):

        def restricted(steps, *moved, along=along):
            every = list(operands)
            for i, value in zip(along, moved, strict=True):
                every[i] = value
            return f(steps, *every)

        primals, tangents = zip(*((operands[i], directions[i]) for i in along), strict=True)
        got, want = (jax.jvp(lambda *m, s=s: restricted(s, *m), primals, tangents) for s in (False, True))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
        got, want = (
            jax.grad(lambda *m, s=s: (restricted(s, *m) ** 2).sum(), range(len(along)))(*primals) for s in (False, True)
        )
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_a_gradient_of_features_alone_computes_nothing_for_other_operands():
    x, kernel = scene()

    def f(feats):
        norm = js.ops.ChannelNorm(**numbers())
        return layer("submanifold", x.with_feats(feats), kernel, norm=norm, activation="relu").feats.sum()

    products = re.findall(r"sparse_conv_\w+", str(jax.make_jaxpr(jax.grad(f))(x.feats)))
    assert products == ["sparse_conv_forward", "sparse_conv_dgrad"]


@ONE_OR_TWO
@pytest.mark.usefixtures("every_width")
@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_padding_of_every_operand_and_cotangent_changes_nothing(kind, split):
    x, kernel = scene(kind)
    residual = jnp.sin(jnp.arange(400.0)).reshape(100, 4)

    def run(poison, cotangent):
        feats = jnp.where(x.sites.is_real[:, None], x.feats, poison)

        def f(feats, kernel, given, residual):
            z = js.SparseTensor.tree_unflatten(None, (x.sites, feats))
            norm = js.ops.ChannelNorm(**given)
            after = {"norm": norm, "residual": residual, "activation": "gelu", "residual_of": poison, "split": split}
            y = layer(kind, z, kernel, **after)
            return y.feats, y.sites

        y, vjp, sites = jax.vjp(f, feats, kernel, numbers(), residual, has_aux=True)
        real = sites.is_real[:, None]
        plain = f(feats, kernel, numbers(), residual)[0]
        assert not jnp.where(real, 0, plain).any()
        bars = vjp(jnp.where(real, jnp.cos(jnp.arange(1.0 * y.size)).reshape(y.shape), cotangent))
        return jax.tree.leaves((y, plain, bars))

    if kind == "transposed":  # its input's padding is set by `layer`
        assert all(np.isfinite(leaf).all() for leaf in run(0.0, jnp.nan))
        return
    for a, b in zip(run(0.0, 0.0), run(jnp.nan, jnp.nan), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("every_width")
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_vmap_takes_two_inputs(kernel_size):
    scenes = [random_tensor(s, rows=20 + 9 * s, capacity=60) for s in range(3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *scenes)
    kernel = random_kernel(0, Geometry.create(3, kernel_size), 3, 3)

    def f(x):
        joined = js.ops.concatenate(split_in_two(x, 1))
        return js.ops.conv(joined, kernel, kernel_size=kernel_size, residual=x, activation="relu").feats

    np.testing.assert_allclose(jax.vmap(f)(batch), jnp.stack([f(x) for x in scenes]), rtol=1e-5, atol=1e-5)
    text = jax.jit(jax.vmap(f)).lower(batch).as_text()
    if jax.default_backend() == "cpu":
        assert text.count("@jaxsparse_conv_forward_v1(") == int(kernel_size == 3)


def test_vmap_over_scenes_is_one_call_and_over_numbers_a_loop():
    scenes = [random_tensor(s, rows=20 + 9 * s, capacity=60) for s in range(3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *scenes)
    kernel = random_kernel(0, Geometry.create(3, 3), 3, 3)

    def f(x, given):
        norm = js.ops.ChannelNorm(**given)
        return js.ops.conv(x, kernel, kernel_size=3, norm=norm, residual=x, activation="relu").feats

    shared = numbers(width=3)
    mapped = jax.jit(jax.vmap(f, (0, None)))
    expected = jnp.stack([f(x, shared) for x in scenes])
    np.testing.assert_allclose(mapped(batch, shared), expected, rtol=1e-5, atol=1e-5)
    text = mapped.lower(batch, shared).as_text()
    if jax.default_backend() == "cpu":
        assert text.count("@jaxsparse_conv_forward_v1(") == 1
    each = jax.tree.map(lambda a: jnp.stack([a, 2 * a, 3 * a]), shared)
    expected = jnp.stack([f(x, jax.tree.map(lambda a, i=i: a[i], each)) for i, x in enumerate(scenes)])
    np.testing.assert_allclose(jax.vmap(f)(batch, each), expected, rtol=1e-5, atol=1e-5)


class Net(nnx.Module):
    """Every kind of layer with everything that can follow."""

    def __init__(self):
        options = {"rngs": quick_rngs(), "precision": "highest"}
        self.stem = js.nn.SubMConv(3, 8, 3, **options)
        self.down = js.nn.SparseConv(8, 8, 2, strides=2, **options)
        self.up = js.nn.SparseInverseConv(8, 8, 2, strides=2, **options)
        self.norms = nnx.List([js.nn.BatchNorm(8, rngs=quick_rngs()) for _ in range(3)])

    def __call__(self, x):
        stem, down, up = self.norms
        y = self.stem(x, norm=stem, activation="relu")
        z = self.down(y, norm=down, activation="silu")
        return self.up(z, like=y, norm=up, residual=y, activation="gelu")

    def by_steps(self, x):
        """The same by the layers of each step."""
        stem, down, up = self.norms
        y = js.ops.relu(stem(self.stem(x)))
        z = js.ops.silu(down(self.down(y)))
        return js.ops.gelu(up(self.up(z, like=y)) + y)


@pytest.mark.parametrize("train", [True, False])
def test_layers_with_a_norm_equal_their_steps_and_update_the_same_statistics(train):
    x = random_tensor(0, rows=90, capacity=120)
    ours, theirs = Net(), Net()
    for net in (ours, theirs):
        (net.train if train else net.eval)()
    for _ in range(2):
        assert row_error(ours(x).feats, theirs.by_steps(x).feats) < 1e-6
    for a, b in zip(jax.tree.leaves(nnx.state(ours)), jax.tree.leaves(nnx.state(theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_norm_with_a_dtype_of_its_own_follows_as_a_step():
    x = random_tensor(0, rows=90, features=4, dtype=jnp.float16)
    conv = js.nn.SubMConv(4, 4, 3, dtype=jnp.float16, rngs=quick_rngs())
    norm = js.nn.BatchNorm(4, use_running_average=True, dtype=jnp.float32, rngs=quick_rngs())
    y = conv(x, norm=norm, residual=x, activation="relu")
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y.feats, js.ops.relu(norm(conv(x)) + x.astype(jnp.float32)).feats)


@pytest.mark.parametrize("train", [True, False])
def test_gradients_of_several_devices_equal_those_of_one(train):
    if jax.device_count("cpu") < 2:
        pytest.skip("needs several CPU devices")
    single = [random_tensor(s, rows=20 + 9 * s, capacity=64, batches=1) for s in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *single)
    net = Net()
    (net.train if train else net.eval)()
    graph, params, rest = nnx.split(net, nnx.Param, ...)

    def loss(params, x):
        y = nnx.merge(graph, params, rest, copy=True)(x)
        return (y.feats**2).sum()

    def shard(params, stacked):
        x = jax.tree.map(lambda leaf: leaf[0], stacked)
        return jax.value_and_grad(lambda p: jax.lax.psum(loss(p, x), "data"))(params)

    mesh, spec = Mesh(np.array(jax.devices("cpu")[:2]), ("data",)), PartitionSpec("data")
    with jax.default_device(jax.devices("cpu")[0]):
        expected = jax.value_and_grad(lambda p: sum(loss(p, x) for x in single))(params)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec()))(
            params, jax.device_put(stacked, jax.NamedSharding(mesh, spec))
        )
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[1]))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * largest)


def test_values_of_several_devices_equal_those_of_one():
    """Without a derivative, which is where the fused op itself runs."""
    if jax.device_count("cpu") < 2:
        pytest.skip("needs several CPU devices")
    single = [random_tensor(s, rows=20 + 9 * s, capacity=64, batches=1) for s in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *single)
    net = Net()
    net.eval()
    graph, state = nnx.split(net)

    def shard(state, stacked):
        return nnx.merge(graph, state)(jax.tree.map(lambda leaf: leaf[0], stacked)).feats[None]

    mesh, spec = Mesh(np.array(jax.devices("cpu")[:2]), ("data",)), PartitionSpec("data")
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(shard, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec)
        found = jax.jit(mapped)(state, jax.device_put(stacked, jax.NamedSharding(mesh, spec)))
    with jax.default_device(jax.devices("cpu")[0]):
        for a, x in zip(found, single, strict=True):
            np.testing.assert_allclose(a, net(x).feats, rtol=1e-6, atol=1e-6)


def test_scan_checkpoint_and_cond_take_it():
    x = random_tensor(0, rows=40, capacity=44)
    kernels = jnp.stack([random_kernel(s, Geometry.create(3, 3), 3, 3) * 0.1 for s in range(3)])
    kernel_map = js.kernel_map(x.sites, x.sites, 3)
    norm = js.ops.ChannelNorm(**numbers(width=3))

    def block(feats, kernel):
        y = x.with_feats(feats)
        options = {"kernel_size": 3, "kernel_map": kernel_map, "norm": norm, "residual": y, "activation": "relu"}
        return js.ops.conv(y, kernel, **options).feats

    def loop(kernels):
        feats = x.feats
        for kernel in kernels:
            feats = block(feats, kernel)
        return (feats**2).sum()

    def scanned(kernels):
        body = jax.checkpoint(lambda feats, kernel: (block(feats, kernel), None))
        return (jax.lax.scan(body, x.feats, kernels)[0] ** 2).sum()

    def conditional(kernels):
        return jax.lax.cond(kernels.sum() < jnp.inf, loop, lambda kernels: 0 * kernels.sum(), kernels)

    value, gradient = jax.value_and_grad(loop)(kernels)
    for f in (scanned, conditional):
        found = jax.jit(jax.value_and_grad(f))(kernels)
        np.testing.assert_allclose(found[0], value, rtol=1e-5)
        np.testing.assert_allclose(found[1], gradient, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(jax.jit(f)(kernels), value, rtol=1e-5)


def test_exported_eval_mode_blocks_are_custom_calls_alone():
    """For CUDA, from any machine: nothing is left of norms, activations and sums of residuals; training has norms."""
    x = random_tensor(0, rows=90, capacity=128, features=16, dtype=jnp.float16)
    block = js.models.blocks.ResidualBlock(16, 16, dtype=jnp.float16, rngs=quick_rngs())

    def text(block):
        graph, state = nnx.split(block)
        run = jax.jit(lambda x: nnx.merge(graph, state, copy=True)(x).feats)
        checks = js.DISABLE_JAX_EXPORT_CHECKS
        return jax.export.export(run, platforms=["cuda"], disabled_checks=checks)(x).mlir_module()

    block.eval()
    fused_text = text(block)
    assert fused_text.count("@jaxsparse_conv_fused_v1(") == 2
    assert "@jaxsparse_conv_gemm_v1(" not in fused_text
    for op in ("maximum", "rsqrt", "stablehlo.multiply", "dot_general"):
        assert op not in fused_text, op
    block.train()
    steps_text = text(block)
    assert steps_text.count("@jaxsparse_conv_gemm_v1(") == 2
    assert "@jaxsparse_conv_fused_v1(" not in steps_text
    assert steps_text.count("@jaxsparse_batch_norm_v1(") == 2


def test_residual_on_other_sites_is_reported():
    x = random_tensor(0, rows=40, capacity=48)
    other = random_tensor(1, rows=40, capacity=48)
    kernel = random_kernel(0, Geometry.create(3, 3), 3, 3)
    y = js.ops.conv(x, kernel, kernel_size=3, residual=other)
    with pytest.raises(js.status.SiteError, match="equal"):
        y.check()
    assert js.ops.conv(x, kernel, kernel_size=3, residual=x).check().sites is x.sites


def test_arguments_that_do_not_fit_are_refused():
    x, kernel = scene()
    with raises(ValueError, "`activation` (='tanh')", "relu"):
        js.ops.conv(x, kernel, kernel_size=3, activation="tanh")
    with raises(ValueError, "`norm.scale` of shape (3,)", "[4]"):
        js.ops.conv(x, kernel, kernel_size=3, norm=js.ops.ChannelNorm(scale=jnp.ones(3)))
    with raises(ValueError, "`residual` has 3 features", "4"):
        js.ops.conv(x, kernel, kernel_size=3, residual=x)
    with raises(ValueError, "equal sites", "(20, 4)"):
        js.ops.conv(x, kernel, kernel_size=3, residual=random_tensor(1, rows=10, capacity=20, features=4))
    with raises(TypeError, "expected a SparseTensor"):
        js.ops.conv(x, kernel, kernel_size=3, residual=x.feats)


def test_order_of_activations_is_that_of_the_custom_call():
    assert [fused.Ending((), 0.0, name).attributes()["activation"] for name in ACTIVATIONS] == list(range(5))
    every = fused.Ending((*NUMBERS, "residual"), 0.5, None).attributes()
    assert every == {"given": 31, "activation": 0, "epsilon": 0.5}
