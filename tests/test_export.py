"""Exported programs: for CPU and CUDA from a machine without a GPU, and for TPU in plain JAX.

And programs of a machine whose GPU the build has no kernels for.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scenes import quick_rngs, random_tensor

import jaxsparse as js
from jaxsparse import _native, _primitive
from jaxsparse.tuning import choice


def program(implementation="auto"):
    """Voxels to gradients through every custom call of float32; returns the function and its operands."""
    x = random_tensor(0, rows=60, capacity=80, features=4)
    kernel = jnp.ones((27, 4, 4)) * 0.1
    points = jnp.asarray(np.random.default_rng(0).uniform(0, 3, (100, 3)), jnp.float32)

    def f(x, kernel, points):
        def loss(kernel, feats):
            y, index = js.voxelize(points, feats, 0.5, capacity=64, implementation=implementation)
            options = {"kernel_size": 3, "implementation": implementation, "precision": "highest"}
            a = js.ops.conv(y, kernel, **options)
            b = js.ops.conv(a, kernel, sites="reachable", strides=2, **options)
            c = js.ops.conv_transpose(b, kernel, like=a, strides=2, **options)
            points_out = js.devoxelize(c, index, implementation=implementation)
            return (points_out**2).sum() + (js.ops.conv(x, kernel, **options).feats ** 2).sum()

        return jax.value_and_grad(loss, (0, 1))(kernel, jnp.concatenate([points, points[:, :1]], 1))

    return f, (x, kernel, points)


def as_leaves(x):
    """The leaves of a pytree, which serialised programs take, and the way back."""
    leaves, tree = jax.tree.flatten(x)
    return leaves, lambda leaves: jax.tree.unflatten(tree, leaves)


@pytest.mark.parametrize("platforms", [["cpu"], ["cuda"], ["cpu", "cuda"]])
def test_custom_calls_export_for_cpu_and_cuda(platforms):
    f, operands = program()
    leaves, unflatten = as_leaves(operands)
    exported = jax.export.export(
        jax.jit(lambda *leaves: f(*unflatten(leaves))),
        platforms=platforms,
        disabled_checks=js.DISABLE_JAX_EXPORT_CHECKS,
    )(*leaves)
    text = exported.mlir_module()
    plain = {"jaxsparse_conv_forward_v1", "jaxsparse_conv_wgrad_v1"}
    scheduled = {f"jaxsparse_{name}_v1" for name in ("conv_schedule", "conv_gemm", "conv_pairs", "wgrad_gemm")}
    expected = set(js._ffi.TARGETS) - plain
    for platform in platforms:
        expected |= plain if platform == "cpu" else scheduled
    for target in expected:
        assert target in text, f"{target} is not in the exported program"
    loaded = jax.export.deserialize(exported.serialize())
    if jax.default_backend() in [p.replace("cuda", "gpu") for p in platforms]:
        for a, b in zip(jax.tree.leaves(loaded.call(*leaves)), jax.tree.leaves(f(*operands)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_plain_jax_exports_for_tpu():
    f, operands = program("xla")
    leaves, unflatten = as_leaves(operands)
    exported = jax.export.export(jax.jit(lambda *leaves: f(*unflatten(leaves))), platforms=["tpu"])(*leaves)
    assert "jaxsparse_" not in exported.mlir_module()


def test_default_implementation_lowers_to_plain_jax_on_tpu():
    net = js.models.SparseResUNet42(4, width=0.125, rngs=quick_rngs())
    x = random_tensor(0, rows=40, features=4)
    graph, state = nnx.split(net)
    leaves, unflatten = as_leaves((state, x))

    def f(*leaves):
        state, x = unflatten(leaves)
        return nnx.merge(graph, state, copy=True)(x).feats

    exported = jax.export.export(jax.jit(f), platforms=["tpu"])(*leaves)
    assert "jaxsparse_" not in exported.mlir_module()


# --- a GPU without kernels ---


def every_custom_call_of_cuda():
    """Functions and operands that make all of them between each other."""
    x = random_tensor(0, rows=60, capacity=80, features=16, dtype=jnp.float16)
    kernel, pointwise = jnp.ones((27, 16, 16), jnp.float16), jnp.ones((1, 16, 16), jnp.float16)
    norm = js.ops.ChannelNorm(scale=jnp.ones(16), bias=jnp.ones(16))
    ones = jnp.ones(16)

    def eval_mode(x, kernel, pointwise):
        y = js.ops.conv(x, kernel, kernel_size=3, norm=norm, activation="relu")
        return js.ops.conv(y, pointwise, kernel_size=1, norm=norm).feats

    def train_mode(x, scale):
        def loss(scale):
            y, *_ = js.ops.normalize_batch(x, scale, scale, activation="relu")
            return (y.feats.astype(jnp.float32) ** 2).sum()

        return jax.value_and_grad(loss)(scale), jax.jvp(loss, (scale,), (scale,)), js.ops.batch_statistics(x)

    return [program(), (eval_mode, (x, kernel, pointwise)), (train_mode, (x, ones))]


def lowered_for_cuda():
    """The custom calls in their text, the program in float64 among them."""
    texts = []
    for f, operands in every_custom_call_of_cuda():
        texts.append(jax.jit(f).trace(*operands).lower(lowering_platforms=("cuda",)).as_text())
    with jax.enable_x64(True):
        f, operands = program()
        wide = jax.tree.map(lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a, operands)
        texts.append(jax.jit(f).trace(*wide).lower(lowering_platforms=("cuda",)).as_text())
    return set(re.findall(r"jaxsparse_\w+", "".join(texts)))


@pytest.fixture
def build_without_cuda(monkeypatch):
    """As where jaxsparse was built without CUDA kernels."""
    monkeypatch.setattr(_native, "cuda_handlers", dict)
    _primitive._warn_of_plain_jax.cache_clear()
    yield
    _primitive._warn_of_plain_jax.cache_clear()


def test_programs_for_another_machines_gpu_have_custom_calls_whatever_this_build_has(build_without_cuda, monkeypatch):
    monkeypatch.setattr(choice, "device_here", lambda platform: None)
    assert lowered_for_cuda() == set(js._ffi.TARGETS + js._ffi.CUDA_TARGETS)


def test_a_gpu_that_the_build_has_no_kernels_for_runs_plain_jax_with_one_warning(build_without_cuda, monkeypatch):
    monkeypatch.setattr(choice, "device_here", lambda platform: jax.local_devices()[0])
    with pytest.warns(UserWarning, match="no CUDA kernels; plain JAX.*slower.*JAXSPARSE_CUDA=ON") as found:
        assert lowered_for_cuda() == set()
    assert len(found) == 1


def test_plain_jax_in_place_of_missing_kernels_gives_the_same_numbers(monkeypatch):
    f, operands = program()
    expected = f(*operands)
    monkeypatch.setattr(_primitive, "lacks_kernels", lambda platform: True)
    monkeypatch.setattr(_primitive, "_warn_of_plain_jax", lambda: None)
    lowered = jax.jit(lambda *operands: f(*operands)).lower(*operands)
    assert "jaxsparse_" not in lowered.as_text()
    for a, b in zip(jax.tree.leaves(lowered.compile()(*operands)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
