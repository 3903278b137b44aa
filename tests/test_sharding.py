"""Data parallel gradients inside `shard_map`, with different scenes on each device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, PartitionSpec
from scenes import random_tensor

import jaxsparse as js

CAPACITY = 64


class Net(nnx.Module):
    """One layer of each kind, with a batch norm."""

    def __init__(self, axis_name=None):
        rngs = nnx.Rngs(0)
        self.stem = js.nn.SubMConv(3, 8, 3, rngs=rngs, precision="highest")
        self.norm = js.nn.BatchNorm(8, axis_name=axis_name, rngs=rngs)
        self.down = js.nn.SparseConv(8, 8, 2, strides=2, rngs=rngs, precision="highest")
        self.up = js.nn.SparseInverseConv(8, 8, 2, strides=2, rngs=rngs, precision="highest")
        self.head = js.nn.Linear(8, 2, rngs=rngs, precision="highest")

    def __call__(self, x):
        y = js.ops.relu(self.norm(self.stem(x)))
        return self.head(js.ops.add(y, self.up(self.down(y), like=y)))


def total_loss(net, x):
    return (net(x).feats ** 2).sum()


def scenes(number):
    """Scenes of unequal size, stacked, and the same ones as one batch."""
    single = [random_tensor(s, rows=20 + 9 * s, capacity=CAPACITY, batches=1) for s in range(number)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *single), js.collate(single)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("devices", [2, 4])
def test_gradient_equals_that_of_one_device(devices, axis_type):
    if jax.device_count("cpu") < devices:
        pytest.skip("needs several CPU devices")
    mesh = Mesh(np.array(jax.devices("cpu")[:devices]), ("data",), axis_types=(axis_type,))
    stacked, batch = scenes(devices)
    graph, state = nnx.split(Net("data"))

    def shard_gradient(state, stacked):
        x = jax.tree.map(lambda leaf: leaf[0], stacked)

        def loss(state):
            return jax.lax.psum(total_loss(nnx.merge(graph, state, copy=True), x), "data")

        return jax.value_and_grad(loss)(state)

    with jax.default_device(jax.devices("cpu")[0]):
        single = nnx.split(Net())[0]
        expected = jax.value_and_grad(lambda s: total_loss(nnx.merge(single, s, copy=True), batch))(state)
    with jax.set_mesh(mesh):
        spec = PartitionSpec("data")
        stacked = jax.device_put(stacked, jax.NamedSharding(mesh, spec))
        state = jax.device_put(state, jax.NamedSharding(mesh, PartitionSpec()))
        sharded = jax.jit(
            jax.shard_map(shard_gradient, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec())
        )
        value, gradient = sharded(state, stacked)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    flat, expected_flat = jax.tree.leaves(gradient), jax.tree.leaves(expected[1])
    largest = max(np.abs(leaf).max() for leaf in expected_flat)
    for a, b in zip(flat, expected_flat, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * largest)


def test_equal_shards_would_hide_what_unequal_ones_show():
    """The gradients of the shards differ, so that the test above can fail."""
    stacked, _ = scenes(2)
    graph, state = nnx.split(Net())

    def gradient(shard):
        x = jax.tree.map(lambda leaf: leaf[shard], stacked)
        return jax.tree.leaves(jax.grad(lambda s: total_loss(nnx.merge(graph, s, copy=True), x))(state))

    first, second = gradient(0), gradient(1)
    assert max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in zip(first, second, strict=True)) > 1e-2
