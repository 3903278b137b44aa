"""Voxels as tensors of this library."""

import jax.numpy as jnp
import numpy as np

import jaxsparse as js


def capacity_for(count, factor=1.1):
    """Rows for so many sites, a tenth to spare."""
    return -(-int(factor * count) // 256) * 256


def tensor(voxels, dtype, capacity, capacities=None):
    """The voxels as `voxelize` makes them, sorted; voxel centres stand in for points, so voxels stay as they are."""
    n, spare = len(voxels.coords), capacity - len(voxels.coords)
    centres = np.pad(voxels.coords[:, 1:] + np.float32(0.5), [(0, spare), (0, 0)])
    x, _ = js.voxelize(
        jnp.asarray(centres),
        jnp.asarray(np.pad(voxels.feats, [(0, spare), (0, 0)])),
        voxel_size=1.0,
        origin=(0.0, 0.0, 0.0),
        capacity=capacity,
        count=jnp.int32(n),
        batch=jnp.asarray(np.pad(voxels.coords[:, 0], (0, spare))),
        batch_size=int(voxels.coords[:, 0].max()) + 1,
        capacities=capacities,
    )
    return x.check().with_feats(x.feats.astype(dtype))


def real(sites):
    """The real coordinates on the host."""
    return np.asarray(sites.coords)[: int(sites.count)]
