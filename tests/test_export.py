"""Exported programs: for CPU and CUDA from a machine without a GPU, and for TPU in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scenes import quick_rngs, random_tensor

import jaxsparse as js


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
